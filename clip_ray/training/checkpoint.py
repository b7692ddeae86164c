"""Checkpoints of a run in S3: files first, verified; the manifest; last, its entry in the ledger.

State is data only, in fragments `NAME@OFFSET` of the flattened tensor NAME, one safetensors file
for each rank: what is read does not depend on the world size or the ZeRO stage that wrote it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from clip_ray.config import CheckpointConfig
from clip_ray.errors import RunError
from clip_ray.storage import Storage
from clip_ray.training.ledger import BEST_METRIC, Entry, Ledger, best_first

MANIFEST, LOG = "manifest.json", "metrics.jsonl"
FOLDERS = "checkpoints/step-"
_VERSIONED = ("clip-ray", "torch", "deepspeed")


class File(BaseModel):
    """One object of a checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    size_bytes: int
    sha256: str


class CheckpointManifest(BaseModel):
    """What a checkpoint holds. `identity`: what a resumed run must have in common with it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    epoch: int
    metrics: dict[str, float]
    identity: dict[str, str]
    versions: dict[str, str]
    files: tuple[File, ...]


@dataclass(frozen=True)
class Checkpoint:
    """One that has been read: the whole tensors by name, and the log up to its step."""

    manifest: CheckpointManifest
    tensors: dict[str, Tensor]
    log: list[dict[str, Any]]


class Checkpoints:
    """The checkpoints under a run's root."""

    def __init__(self, run: Storage) -> None:
        self._run = run
        self.ledger = Ledger(run)

    def list(self) -> tuple[Entry, ...]:
        """The complete ones, by step."""
        return self.ledger.read().checkpoints

    def newest(self) -> Entry | None:
        """The last one; None where there is none."""
        return next(reversed(self.list()), None)

    def manifest(self, entry: Entry) -> CheckpointManifest:
        """Raises RunError where it is not what was committed."""
        key = f"{entry.folder}/{MANIFEST}"
        data = self._read_verified(key, entry.manifest_sha256)
        try:
            return CheckpointManifest.model_validate_json(data)
        except ValidationError as error:
            raise RunError(f"{self._run.uri(key)}: is of another version: {error}") from None

    def read(self, entry: Entry) -> Checkpoint:
        """All of it. Raises RunError, with the object's name, where something is not as written."""
        manifest, parts, log = self.manifest(entry), [], []
        for file in manifest.files:
            key = f"{entry.folder}/{file.name}"
            data = self._read_verified(key, file.sha256)
            if file.name == LOG:
                log = [json.loads(line) for line in data.decode().splitlines()]
                continue
            try:
                parts.append(load(data))
            except SafetensorError as error:
                raise RunError(f"{self._run.uri(key)}: is no safetensors file: {error}") from None
        return Checkpoint(manifest, merge_fragments(parts), log)

    def write_part(self, folder: str, rank: int, fragments: Mapping[str, Tensor]) -> File:
        """One rank's file. Raises RunError where the store does not hold it as it was sent."""
        return self.write_file(folder, f"part-{rank:05d}.safetensors", save(dict(fragments)))

    def write_file(self, folder: str, name: str, data: bytes) -> File:
        """One object of a checkpoint, verified."""
        self._run.write_in_parts(f"{folder}/{name}", data)
        return File(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    def commit(self, owner: str, attempt: int, folder: str, manifest: CheckpointManifest) -> Entry:
        """Makes the files of `folder` a checkpoint. Called by rank 0. Raises RunError, LeaseLost.

        Every object must be there in its full size; then the manifest is put, then its entry.
        """
        there = dict(self._run.sizes(f"{folder}/"))
        for file in manifest.files:
            size_bytes = there.get(f"{folder}/{file.name}")
            if size_bytes != file.size_bytes:
                raise RunError(
                    f"{self._run.uri(folder)}/{file.name}: holds {size_bytes} bytes of "
                    f"{file.size_bytes}; the checkpoint is not committed"
                )
        written = self.write_file(folder, MANIFEST, manifest.model_dump_json(indent=1).encode())
        entry = Entry(
            step=manifest.step,
            epoch=manifest.epoch,
            metrics=manifest.metrics,
            size_bytes=sum(file.size_bytes for file in manifest.files),
            folder=folder,
            manifest_sha256=written.sha256,
        )
        self.ledger.commit(owner, attempt, entry)
        return entry

    def retain(self, owner: str, attempt: int, config: CheckpointConfig) -> None:
        """Removes what the config does not keep, and what was left incomplete until this attempt.

        Entries go first: what is no longer in the ledger is nobody's. What a later attempt uploads
        is not touched, should the lease be lost meanwhile. Called by the lease's holder while it
        uploads nothing. Raises LeaseLost.
        """
        entries = self.list()
        gone = {entry.folder for entry in entries} - kept_folders(entries, config)
        state = self.ledger.forget(owner, attempt, gone)
        needed = {entry.folder for entry in state.checkpoints}

        def is_left(key: str) -> bool:
            folder = key.rpartition("/")[0]
            return folder not in needed and _place(folder)[1] <= attempt

        for key in filter(is_left, list(self._run.keys(FOLDERS))):
            self._run.delete(key)
        self._run.abort_uploads(FOLDERS, is_left)

    def _read_verified(self, key: str, sha256: str) -> bytes:
        data = self._run.read_bytes(key)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise RunError(f"{self._run.uri(key)}: is damaged: its checksum is not the manifest's")
        return data


@dataclass(frozen=True)
class CheckpointLine:
    """A line of the listing: a checkpoint, or what an upload that did not end has left."""

    folder: str
    step: int
    epoch: int | None
    recall_at_1: float | None
    size_bytes: int
    complete: bool

    def __str__(self) -> str:
        recall = "-" if self.recall_at_1 is None else f"{self.recall_at_1:.1%}"
        complete = "complete" if self.complete else "incomplete"
        epoch = "-" if self.epoch is None else self.epoch
        size = f"{self.size_bytes / 2**20:.1f} MiB"
        return (
            f"step {self.step:8}  epoch {epoch!s:>4}  val R@1 {recall:>6}  {size:>12}  {complete}"
        )


def list_checkpoints(run: Storage) -> list[CheckpointLine]:
    """All folders of checkpoints by step, whether complete or not."""
    sizes: dict[str, int] = {}
    for key, size_bytes in run.sizes(FOLDERS):
        folder = key.rpartition("/")[0]
        sizes[folder] = sizes.get(folder, 0) + size_bytes
    entries = {entry.folder: entry for entry in Ledger(run).read().checkpoints}
    lines = []
    for folder in sorted(sizes.keys() | entries.keys()):
        entry = entries.get(folder)
        lines.append(
            CheckpointLine(
                folder=folder,
                step=_place(folder)[0],
                epoch=entry and entry.epoch,
                recall_at_1=entry and entry.metrics.get(BEST_METRIC),
                size_bytes=sizes.get(folder, 0),
                complete=entry is not None,
            )
        )
    return lines


def folder_of(step: int, attempt: int) -> str:
    """Where an attempt puts its checkpoint of a step: no two attempts write the same object."""
    return f"{FOLDERS}{step:08d}-{attempt:04d}"


def _place(folder: str) -> tuple[int, int]:
    """The step and the attempt of a folder."""
    step, attempt = folder.removeprefix(FOLDERS).split("-")
    return int(step), int(attempt)


def new_manifest(
    step: int, epoch: int, metrics: dict[str, float], identity: dict[str, str], files: list[File]
) -> CheckpointManifest:
    """A manifest of these files, made by the versions installed."""
    return CheckpointManifest(
        step=step,
        epoch=epoch,
        metrics=metrics,
        identity=identity,
        versions=_versions(),
        files=tuple(files),
    )


def other_versions(manifest: CheckpointManifest) -> list[str]:
    """A line for each library whose version has changed: the run goes on, if not bit for bit."""
    return [
        f"the checkpoint was made with {name} {manifest.versions.get(name)}, this is {now}: "
        "the run goes on, but not bit for bit"
        for name, now in _versions().items()
        if manifest.versions.get(name) != now
    ]


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _VERSIONED}


def kept_folders(entries: tuple[Entry, ...], config: CheckpointConfig) -> set[str]:
    """The newest `keep_last`, the `keep_best` best, and those whose step `keep_every` divides."""
    kept = {entry.folder for entry in entries[-config.keep_last :]}
    kept |= {entry.folder for entry in best_first(entries)[: config.keep_best]}
    if config.keep_every is not None:
        kept |= {entry.folder for entry in entries if entry.step % config.keep_every == 0}
    return kept


def merge_fragments(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by name, in one dimension where they were in fragments `NAME@OFFSET`."""
    whole: dict[str, Tensor] = {}
    pieces: dict[str, dict[int, Tensor]] = {}
    for part in parts:
        for key, tensor in part.items():
            name, at, offset = key.rpartition("@")
            if at:
                pieces.setdefault(name, {})[int(offset)] = tensor
            else:
                whole[key] = tensor
    for name, by_offset in pieces.items():
        ordered = [by_offset[offset] for offset in sorted(by_offset)]
        whole[name] = ordered[0] if len(ordered) == 1 else torch.cat(ordered)
    return whole


def check_identity(manifest: CheckpointManifest, identity: dict[str, str]) -> None:
    """Raises RunError, with the differences, where a config cannot continue this run."""
    changed = [
        f"{field} was {manifest.identity.get(field)}, is {value}"
        for field, value in identity.items()
        if manifest.identity.get(field) != value
    ]
    if changed:
        raise RunError(
            "the run has checkpoints made with another config: "
            + "; ".join(changed)
            + "; take another `name`, or the old values"
        )
