"""Prepared data: Parquet shards, the manifest that lists them, and reads of single rows.

Columns of a shard:
    image_id   int64          position of the image in the raw data set
    filename   string         its name there
    image      binary         the encoded image
    captions   list<string>   all of them, in their order
    label      string         its class, in the zero-shot split; else null
"""

from __future__ import annotations

import bisect
import hashlib
import io
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
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


class ShardReader:
    """Reads rows of a split by their index, a row group at a time, the latest ones cached."""

    def __init__(self, storage: Storage, shards: Sequence[Shard], cache_bytes: int) -> None:
        self._storage = storage
        self._shards = shards
        self._starts = [0, *itertools.accumulate(shard.rows for shard in shards)]
        self._files: dict[int, tuple[pq.ParquetFile, list[int]]] = {}
        self._cache: OrderedDict[tuple[int, int], list[dict[str, Any]]] = OrderedDict()
        self._cached_bytes: dict[tuple[int, int], int] = {}
        self._cache_bytes = cache_bytes

    def __len__(self) -> int:
        return self._starts[-1]

    def rows(self, indices: Iterable[int]) -> Iterator[dict[str, Any]]:
        """The rows at `indices`, in that order, each a dict of SCHEMA's columns."""
        for index in indices:
            shard = bisect.bisect_right(self._starts, index) - 1
            row = index - self._starts[shard]
            _, group_starts = self._file(shard)
            group = bisect.bisect_right(group_starts, row) - 1
            yield self._group(shard, group)[row - group_starts[group]]

    def _group(self, shard: int, group: int) -> list[dict[str, Any]]:
        place = (shard, group)
        if place in self._cache:
            self._cache.move_to_end(place)
            return self._cache[place]
        table = self._file(shard)[0].read_row_group(group)
        self._cache[place] = table.to_pylist()
        self._cached_bytes[place] = table.nbytes
        while len(self._cache) > 1 and sum(self._cached_bytes.values()) > self._cache_bytes:
            oldest, _ = self._cache.popitem(last=False)
            del self._cached_bytes[oldest]
        return self._cache[place]

    def _file(self, shard: int) -> tuple[pq.ParquetFile, list[int]]:
        if shard not in self._files:
            path = self._storage.arrow_path(self._shards[shard].key)
            file = pq.ParquetFile(path, filesystem=arrow_filesystem(), pre_buffer=True)
            metadata = file.metadata
            counts = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
            self._files[shard] = file, [0, *itertools.accumulate(counts)][:-1]
        return self._files[shard]


def read_column(storage: Storage, shards: Sequence[Shard], column: str) -> Iterator[Any]:
    """One column of all `shards`, in order, without reading the others."""
    for shard in shards:
        path = storage.arrow_path(shard.key)
        table = pq.read_table(path, columns=[column], filesystem=arrow_filesystem())
        yield from table.column(column).to_pylist()
