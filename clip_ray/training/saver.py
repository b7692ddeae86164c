"""When checkpoints are taken, and how training goes on meanwhile: one rank's side of it.

A snapshot of this rank's shard is copied to host memory; a thread uploads it. When every rank's
part is there, rank 0's thread commits. Ranks agree by their votes in each step.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from clip_ray.collectives import all_gather_objects, broadcast_object, max_over_ranks, rank
from clip_ray.config import CheckpointConfig
from clip_ray.errors import RunError
from clip_ray.storage import Storage
from clip_ray.training.checkpoint import LOG, Checkpoints, File, folder_of, new_manifest
from clip_ray.training.context import Asked
from clip_ray.training.ledger import BEST_METRIC, Entry, LeaseLost, best_first
from clip_ray.training.masters import Masters
from clip_ray.training.run import METRICS_KEY


@dataclass
class Figures:
    """What checkpoints cost so far."""

    saved: int = 0
    skipped: int = 0
    failed: int = 0
    stall_s: float = 0.0

    def as_dict(self) -> dict[str, float]:
        """For the log."""
        return {
            "checkpoints": self.saved,
            "checkpoints_skipped": self.skipped,
            "checkpoints_failed": self.failed,
            "checkpoint_stall_s": self.stall_s,
        }


@dataclass
class _Pending:
    """A checkpoint on its way: its parts uploaded by all, then committed by rank 0."""

    step: int
    epoch: int
    metrics: dict[str, float]
    folder: str
    log: bytes
    weights: dict[str, bytes]
    future: Future[Any]
    committing: bool = False
    begun_s: float = field(default_factory=time.monotonic)


class Saver:
    """Takes checkpoints while training goes on. Every rank must make and call it alike."""

    def __init__(
        self,
        run: Storage,
        config: CheckpointConfig,
        identity: dict[str, str],
        owner: str,
        attempt: int,
        say: Callable[[str], None],
    ) -> None:
        self._run, self._config, self._identity, self._say = run, config, identity, say
        self._owner, self._attempt = owner, attempt
        self._checkpoints = Checkpoints(run)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        self._last_s = time.monotonic()
        best = best_first(self._checkpoints.list()) if rank() == 0 else []
        self._best = best[0].metrics[BEST_METRIC] if best else -math.inf
        self.figures = Figures()

    def votes(self, asked: Asked) -> list[int]:
        """This rank's, for `poll`: how far its part of a checkpoint is, and what is asked of it."""
        pending = self._pending
        busy = pending is not None and not pending.future.done()
        failed = pending is not None and not busy and pending.future.exception() is not None
        minutes = self._config.every_minutes if pending is None else None
        late = minutes is not None and time.monotonic() - self._last_s > 60 * minutes
        return [busy, failed, late, asked]

    def poll(self, step: int, voted: Sequence[int]) -> tuple[Asked, bool]:
        """Moves what is on its way, once no rank's `votes` say that it is busy.

        What is asked of some rank, and whether a checkpoint is due.
        """
        busy, failed, late, asked_of_all = voted
        if self._pending is not None and not busy:
            self._advance(self._pending, bool(failed))
        every = self._config.every_steps
        due = bool(late) or asked_of_all > 0 or (every is not None and step % every == 0)
        return Asked(asked_of_all), due

    def save(
        self,
        masters: Masters,
        step: int,
        epoch: int,
        metrics: dict[str, float],
        log: list[dict[str, Any]],
        pack: Callable[[Mapping[str, Tensor]], dict[str, bytes]],
        must: bool = False,
    ) -> None:
        """A snapshot, uploaded while the caller goes on.

        Where one is on its way still, this one is skipped and counted; a `must` waits for it.
        `pack`: the files of weights/, which follow the best validated checkpoint.
        """
        if self._pending is not None:
            if not must:
                self.figures.skipped += 1
                return
            self._await_pending()
        started_s = time.monotonic()
        weights: Mapping[str, Tensor] = {}
        if metrics and broadcast_object(metrics[BEST_METRIC] >= self._best):  # rank 0 knows
            with masters.averaged():
                weights = masters.weights()
        fragments, folder = masters.fragments(), folder_of(step, self._attempt)
        lines = "".join(json.dumps(entry) + "\n" for entry in log).encode()
        self._pending = _Pending(
            step=step,
            epoch=epoch,
            metrics=metrics,
            folder=folder,
            log=lines,
            weights=pack(weights) if weights and rank() == 0 else {},
            future=self._pool.submit(self._checkpoints.write_part, folder, rank(), fragments),
        )
        self._last_s = time.monotonic()
        self.figures.stall_s += self._last_s - started_s

    def finish(self) -> None:
        """Waits until nothing is on its way. Raises RunError where it could not be saved."""
        failed_before = self.figures.failed
        self._await_pending()
        if self.figures.failed > failed_before:
            raise RunError("the last checkpoint could not be saved: see above")

    def _await_pending(self) -> None:
        while self._pending is not None:
            self._pending.future.exception()  # waits
            self.poll(0, max_over_ranks(self.votes(Asked.NOTHING)))

    def _advance(self, pending: _Pending, failed: bool) -> None:
        """All ranks are through with an upload, or rank 0 with the commit."""
        error = pending.future.exception()
        if failed:
            self._pending = None
            self.figures.failed += 1
            if isinstance(error, LeaseLost):
                raise error
            if error is not None:
                self._say(f"checkpoint: step {pending.step} is not saved: {error}")
        elif pending.committing:
            self._pending = None
            self.figures.saved += 1
            self._best = max(self._best, pending.metrics.get(BEST_METRIC, -math.inf))
            if rank() == 0:
                self._say(_saved(pending, pending.future.result()))
        else:
            files = all_gather_objects(pending.future.result())
            pending.committing = True
            pending.future = self._pool.submit(self._commit, pending, files)

    def _commit(self, pending: _Pending, files: list[File]) -> Entry | None:
        if rank() != 0:
            return None
        self._checkpoints.ledger.check(self._owner, self._attempt)
        for name, data in pending.weights.items():
            self._run.write_bytes(f"weights/{name}", data)
        self._run.write_bytes(METRICS_KEY, pending.log)
        log = self._checkpoints.write_file(pending.folder, LOG, pending.log)
        manifest = new_manifest(
            pending.step, pending.epoch, pending.metrics, self._identity, [*files, log]
        )
        entry = self._checkpoints.commit(self._owner, self._attempt, pending.folder, manifest)
        try:
            self._checkpoints.retain(self._owner, self._attempt, self._config)
        except LeaseLost:
            raise
        except RunError as error:  # what is left is removed after the next one
            self._say(f"checkpoint: older ones could not be removed: {error}")
        return entry


def _saved(pending: _Pending, entry: Entry) -> str:
    took_s = time.monotonic() - pending.begun_s
    return (
        f"checkpoint: step {entry.step} saved, {entry.size_bytes / 2**20:.1f} MiB in {took_s:.1f} s"
    )
