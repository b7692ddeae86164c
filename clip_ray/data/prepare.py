"""The prepare job: raw images and captions in, Parquet shards and a manifest in S3 out.

Every record ends in a shard, in the quarantine, or among those that the split leaves out; the
manifest, written last, says that the counts add up. A job that was cut goes on where it was.
"""

from __future__ import annotations

import collections
import hashlib
import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from tqdm import tqdm

from clip_ray.config import DataConfig
from clip_ray.data.images import BadImage, decode_pixels, smaller_jpeg
from clip_ray.data.records import Raw, RawRecord, fingerprint, read_raw
from clip_ray.data.shards import (
    MANIFEST_KEY,
    SCHEMA,
    SCHEMA_VERSION,
    Manifest,
    Quarantined,
    Shard,
    read_column,
    read_manifest,
    write_quarantine,
)
from clip_ray.data.source import FileRef
from clip_ray.errors import RunError
from clip_ray.storage import Storage

Say = Callable[[str], None]
SHRUNK_SPLIT = "train"


def is_prepared(config: DataConfig, storage: Storage) -> bool:
    """Whether `storage` holds this very source, prepared. Raises RunError if it holds another."""
    if not storage.exists(MANIFEST_KEY):
        return False
    if read_manifest(storage).fingerprint != fingerprint(config):
        raise RunError(
            f"{storage.root}: holds data prepared from another source or with other settings; "
            "give data.name a new value, remove it, or run `clip-ray quarantine --requeue` after a "
            "repair of the source"
        )
    return True


def prepare(config: DataConfig, storage: Storage, say: Say) -> Manifest:
    """Writes the shards of every split, then the manifest. Needs a running Ray.

    Raises RunError where more than `max_quarantined_share` of the records cannot be used, and
    where a split is empty; the quarantine is written all the same.
    """
    raw = read_raw(config, storage.below("staging"))
    plans = _plans(raw.splits, config, first={})
    for split, records in raw.splits.items():
        if not records:
            raise RunError(f"the split {split!r} has no images (data.source)")
    shards, quarantined = _run(plans, config, storage, say)
    return _finish(config, storage, raw, shards, [*raw.quarantined, *quarantined])


def requeue(config: DataConfig, storage: Storage, say: Say) -> Manifest:
    """Tries again what the shards do not hold, after a repair; adds what is right now to them."""
    before = read_manifest(storage)
    raw = read_raw(config, storage.below("staging"))
    missing = {
        split: _without(records, _prepared(storage, before, split))
        for split, records in raw.splits.items()
    }
    first = {split: _next_number(shards) for split, shards in before.splits.items()}
    shards, quarantined = _run(_plans(missing, config, first), config, storage, say)
    together = {split: [*before.splits[split], *shards[split]] for split in before.splits}
    return _finish(config, storage, raw, together, [*raw.quarantined, *quarantined])


def _prepared(storage: Storage, manifest: Manifest, split: str) -> set[str]:
    return set(read_column(storage, manifest.splits.get(split, []), "filename"))


def _next_number(shards: Sequence[Shard]) -> int:
    # Not their count: a shard whose images were all bad left a gap.
    return 1 + max((int(Path(shard.key).stem) for shard in shards), default=-1)


def _without(records: Sequence[RawRecord], done: set[str]) -> list[RawRecord]:
    return [record for record in records if record.filename not in done]


def _run(
    plans: list[dict[str, Any]], config: DataConfig, storage: Storage, say: Say
) -> tuple[dict[str, list[Shard]], list[Quarantined]]:
    """Writes what the plans say and is not there yet; shards by split, in the plans' order."""
    results = {
        plan["part"]: storage.read_json(plan["part"])
        for plan in plans
        if storage.exists(plan["part"])
    }
    if results:
        say(f"prepare: {len(results)} of {len(plans)} shards are there already")
    todo = [plan for plan in plans if plan["part"] not in results]
    if todo:
        written = (
            ray.data.from_items(todo, override_num_blocks=len(todo))
            .map(
                partial(_write_shard, root=storage.root, config_json=config.model_dump_json()),
                num_cpus=_cpus_of_a_task(),
            )
            .iter_rows()
        )
        progress = _Progress(todo, say)
        for result in written:
            results[result["part"]] = storage.read_json(result["part"])
            progress.add(result["part"])
    shards: dict[str, list[Shard]] = collections.defaultdict(list)
    quarantined: list[Quarantined] = []
    for plan in plans:
        result = results[plan["part"]]
        if result["shard"]["rows"]:
            shards[plan["split"]].append(Shard.model_validate(result["shard"]))
        quarantined += [Quarantined.model_validate(item) for item in result["quarantined"]]
    return shards, quarantined


class _Progress:
    """A line for each shard that is written: images so far, images/s, time left."""

    def __init__(self, plans: Sequence[dict[str, Any]], say: Say) -> None:
        self._images = {plan["part"]: len(plan["records"]) for plan in plans}
        self._done = self._shards = 0
        self._started_s, self._say = time.monotonic(), say

    def add(self, part: str) -> None:
        self._shards += 1
        self._done += self._images[part]
        images = sum(self._images.values())
        rate = self._done / (time.monotonic() - self._started_s)
        left = tqdm.format_interval((images - self._done) / rate)
        self._say(
            f"prepare: shard {self._shards}/{len(self._images)}, {Path(part).stem}: "
            f"{self._done}/{images} images, {rate:.0f} images/s, {left} left"
        )


def _cpus_of_a_task() -> int:
    """One core's worth: on a single machine, Ray may have been told more CPUs than it has."""
    if len(ray.nodes()) > 1:
        return 1
    return max(1, int(ray.cluster_resources().get("CPU", 0) // (os.cpu_count() or 1)))


def _finish(
    config: DataConfig,
    storage: Storage,
    raw: Raw,
    shards: dict[str, list[Shard]],
    quarantined: list[Quarantined],
) -> Manifest:
    write_quarantine(storage, quarantined)
    if len(quarantined) > config.max_quarantined_share * raw.records:
        counts = collections.Counter(entry.reason for entry in quarantined)
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        raise RunError(
            f"{len(quarantined)} of {raw.records} records cannot be used, more than "
            f"data.max_quarantined_share ({config.max_quarantined_share:.0%}): {reasons}; see "
            "`clip-ray quarantine`"
        )
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        layout=raw.layout,
        fingerprint=fingerprint(config),
        config=config.model_dump(mode="json"),
        records=raw.records,
        quarantined=len(quarantined),
        left_out=raw.left_out,
        repaired=raw.repaired,
        splits={split: shards[split] for split in raw.splits},
    )
    rows = sum(manifest.rows(split) for split in manifest.splits)
    if rows + len(quarantined) + len(raw.left_out) != raw.records:
        raise RunError(
            f"{storage.root}: {raw.records} records came in, but {rows} are in shards, "
            f"{len(quarantined)} in quarantine and {len(raw.left_out)} left out"
        )
    storage.write_bytes(MANIFEST_KEY, manifest.model_dump_json(indent=2).encode())
    for prefix in ("parts/", "staging/"):
        for key in list(storage.keys(prefix)):
            storage.delete(key)
    return manifest


def _plans(
    splits: dict[str, list[RawRecord]], config: DataConfig, first: dict[str, int]
) -> list[dict[str, Any]]:
    """Cuts each split into shards of about the target size, by the files' sizes.

    A plan's part is named by what it holds, so that only the very same work is taken as done.
    """
    plans = []
    for split, records in splits.items():
        for number, group in enumerate(_groups(records, config), first.get(split, 0)):
            rows = [record.as_row() for record in group]
            settings = f"{SCHEMA_VERSION} {config.model_dump_json(exclude={'name', 'source'})}"
            digest = hashlib.sha256(f"{settings} {rows}".encode()).hexdigest()[:16]
            plans.append(
                {
                    "split": split,
                    "key": f"{split}/{number:05d}.parquet",
                    "part": f"parts/{split}-{number:05d}-{digest}.json",
                    "records": rows,
                }
            )
    return plans


def _groups(records: Sequence[RawRecord], config: DataConfig) -> Iterator[list[RawRecord]]:
    target_bytes = config.shard_size_mib * 2**20
    group: list[RawRecord] = []
    filled = 0
    for record in records:
        group.append(record)
        filled += record.image.size_bytes
        if filled >= target_bytes:
            yield group
            group, filled = [], 0
    if group:
        yield group


def _write_shard(plan: dict[str, Any], root: str, config_json: str) -> dict[str, Any]:
    """One task: reads and checks the images of a plan, puts the shard, then its part."""
    config, storage = DataConfig.model_validate_json(config_json), Storage(root)
    rows, quarantined = [], []
    for record in plan["records"]:
        ref, data = FileRef(**record["image"]), None
        try:
            data = _read(ref)
            pixels = decode_pixels(data, config.max_pixels)
        except BadImage as error:
            quarantined.append(_quarantined(record["filename"], plan["split"], error, data))
            continue
        if plan["split"] == SHRUNK_SPLIT:
            data = smaller_jpeg(data, pixels, config.shorter_side, config.jpeg_quality)
        rows.append({**record, "image": data})
    shard = Shard(
        key=plan["key"],
        rows=len(rows),
        row_group_rows=config.row_group_rows,
        **_put(rows, plan["key"], config, storage),
    )
    result = {
        "shard": shard.model_dump(),
        "quarantined": [entry.model_dump() for entry in quarantined],
    }
    storage.write_json(plan["part"], result)
    return {"part": plan["part"]}


def _read(ref: FileRef) -> bytes:
    try:
        return ref.read()
    except Exception as error:  # a bad checksum, a file that went away, an unreadable disk
        raise BadImage("cannot be read", f"{type(error).__name__}: {error}") from None


def _quarantined(name: str, split: str, error: BadImage, data: bytes | None) -> Quarantined:
    sha256 = None if data is None else hashlib.sha256(data).hexdigest()
    return Quarantined(
        name=name, split=split, reason=error.reason, detail=error.detail, sha256=sha256
    )


def _put(
    rows: list[dict[str, Any]], key: str, config: DataConfig, storage: Storage
) -> dict[str, Any]:
    buffer = io.BytesIO()
    # The images are compressed already.
    pq.write_table(
        pa.Table.from_pylist(rows, schema=SCHEMA), buffer, row_group_size=config.row_group_rows,
        compression="none", use_dictionary=False, write_page_checksum=True,
    )  # fmt: skip
    data = buffer.getvalue()
    storage.write_bytes(key, data)
    return {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
