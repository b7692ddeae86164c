"""Prepared data: Parquet shards, the manifest that lists them, the quarantine beside them.

Columns of a shard:
    image_id   int64          position of the image in the raw data set
    filename   string         its name there
    image      binary         the encoded image
    captions   list<string>   all of them, in their order
    label      string         its class, in the zero-shot split; else null
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from clip_ray.errors import RunError
from clip_ray.storage import Storage, arrow_filesystem

SCHEMA_VERSION = 2
MANIFEST_KEY = "manifest.json"
QUARANTINE_KEY = "quarantine.parquet"
SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("filename", pa.string()),
        ("image", pa.binary()),
        ("captions", pa.list_(pa.string())),
        ("label", pa.string()),
    ]
)

QUARANTINE_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("name", "split", "reason", "detail", "sha256")]
)


class Quarantined(BaseModel):
    """A record that could not be used, and why."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str  # the image's file name, or FILE:LINE of an annotation
    split: str | None
    reason: str
    detail: str
    sha256: str | None  # of the image's bytes, where there are any


class Shard(BaseModel):
    """One Parquet file."""

    model_config = ConfigDict(extra="forbid")

    key: str
    rows: int
    row_group_rows: int
    size_bytes: int
    sha256: str


class Manifest(BaseModel):
    """What a prepared data set holds. It is written last: without it there is no data set.

    `records` = all rows + quarantined + left_out, the images that have no split.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: int
    layout: str
    fingerprint: str  # of the source and of the settings that decide what the shards hold
    config: dict[str, Any]
    records: int
    quarantined: int
    left_out: list[str]
    repaired: list[str]
    splits: dict[str, list[Shard]]

    @property
    def sha256(self) -> str:
        """Of all that the shards hold."""
        parts = [f"{split} {s.sha256}" for split, shards in self.splits.items() for s in shards]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def rows(self, split: str) -> int:
        """Samples in `split`."""
        return sum(shard.rows for shard in self.splits.get(split, []))


def read_manifest(storage: Storage) -> Manifest:
    """The manifest at the root of `storage`. Raises RunError where none or another version is."""
    if not storage.exists(MANIFEST_KEY):
        raise RunError(f"{storage.root}: holds no prepared data; run `clip-ray prepare` first")
    try:
        manifest = Manifest.model_validate_json(storage.read_bytes(MANIFEST_KEY))
    except ValidationError as error:
        raise RunError(f"{storage.uri(MANIFEST_KEY)}: is not a manifest: {error}") from None
    if manifest.schema_version != SCHEMA_VERSION:
        raise RunError(
            f"{storage.uri(MANIFEST_KEY)}: has schema version {manifest.schema_version}, this "
            f"program reads {SCHEMA_VERSION}; prepare the data again under another data.name"
        )
    return manifest


def write_quarantine(storage: Storage, entries: Sequence[Quarantined]) -> None:
    """Puts the table of what could not be used."""
    buffer = io.BytesIO()
    rows = [entry.model_dump() for entry in entries]
    pq.write_table(pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA), buffer)
    storage.write_bytes(QUARANTINE_KEY, buffer.getvalue())


def read_quarantine(storage: Storage) -> list[Quarantined]:
    """What could not be used, as it was found. Raises RunError where there is no table."""
    table = pq.read_table(io.BytesIO(storage.read_bytes(QUARANTINE_KEY)))
    return [Quarantined.model_validate(row) for row in table.to_pylist()]


def read_column(storage: Storage, shards: Sequence[Shard], column: str) -> Iterator[Any]:
    """One column of all `shards`, in order, without reading the others."""
    for shard in shards:
        path = storage.arrow_path(shard.key)
        table = pq.read_table(path, columns=[column], filesystem=arrow_filesystem())
        yield from table.column(column).to_pylist()
