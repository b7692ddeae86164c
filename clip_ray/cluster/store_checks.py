"""What S3 lets one node do: each operation that a run needs, tried below `storage.root`."""

from __future__ import annotations

import contextlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime

import boto3
from botocore.config import Config as BotoConfig
from botocore.exceptions import BotoCoreError, ClientError

from clip_ray.errors import RunError
from clip_ray.storage import PART_BYTES, Storage, arrow_filesystem

DATE_TIMEOUT_S = 10
CHECKSUMS = "AWS_REQUEST_CHECKSUM_CALCULATION"


@dataclass
class StoreFacts:
    """What was tried at `endpoint`: operation -> why it failed, or None; and the store's clock."""

    endpoint: str
    outcomes: dict[str, str | None] = field(default_factory=dict)
    ahead_s: float | None = None
    sends_checksums: bool = True

    def attempt(self, operation: str, function: Callable[[], str | None]) -> bool:
        """Keeps what the function returns or raises; whether the operation succeeded."""
        try:
            self.outcomes[operation] = function()
        except (RunError, ClientError, BotoCoreError, OSError) as error:
            self.outcomes[operation] = " ".join(str(error).split())
        return self.outcomes[operation] is None


def store_facts(root: str, key: str) -> StoreFacts:
    """Tries all operations below `root`, on objects that begin with `key` and are removed."""
    storage = Storage(root)
    default = os.environ.get(CHECKSUMS) != "when_required"
    facts = StoreFacts(endpoint=_endpoint(), ahead_s=_ahead_s(_endpoint()), sends_checksums=default)
    if not facts.attempt("reach", storage.check_bucket):
        return facts
    if facts.attempt("write", lambda: storage.write_bytes(key, b"probe")):
        facts.attempt("read", lambda: _read(storage, key, b"probe"))
        facts.attempt("conditional put", lambda: _conditional(storage, f"{key}-if"))
        # pyarrow writes in parts: without them it could not tell of checksums.
        if facts.attempt("multipart", lambda: _multipart(storage, f"{key}-parts")):
            facts.attempt("checksums", lambda: _checksums(storage, f"{key}-checksums"))
        facts.attempt("delete", lambda: _delete(storage, key))
    return facts


def _read(storage: Storage, key: str, expected: bytes) -> str | None:
    found = storage.read_bytes(key)
    return None if found == expected else f"{len(found)} bytes came back, not those written"


def _conditional(storage: Storage, key: str) -> str | None:
    """A put by If-None-Match where the object is, or If-Match of another version, must not pass."""
    if not storage.write_if(key, b"first", None):
        return "If-None-Match: * is refused although there is no such object"
    if storage.write_if(key, b"second", None):
        return "If-None-Match: * is ignored"
    _, tag = storage.read_tagged(key)
    if not storage.write_if(key, b"third", tag):
        return "If-Match is refused although the tag is right"
    return "If-Match is ignored" if storage.write_if(key, b"fourth", tag) else None


def _multipart(storage: Storage, key: str) -> str | None:
    data = bytes(PART_BYTES + 1)
    storage.write_in_parts(key, data)
    return _read(storage, key, data)


def _checksums(storage: Storage, key: str) -> str | None:
    """Puts with the checksums that botocore and pyarrow send by default, which ours do not."""
    bucket, _, place = storage.arrow_path(key).partition("/")
    settings = BotoConfig(
        request_checksum_calculation="when_supported",
        retries={"total_max_attempts": 2},
        connect_timeout=5,
        read_timeout=15,
    )
    client = boto3.Session().client(
        "s3", endpoint_url=_named_endpoint(), region_name=_region(), config=settings
    )
    client.put_object(Bucket=bucket, Key=place, Body=b"botocore")
    if wrong := _read(storage, key, b"botocore"):
        return wrong
    try:
        with (
            _default_checksums(),
            arrow_filesystem().open_output_stream(f"{bucket}/{place}") as out,
        ):
            out.write(b"pyarrow")
    finally:
        storage.abort_uploads(key, lambda _: True)
    return _read(storage, key, b"pyarrow")


@contextlib.contextmanager
def _default_checksums() -> Iterator[None]:
    before = os.environ.pop(CHECKSUMS, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[CHECKSUMS] = before


def _delete(storage: Storage, key: str) -> str | None:
    for each in list(storage.keys(key)):
        storage.delete(each)
    return "the objects are still listed" if list(storage.keys(key)) else None


def _ahead_s(endpoint: str) -> float | None:
    """How far this machine's clock is ahead of the store's; None where it tells no time."""
    try:
        with urllib.request.urlopen(endpoint, timeout=DATE_TIMEOUT_S) as answer:
            date = answer.headers["Date"]
    except urllib.error.HTTPError as error:  # refusing an unsigned request is an answer
        date = error.headers["Date"]
    except (OSError, http.client.HTTPException):
        return None
    return time.time() - parsedate_to_datetime(date).timestamp() if date else None


def _endpoint() -> str:
    return _named_endpoint() or f"https://s3.{_region()}.amazonaws.com"


def _named_endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _region() -> str:
    return os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION") or "us-east-1"
