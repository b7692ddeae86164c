"""Rows of a split by their index, through a cache of row groups on the node's own disk.

Each row group is fetched from storage once per node, in one range read, and kept as an Arrow file
that all reader processes map: a row costs no copy, and memory is the page cache's. The oldest files
go when the cache is full.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import fcntl
import itertools
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clip_ray.config import DataConfig
from clip_ray.data.shards import SCHEMA, Shard
from clip_ray.errors import RunError
from clip_ray.storage import Storage, arrow_filesystem

# Of a row group: from a row in it to the row's value in a column.
Columns = dict[str, Callable[[int], Any]]
ATTEMPTS = 6
FIRST_PAUSE_S = 0.5
FETCHERS = 4
# Of the node, for groups with different numbers.
LOCKS = 64
# Row groups that stay mapped from one call to the next.
MAPPED = 256


class ShardReader:
    """Reads rows at any index; safe to use from several processes and threads at once."""

    def __init__(
        self, storage: Storage, shards: Sequence[Shard], folder: Path, limit_bytes: float
    ) -> None:
        self._storage, self._shards = storage, shards
        self._folder, self._limit_bytes = folder, limit_bytes
        self._starts = [0, *itertools.accumulate(shard.rows for shard in shards)]
        self._files = threading.local()  # a ParquetFile is not for two threads
        self._mapped: dict[tuple[int, int], Columns] = {}
        self._fetchers = ThreadPoolExecutor(FETCHERS, thread_name_prefix="fetch")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def __len__(self) -> int:
        return self._starts[-1]

    def rows(
        self, indices: Iterable[int], columns: Sequence[str] = tuple(SCHEMA.names)
    ) -> Iterator[dict[str, Any]]:
        """The rows at `indices`, in that order, each a dict of `columns`; bytes as memoryviews.

        Raises RunError, which names the shard, where storage does not give it after retries.
        """
        places = [self._place(index) for index in indices]
        groups = self._row_groups({(shard, group) for shard, group, _ in places})
        for shard, group, row in places:
            there = groups[shard, group]
            yield {name: there[name](row) for name in columns}

    def prefetch(self, indices: Iterable[int]) -> None:
        """Fetches the row groups of these rows in the background, if they are not there."""
        groups = {self._place(index)[:2] for index in indices}
        for place in groups:
            if not self._path(*place).exists():
                self._fetchers.submit(self._fetch, *place)

    def _row_groups(self, places: set[tuple[int, int]]) -> dict[tuple[int, int], Columns]:
        mapped = self._mapped  # another thread may put its own in its place
        found = {place: mapped[place] for place in places & mapped.keys()}
        here = [place for place in places - found.keys() if self._path(*place).exists()]
        found |= {place: self._map(place) for place in here}
        missing = list(places - found.keys())
        found |= zip(missing, self._fetchers.map(self._map, missing), strict=True)
        newest_last = {place: mapped[place] for place in mapped if place not in found} | found
        self._mapped = dict(list(newest_last.items())[-MAPPED:])
        return found

    def _place(self, index: int) -> tuple[int, int, int]:
        """Shard, row group, and row in it. All row groups but a shard's last have one size."""
        shard = bisect.bisect_right(self._starts, index) - 1
        group, row = divmod(index - self._starts[shard], self._shards[shard].row_group_rows)
        return shard, group, row

    def _path(self, shard: int, group: int) -> Path:
        return self._folder / f"{self._shards[shard].sha256[:32]}-{group:05d}.arrow"

    def _map(self, place: tuple[int, int]) -> Columns:
        for _ in range(ATTEMPTS):
            with contextlib.suppress(FileNotFoundError):  # another process made room for its own
                file = pa.ipc.open_file(pa.memory_map(str(self._path(*place))))
                return _columns(file.get_batch(0))
            try:
                self._fetch(*place)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                # The disk is full: slower, since the next reader fetches it again, but it goes on.
                return _columns(self._download(*place).combine_chunks().to_batches()[0])
        raise RunError(
            f"{self._folder}: row groups go as soon as they come; data.cache_mib must be larger"
        )

    def _fetch(self, shard: int, group: int) -> None:
        path = self._path(shard, group)
        with self._turn(group):
            if not path.exists():
                self._keep(self._download(shard, group), path)

    @contextlib.contextmanager
    def _turn(self, group: int) -> Iterator[None]:
        """Of one thread of the node at a time, or all readers would fetch their first groups."""
        with (self._folder / f"{group % LOCKS:02d}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the file, or with the process
            yield

    def _keep(self, table: pa.Table, path: Path) -> None:
        self._make_room(table.nbytes)
        descriptor, temporary = tempfile.mkstemp(dir=self._folder, suffix=".part")
        os.close(descriptor)
        try:
            with pa.OSFile(temporary, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_batch(table.combine_chunks().to_batches()[0])
            Path(temporary).replace(path)
        finally:
            Path(temporary).unlink(missing_ok=True)

    def _download(self, shard: int, group: int) -> pa.Table:
        pause_s, key = FIRST_PAUSE_S, self._shards[shard].key
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._file(shard).read_row_group(group, use_threads=False)
            except (OSError, pa.ArrowException) as error:
                vars(self._files).clear()
                if attempt == ATTEMPTS:
                    raise RunError(
                        f"{self._storage.uri(key)}: row group {group} cannot be read after "
                        f"{ATTEMPTS} attempts: {str(error).splitlines()[0]}"
                    ) from None
                time.sleep(pause_s)
                pause_s *= 2
        raise AssertionError

    def _file(self, shard: int) -> pq.ParquetFile:
        files = vars(self._files)
        name = f"shard {shard}"
        if name not in files:
            files[name] = pq.ParquetFile(
                self._storage.arrow_path(self._shards[shard].key),
                filesystem=arrow_filesystem(),
                pre_buffer=True,
                page_checksum_verification=True,
            )
        return files[name]

    def _make_room(self, wanted_bytes: int) -> None:
        """Removes the oldest files; who has one mapped keeps it until done."""
        files = []
        for entry in os.scandir(self._folder):
            with contextlib.suppress(FileNotFoundError):
                files.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
        excess_bytes = sum(size for _, size, _ in files) + wanted_bytes - self._limit_bytes
        for _, size, path in sorted(files):
            if excess_bytes <= 0:
                break
            if path.endswith(".arrow"):
                Path(path).unlink(missing_ok=True)
                excess_bytes -= size


def _columns(batch: pa.RecordBatch) -> Columns:
    return {name: _values(batch.column(name)) for name in batch.schema.names}


def _values(array: pa.Array) -> Callable[[int], Any]:
    if not pa.types.is_binary(array.type):
        return lambda row: array[row].as_py()
    # Views, since a scalar of Arrow would hold a copy.
    _, offsets, data = array.buffers()
    assert offsets is not None and data is not None
    ends = memoryview(offsets).cast("B").cast("i")[array.offset :]
    content = memoryview(data).cast("B")
    return lambda row: content[ends[row] : ends[row + 1]]


def open_reader(config: DataConfig, storage: Storage, shards: Sequence[Shard]) -> ShardReader:
    """A reader of `shards` with the cache that the config names, or the user's on this node."""
    folder = config.cache_dir or str(Path(tempfile.gettempdir()) / f"clip-ray-{os.getuid()}")
    return ShardReader(storage, shards, Path(folder), config.cache_mib * 2**20)
