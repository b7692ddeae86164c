"""Objects under an `s3://` root: bytes by boto3, Parquet by pyarrow's filesystem.

Endpoint, region and keys come from the environment (AWS_ENDPOINT_URL, …) or from IAM, never from
a config: what is written to storage holds no secret.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config as BotoConfig
from botocore.exceptions import BotoCoreError, ClientError
from pyarrow import fs

from clip_ray.errors import RunError

PART_BYTES = 32 * 2**20
_NOT_FOUND = {"404", "NoSuchKey", "NotFound"}
_CONFLICT = {"412", "PreconditionFailed", "409", "ConditionalRequestConflict"}


class Storage:
    """The objects below one `s3://bucket[/prefix]`; keys are relative to it.

    It is cheap to make and holds no connection, so it can be sent to other processes by its root.
    """

    def __init__(self, root: str) -> None:
        scheme, bucket, path, *_ = urlsplit(root)
        if scheme != "s3" or not bucket:
            raise RunError(f"storage is {root!r}: must be s3://bucket[/prefix]")
        self.root = root.rstrip("/")
        self.bucket = bucket
        self.prefix = path.strip("/")

    def uri(self, key: str = "") -> str:
        """The full address of `key`."""
        return f"{self.root}/{key}".rstrip("/")

    def below(self, key: str) -> Storage:
        """The storage whose root is `key` in this one."""
        return Storage(self.uri(key))

    def read_bytes(self, key: str) -> bytes:
        """The object's bytes. Raises RunError where there is none."""
        with self._errors_named(key):
            return _client().get_object(Bucket=self.bucket, Key=self._key(key))["Body"].read()

    def read_json(self, key: str) -> Any:
        """The object, parsed as JSON."""
        return json.loads(self.read_bytes(key))

    def write_bytes(self, key: str, data: bytes) -> None:
        """Puts one object, whole or not at all."""
        with self._errors_named(key):
            self._put(key, data)

    def write_in_parts(self, key: str, data: bytes) -> None:
        """Puts one object, in parts where it is large, whole or not at all."""
        with self._errors_named(key):
            if len(data) <= PART_BYTES:
                return self._put(key, data)
            place = {"Bucket": self.bucket, "Key": self._key(key)}
            upload = place | {"UploadId": _client().create_multipart_upload(**place)["UploadId"]}
            try:
                parts = [
                    {"PartNumber": number, "ETag": _put_part(upload, number, part)}
                    for number, part in enumerate(_parts(data), start=1)
                ]
                _client().complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
            except BaseException:
                with contextlib.suppress(ClientError, BotoCoreError):
                    _client().abort_multipart_upload(**upload)
                raise

    def abort_uploads(self, prefix: str, of: Callable[[str], bool]) -> None:
        """Gives up the uploads in parts, begun under `prefix` and not ended, of such keys."""
        with self._errors_named(prefix):
            found = _client().list_multipart_uploads(Bucket=self.bucket, Prefix=self._key(prefix))
            start = self._key("")
            unfinished = found.get("Uploads", [])
            for upload in (each for each in unfinished if of(each["Key"].removeprefix(start))):
                _client().abort_multipart_upload(
                    Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                )

    def read_tagged(self, key: str) -> tuple[bytes | None, str | None]:
        """The object's bytes and the tag of this version of it; None and None where it is not."""
        with self._errors_named(key):
            try:
                found = _client().get_object(Bucket=self.bucket, Key=self._key(key))
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") in _NOT_FOUND:
                    return None, None
                raise
            return found["Body"].read(), found["ETag"]

    def write_if(self, key: str, data: bytes, tag: str | None) -> bool:
        """Puts the object if it still has this tag (None: if it is not there); whether it did."""
        # Ceph compares the tag as it stands, without the quotes that it came in.
        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag.strip('"')}
        with self._errors_named(key):
            try:
                self._put(key, data, **condition)
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") in _CONFLICT:
                    return False
                raise
        return True

    def write_json(self, key: str, value: Any) -> None:
        """Puts `value` as indented JSON."""
        self.write_bytes(key, json.dumps(value, indent=2, ensure_ascii=False).encode())

    def upload_stream(self, stream: Any, key: str) -> None:
        """Puts what a binary `stream` has, in parts, without holding it whole."""
        with self._errors_named(key):
            _client().upload_fileobj(stream, self.bucket, self._key(key))

    def download(self, key: str, path: Path) -> None:
        """Writes the object to a local file, its folders made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._errors_named(key):
            _client().download_file(self.bucket, self._key(key), str(path))

    def exists(self, key: str) -> bool:
        """Whether the object is there."""
        with self._errors_named(key):
            try:
                _client().head_object(Bucket=self.bucket, Key=self._key(key))
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") in _NOT_FOUND:
                    return False
                raise
        return True

    def keys(self, prefix: str = "") -> Iterator[str]:
        """The keys that start with `prefix`, in order."""
        return (key for key, _ in self.sizes(prefix))

    def sizes(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """The keys that start with `prefix`, in order, each with its size in bytes."""
        start = f"{self.prefix}/" if self.prefix else ""
        with self._errors_named(prefix):
            pages = (
                _client()
                .get_paginator("list_objects_v2")
                .paginate(Bucket=self.bucket, Prefix=start + prefix)
            )
            for page in pages:
                for item in page.get("Contents", []):
                    yield item["Key"].removeprefix(start), item["Size"]

    def folders(self, prefix: str) -> Iterator[str]:
        """The names of the folders right below `prefix`, which ends with a slash."""
        pages = _client().get_paginator("list_objects_v2")
        place = self._key(prefix)
        with self._errors_named(prefix):
            for page in pages.paginate(Bucket=self.bucket, Prefix=place, Delimiter="/"):
                for found in page.get("CommonPrefixes", []):
                    yield found["Prefix"].removeprefix(place).rstrip("/")

    def delete(self, key: str) -> None:
        """Removes the object; one that is not there is no error."""
        with self._errors_named(key):
            _client().delete_object(Bucket=self.bucket, Key=self._key(key))

    def check_bucket(self) -> None:
        """Raises RunError, with the reason, unless the bucket can be reached."""
        with self._errors_named(""):
            _client().head_bucket(Bucket=self.bucket)

    def create_bucket(self) -> None:
        """Makes the bucket; one that is there already is no error."""
        with self._errors_named(""):
            try:
                _client().head_bucket(Bucket=self.bucket)
            except ClientError:
                _client().create_bucket(Bucket=self.bucket)

    def arrow_path(self, key: str) -> str:
        """The path of `key` for `arrow_filesystem()`."""
        return f"{self.bucket}/{self._key(key)}"

    def _put(self, key: str, data: bytes, **condition: str) -> None:
        # By the MD5 the server knows a body that was cut: SeaweedFS takes one without a byte for
        # an empty object, where a proxy closes the half of a connection whose client was killed.
        _client().put_object(
            Bucket=self.bucket, Key=self._key(key), Body=data, ContentMD5=_md5(data), **condition
        )

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _errors_named(self, key: str) -> _NamedErrors:
        return _NamedErrors(self.uri(key), self.bucket)


class _NamedErrors:
    """Turns an error of the S3 client into a RunError that names the address and the fix."""

    def __init__(self, uri: str, bucket: str) -> None:
        self.uri, self.bucket = uri, bucket

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ClientError):
            raise RunError(f"{self.uri}: {_reason(error, self.bucket)}") from error
        if isinstance(error, BotoCoreError):
            raise RunError(
                f"{self.uri}: S3 at {_endpoint() or 'AWS'} does not answer: {error}; "
                "check AWS_ENDPOINT_URL, the keys and the network"
            ) from error


def _reason(error: ClientError, bucket: str) -> str:
    code = error.response.get("Error", {}).get("Code", "")
    where = _endpoint() or "AWS"
    if code in {"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"}:
        return f"access denied at {where} ({code}); check the keys and the bucket's policy"
    if code == "NoSuchBucket" or (code == "404" and error.operation_name == "HeadBucket"):
        return f"the bucket {bucket!r} does not exist at {where}; create it or change storage.root"
    if code in _NOT_FOUND:
        return "there is no such object"
    return f"{error.operation_name} failed at {where}: {code or error}"


def _md5(data: bytes | memoryview) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _parts(data: bytes) -> Iterator[memoryview]:
    view = memoryview(data)
    return (view[start : start + PART_BYTES] for start in range(0, len(data), PART_BYTES))


def _put_part(upload: dict[str, str], number: int, part: memoryview) -> str:
    answer = _client().upload_part(
        **upload, PartNumber=number, Body=bytes(part), ContentMD5=_md5(part)
    )
    return answer["ETag"]


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _client() -> Any:
    # Keyed by what a client is made of: the embedded server's endpoint appears while we run.
    return _client_of(_endpoint(), os.environ.get("AWS_ACCESS_KEY_ID"), os.getpid())


@lru_cache(maxsize=4)
def _client_of(endpoint: str | None, access_key: str | None, pid: int) -> Any:
    config = BotoConfig(
        retries={"max_attempts": 5, "mode": "standard"},
        connect_timeout=5,
        read_timeout=30,
        max_pool_connections=32,
        # Ceph and other stores refuse the trailing checksums that are the SDK's default.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    region = os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION") or "us-east-1"
    # A session of its own: boto3's default one would keep the first keys it saw.
    return boto3.Session().client("s3", endpoint_url=endpoint, region_name=region, config=config)


def arrow_filesystem() -> fs.S3FileSystem:
    """pyarrow's S3 filesystem at the endpoint of the environment."""
    # Each as pyarrow finds it when a filesystem is made.
    names = ("AWS_ACCESS_KEY_ID", "AWS_REQUEST_CHECKSUM_CALCULATION")
    return _filesystem_of(_endpoint(), tuple(map(os.environ.get, names)), os.getpid())


@lru_cache(maxsize=4)
def _filesystem_of(
    endpoint: str | None, found: tuple[str | None, ...], pid: int
) -> fs.S3FileSystem:
    region = os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION")
    if endpoint is None:
        return fs.S3FileSystem(region=region)
    scheme, host, *_ = urlsplit(endpoint)
    return fs.S3FileSystem(
        endpoint_override=host, scheme=scheme, region=region or "us-east-1", connect_timeout=5
    )
