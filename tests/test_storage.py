"""Objects in a real S3 server, and errors that name the address and the fix."""

import os
import socket
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest
from faulty_proxy import faulty_proxy

from clip_ray.errors import RunError
from clip_ray.storage import PART_BYTES, Storage, _client


def test_what_is_written_is_read_listed_and_deleted(storage: Storage) -> None:
    storage.write_json("a/b.json", {"x": "é"})
    storage.write_bytes("a/c", b"123")
    assert storage.read_json("a/b.json") == {"x": "é"}
    assert list(storage.keys("a/")) == ["a/b.json", "a/c"]
    storage.delete("a/c")
    assert not storage.exists("a/c")


def test_a_put_with_a_condition_is_refused_where_another_was_faster(storage: Storage) -> None:
    assert storage.read_tagged("ledger") == (None, None)
    assert storage.write_if("ledger", b"1", None)
    assert not storage.write_if("ledger", b"2", None)
    data, tag = storage.read_tagged("ledger")
    assert data == b"1"
    assert storage.write_if("ledger", b"2", tag)
    assert not storage.write_if("ledger", b"3", tag)
    assert storage.read_bytes("ledger") == b"2"


def test_a_large_object_goes_up_in_parts_and_a_cut_upload_is_given_up(storage: Storage) -> None:
    data = bytes(range(256)) * (PART_BYTES // 256) + b"the rest"
    storage.write_in_parts("large", data)
    assert storage.read_bytes("large") == data
    for key in ("cut/mine", "cut/theirs"):
        place = {"Bucket": storage.bucket, "Key": f"{storage.prefix}/{key}"}
        upload = _client().create_multipart_upload(**place)["UploadId"]
        _client().upload_part(**place, UploadId=upload, PartNumber=1, Body=b"0" * 2**20)
    storage.abort_uploads("cut/", lambda key: key == "cut/mine")
    found = _client().list_multipart_uploads(Bucket=storage.bucket, Prefix=f"{storage.prefix}/cut/")
    left = [upload["Key"] for upload in found.get("Uploads", [])]
    assert left == [f"{storage.prefix}/cut/theirs"]


@pytest.mark.parametrize(
    "write",
    [
        lambda storage: storage.write_bytes("record", b"after"),
        lambda storage: storage.write_if("record", b"after", storage.read_tagged("record")[1]),
        lambda storage: storage.write_in_parts("record", b"after"),
    ],
    ids=["plain", "conditional", "in parts"],
)
def test_a_put_whose_client_is_killed_behind_a_proxy_changes_nothing(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, write: Callable[[Storage], object]
) -> None:
    storage.write_bytes("record", b"before")
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        _client().meta.events.register("before-send.s3.PutObject", send_without_its_body)
        with pytest.raises(Killed):
            write(storage)
        time.sleep(0.5)
    assert storage.read_bytes("record") == b"before"


class Killed(BaseException):
    """The end of a client between the head of its request and the body."""


def send_without_its_body(request: Any, **_: object) -> None:
    place = urlsplit(request.url)
    head = [f"PUT {place.path} HTTP/1.1".encode(), b"Host: " + place.netloc.encode()]
    for name, value in request.headers.items():
        head.append(f"{name}: ".encode() + (value if isinstance(value, bytes) else value.encode()))
    with socket.create_connection((place.hostname or "", place.port or 80)) as connection:
        connection.sendall(b"\r\n".join(head) + b"\r\n\r\n")
        time.sleep(0.5)  # the server has the head, and waits
    raise Killed


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
