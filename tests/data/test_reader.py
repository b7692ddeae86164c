"""Rows come through the node's cache: shared, bounded, and patient with storage."""

from __future__ import annotations

import io
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulty_proxy import Fault, faulty_proxy

from clip_ray.data import reader as reader_module
from clip_ray.data.reader import ShardReader
from clip_ray.data.shards import SCHEMA, Shard
from clip_ray.errors import RunError
from clip_ray.storage import Storage

pytestmark = pytest.mark.s3
GROUP_ROWS, IMAGE_BYTES = 4, 10_000


def shards_of(storage: Storage, rows_of_shards: tuple[int, ...]) -> list[Shard]:
    shards, first = [], 0
    for number, rows in enumerate(rows_of_shards):
        table = [
            {"image_id": i, "filename": f"{i}.jpg", "image": bytes([i]) * IMAGE_BYTES,
             "captions": [f"caption {i}"], "label": None}
            for i in range(first, first + rows)
        ]  # fmt: skip
        buffer = io.BytesIO()
        pq.write_table(
            pa.Table.from_pylist(table, schema=SCHEMA), buffer, row_group_size=GROUP_ROWS,
            compression="none", use_dictionary=False, write_page_checksum=True,
        )  # fmt: skip
        key = f"train/{number:05d}.parquet"
        storage.write_bytes(key, buffer.getvalue())
        shards.append(
            Shard(
                key=key, rows=rows, row_group_rows=GROUP_ROWS, size_bytes=0, sha256=f"{number}" * 64
            )
        )
        first += rows
    return shards


def test_any_rows_in_any_order_and_each_group_is_fetched_once(
    storage: Storage, tmp_path: Path
) -> None:
    shards = shards_of(storage, (10, 3, 6))
    reader = ShardReader(storage, shards, tmp_path, limit_bytes=1e9)
    wanted = [18, 0, 12, 9, 10, 0, 5]
    rows = list(reader.rows(wanted))
    assert [row["image_id"] for row in rows] == wanted
    assert rows[0] == {
        "image_id": 18, "filename": "18.jpg", "image": bytes([18]) * IMAGE_BYTES,
        "captions": ["caption 18"], "label": None,
    }  # fmt: skip
    assert len(list(tmp_path.glob("*.arrow"))) == 5
    for shard in shards:  # another process needs storage no more
        storage.delete(shard.key)
    again = ShardReader(storage, shards, tmp_path, limit_bytes=1e9)
    assert [row["image_id"] for row in again.rows(wanted)] == wanted


def test_readers_that_want_the_same_group_at_once_fetch_it_once(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, fetched = shards_of(storage, (40,)), []
    download = ShardReader._download

    def counted(self: ShardReader, shard: int, group: int) -> pa.Table:
        fetched.append(group)
        return download(self, shard, group)

    monkeypatch.setattr(ShardReader, "_download", counted)
    readers = [ShardReader(storage, shards, tmp_path, limit_bytes=1e9) for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        rows = list(threads.map(lambda reader: list(reader.rows(range(40))), readers))
    assert rows[0] == rows[1] == rows[2]
    assert sorted(fetched) == list(range(10))


def test_the_cache_keeps_to_its_size(storage: Storage, tmp_path: Path) -> None:
    reader = ShardReader(storage, shards_of(storage, (40,)), tmp_path, limit_bytes=150_000)
    for index in range(40):
        (row,) = reader.rows([index])
        assert row["image"] == bytes([index]) * IMAGE_BYTES
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 150_000


def test_prefetch_brings_groups_before_they_are_asked_for(storage: Storage, tmp_path: Path) -> None:
    shards = shards_of(storage, (8,))
    reader = ShardReader(storage, shards, tmp_path, limit_bytes=1e9)
    reader.prefetch([1, 2, 6])
    reader._fetchers.shutdown(wait=True)
    assert len(list(tmp_path.glob("*.arrow"))) == 2


def test_a_shard_that_stays_unreadable_is_named(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "FIRST_PAUSE_S", 0.01)
    shards = shards_of(storage, (8,))
    data = bytearray(storage.read_bytes(shards[0].key))
    data[30_000] ^= 0xFF  # a flipped bit within an image: the page's checksum tells
    storage.write_bytes(shards[0].key, bytes(data))
    reader = ShardReader(storage, shards, tmp_path, limit_bytes=1e9)
    message = r"train/00000\.parquet: row group 0 cannot be read after 6 attempts"
    with pytest.raises(RunError, match=message):
        list(reader.rows([0]))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_is_read_around(storage: Storage, tmp_path: Path) -> None:
    shards = shards_of(storage, (40,))
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(tmp_path)]
    subprocess.run(mount, check=True, timeout=10)
    try:
        reader = ShardReader(storage, shards, tmp_path, limit_bytes=1e9)
        assert [row["image_id"] for row in reader.rows(range(40))] == list(range(40))
        assert [row["image_id"] for row in reader.rows([39, 0])] == [39, 0]
        assert 0 < len(list(tmp_path.glob("*.arrow"))) < 10
        assert not list(tmp_path.glob("*.part"))
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True, timeout=10)


@pytest.mark.parametrize("fault", ["503", "reset"])
def test_storage_that_fails_for_a_while_is_waited_for(
    fault: Fault, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = shards_of(storage, (40,))
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        reader = ShardReader(storage, shards, tmp_path, limit_bytes=1e9)
        assert [row["image_id"] for row in reader.rows([0])] == [0]
        proxy.fail(fault, seconds=2)
        wanted = [39, 5, 17, 30]
        assert [row["image_id"] for row in reader.rows(wanted)] == wanted
        assert proxy.refused > 0
