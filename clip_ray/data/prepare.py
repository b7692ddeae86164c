"""The prepare job: raw Flickr30k in, Parquet shards and a manifest in S3 out, by Ray Data."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from clip_ray.config import DataConfig
from clip_ray.data.flickr30k import (
    KARPATHY_FILE,
    TOKEN_FILE,
    Record,
    read_class_folders,
    read_flickr30k,
)
from clip_ray.data.shards import (
    MANIFEST_KEY,
    SCHEMA,
    SCHEMA_VERSION,
    Manifest,
    Rejected,
    Shard,
    read_manifest,
)
from clip_ray.data.transforms import decode_rgb
from clip_ray.errors import RunError
from clip_ray.storage import Storage

ZERO_SHOT_SPLIT = "zero_shot"
MAX_REJECTED_SHARE = 0.01


def is_prepared(config: DataConfig, storage: Storage) -> bool:
    """Whether `storage` holds this very source, prepared. Raises RunError if it holds another."""
    if not storage.exists(MANIFEST_KEY):
        return False
    if read_manifest(storage).source_sha256 != _fingerprint(config):
        raise RunError(
            f"{storage.root}: holds data prepared from another source or with other settings; "
            "give data.name a new value, or remove it"
        )
    return True


def prepare(config: DataConfig, storage: Storage, say: Callable[[str], None]) -> Manifest:
    """Writes the shards of every split, then the manifest. Needs a running Ray.

    An image that cannot be decoded is left out and listed in the manifest. Raises RunError above
    MAX_REJECTED_SHARE of such images, and where a split is empty.
    """
    fingerprint = _fingerprint(config)
    splits, left_out = read_flickr30k(Path(config.source or ""))
    if config.zero_shot_source:
        splits[ZERO_SHOT_SPLIT] = read_class_folders(Path(config.zero_shot_source))
    plans = [plan for split in splits for plan in _plan_shards(split, splits[split], config)]
    results = (
        ray.data.from_items(plans, override_num_blocks=len(plans))
        .map(partial(_write_shard, root=storage.root, row_group_rows=config.row_group_rows))
        .iter_rows()
    )
    shards: dict[str, dict[str, Shard]] = {split: {} for split in splits}
    rejected: list[Rejected] = []
    for done, result in enumerate(results, 1):
        shard = Shard.model_validate(result["shard"])
        shards[result["split"]][shard.key] = shard
        rejected += [Rejected.model_validate(item) for item in result["rejected"]]
        say(f"prepare: shard {done}/{len(plans)}: {shard.key}, {shard.rows} images")
    _check_share(rejected, sum(map(len, splits.values())))
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        source_sha256=fingerprint,
        splits={split: [found[key] for key in sorted(found)] for split, found in shards.items()},
        rejected=rejected,
        left_out=left_out,
    )
    storage.write_bytes(MANIFEST_KEY, manifest.model_dump_json(indent=2).encode())
    return manifest


def _plan_shards(split: str, records: Sequence[Record], config: DataConfig) -> list[dict[str, Any]]:
    """Cuts a split's records into shards of about the target size, by the files' sizes."""
    target_bytes = config.shard_size_mib * 2**20
    shards: list[list[dict[str, Any]]] = []
    filled = target_bytes
    for image_id, record in enumerate(records):
        if filled >= target_bytes:
            shards.append([])
            filled = 0
        row = {"image_id": image_id, "path": record.path, "filename": record.filename}
        shards[-1].append(row | {"captions": list(record.captions), "label": record.label})
        path = Path(record.path)
        filled += path.stat().st_size if path.exists() else 0
    if not shards:
        raise RunError(f"the split {split!r} has no images (data.source)")
    return [
        {"split": split, "key": f"{split}/{number:05d}.parquet", "records": rows}
        for number, rows in enumerate(shards)
    ]


def _write_shard(plan: dict[str, Any], root: str, row_group_rows: int) -> dict[str, Any]:
    rows, rejected = [], []
    for record in plan["records"]:
        try:
            data = Path(record["path"]).read_bytes()
            decode_rgb(data)
        except Exception as error:  # Pillow raises a dozen kinds on broken files
            reason = f"{type(error).__name__}: {error}"
            rejected.append({"filename": record["filename"], "reason": reason})
            continue
        rows.append({field: record.get(field) for field in SCHEMA.names if field != "image"})
        rows[-1]["image"] = data
    buffer = io.BytesIO()
    # The images are compressed already.
    pq.write_table(
        pa.Table.from_pylist(rows, schema=SCHEMA), buffer, row_group_size=row_group_rows,
        compression="none", use_dictionary=False,
    )  # fmt: skip
    data = buffer.getvalue()
    Storage(root).write_bytes(plan["key"], data)
    shard = Shard(
        key=plan["key"],
        rows=len(rows),
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )
    return {"split": plan["split"], "shard": shard.model_dump(), "rejected": rejected}


def _check_share(rejected: Sequence[Rejected], total: int) -> None:
    if len(rejected) > MAX_REJECTED_SHARE * total:
        first = rejected[0]
        raise RunError(
            f"{len(rejected)} of {total} images cannot be used, more than "
            f"{MAX_REJECTED_SHARE:.0%}; the first is {first.filename}: {first.reason}"
        )


def _fingerprint(config: DataConfig) -> str:
    """Of the annotations and of the settings that decide what the shards hold."""
    if config.source is None:
        raise RunError("data.source is null: name the folder with the raw data set")
    digest = hashlib.sha256(
        f"{SCHEMA_VERSION} {config.shard_size_mib} {config.row_group_rows}".encode()
    )
    for name in (TOKEN_FILE, KARPATHY_FILE):
        path = Path(config.source) / name
        try:
            digest.update(path.read_bytes())
        except OSError as error:
            raise RunError(f"{path}: cannot be read: {error.strerror} (data.source)") from None
    return digest.hexdigest()
