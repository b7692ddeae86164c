"""Checkpoints of a run in S3. A checkpoint exists when its manifest does, and that comes last."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict
from safetensors.torch import load, save
from torch import Tensor

from clip_ray.errors import RunError
from clip_ray.storage import Storage

STATE, MANIFEST = "state.safetensors", "manifest.json"
BEST_METRIC = "image_retrieval_recall@1"


class CheckpointManifest(BaseModel):
    """What a complete checkpoint holds."""

    model_config = ConfigDict(extra="forbid")

    step: int
    epoch: int
    metrics: dict[str, float]
    size_bytes: int
    sha256: str
    # What must be the same for a resumed run to be the same run.
    identity: dict[str, str]


class Checkpoints:
    """The checkpoints under a run's root. Called by rank 0 and by drivers."""

    def __init__(self, run: Storage) -> None:
        self._storage = run

    def list(self) -> list[CheckpointManifest]:
        """The complete ones, by step."""
        found = [
            CheckpointManifest.model_validate_json(self._storage.read_bytes(key))
            for key in self._storage.keys("checkpoints/")
            if key.endswith(f"/{MANIFEST}")
        ]
        return sorted(found, key=lambda manifest: manifest.step)

    def newest(self) -> CheckpointManifest | None:
        """The last one; None where there is none."""
        return next(reversed(self.list()), None)

    def write(
        self,
        step: int,
        epoch: int,
        tensors: Mapping[str, Tensor],
        metrics: dict[str, float],
        identity: dict[str, str],
    ) -> None:
        """Puts the state, then the manifest."""
        data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        manifest = CheckpointManifest(
            step=step,
            epoch=epoch,
            metrics=metrics,
            size_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            identity=identity,
        )
        self._storage.write_bytes(_key(step, STATE), data)
        self._storage.write_bytes(_key(step, MANIFEST), manifest.model_dump_json(indent=2).encode())

    def read(self, manifest: CheckpointManifest) -> dict[str, Tensor]:
        """The state. Raises RunError where it is not what was written."""
        data = self._storage.read_bytes(_key(manifest.step, STATE))
        if hashlib.sha256(data).hexdigest() != manifest.sha256:
            raise RunError(
                f"{self._storage.uri(_key(manifest.step, STATE))}: is damaged: its checksum is not "
                "the manifest's; remove this checkpoint's manifest to resume from the one before"
            )
        return load(data)

    def prune(self, keep_last: int) -> None:
        """Removes all but the newest `keep_last` and the best, manifests first."""
        manifests = self.list()
        kept = {manifest.step for manifest in manifests[-keep_last:]}
        best = best_of(manifests)
        if best is not None:
            kept.add(best.step)
        for manifest in manifests:
            if manifest.step not in kept:
                self._storage.delete(_key(manifest.step, MANIFEST))
                self._storage.delete(_key(manifest.step, STATE))


def best_of(manifests: list[CheckpointManifest]) -> CheckpointManifest | None:
    """The one with the highest BEST_METRIC, the later of equals."""
    return max(manifests, key=lambda m: (m.metrics.get(BEST_METRIC, 0.0), m.step), default=None)


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


def _key(step: int, file: str) -> str:
    return f"checkpoints/step-{step:08d}/{file}"
