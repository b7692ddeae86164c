"""Objects in a real S3 server, and errors that name the address and the fix."""

import pytest

from clip_ray.errors import RunError
from clip_ray.storage import Storage


def test_what_is_written_is_read_listed_and_deleted(storage: Storage) -> None:
    storage.write_json("a/b.json", {"x": "é"})
    storage.write_bytes("a/c", b"123")
    assert storage.read_json("a/b.json") == {"x": "é"}
    assert list(storage.keys("a/")) == ["a/b.json", "a/c"]
    storage.delete("a/c")
    assert not storage.exists("a/c")


def test_missing_object_is_named(storage: Storage) -> None:
    with pytest.raises(RunError, match=r"/absent: there is no such object"):
        storage.read_bytes("absent")


def test_missing_bucket_is_named(storage: Storage) -> None:
    with pytest.raises(RunError, match="bucket 'no-such-bucket' does not exist"):
        Storage("s3://no-such-bucket/x").check_bucket()


def test_wrong_keys_are_refused(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong")
    with pytest.raises(RunError, match=r"access denied|failed at"):
        storage.read_bytes("x")
