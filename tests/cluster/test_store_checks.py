"""What a node finds out about S3: all is there; Ceph refuses the checksums of current SDKs."""

from __future__ import annotations

import time

import pytest
from picky_s3 import no_conditions, no_multipart, picky_s3
from s3_server import IS_CEPH

from clip_ray.cluster.store_checks import store_facts
from clip_ray.storage import Storage

pytestmark = [pytest.mark.s3, pytest.mark.timeout(180)]


def test_a_store_is_tried_and_left_as_it_was(storage: Storage) -> None:
    facts = store_facts(storage.root, "doctor/probe")
    checksums = facts.outcomes.pop("checksums")
    assert list(facts.outcomes) == [
        "reach", "write", "read", "conditional put", "multipart", "delete",
    ]  # fmt: skip
    assert set(facts.outcomes.values()) == {None}
    if IS_CEPH:
        assert "HTTP status 411" in str(checksums)
    else:
        assert checksums is None
    assert facts.ahead_s is not None and abs(facts.ahead_s) < 5
    assert list(storage.keys()) == []


def test_what_a_store_lacks_is_named(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = store_facts(storage.root, "doctor/probe").endpoint
    with picky_s3(upstream, no_conditions) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        facts = store_facts(storage.root, "doctor/probe")
    assert facts.outcomes["conditional put"] == "If-None-Match: * is ignored"
    with picky_s3(upstream, no_multipart) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        facts = store_facts(storage.root, "doctor/probe")
    assert "NotImplemented" in str(facts.outcomes["multipart"])
    assert "checksums" not in facts.outcomes


def test_a_store_that_does_not_answer_is_given_up(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    started_s = time.monotonic()
    facts = store_facts(storage.root, "doctor/probe")
    assert list(facts.outcomes) == ["reach"]
    assert "does not answer" in str(facts.outcomes["reach"])
    assert facts.ahead_s is None
    assert time.monotonic() - started_s < 60
