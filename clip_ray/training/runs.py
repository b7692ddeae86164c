"""The runs that a storage holds."""

from __future__ import annotations

from dataclasses import dataclass

from clip_ray.storage import Storage
from clip_ray.training.ledger import BEST_METRIC, Ledger


@dataclass(frozen=True)
class RunLine:
    """A line of the listing: a run's newest checkpoint, and who holds its lease."""

    name: str
    step: int | None
    epoch: int | None
    recall_at_1: float | None
    owner: str | None

    def __str__(self) -> str:
        recall = "-" if self.recall_at_1 is None else f"{self.recall_at_1:.1%}"
        step, epoch = ("-" if each is None else each for each in (self.step, self.epoch))
        owner = "" if self.owner is None else f"  trained by {self.owner}"
        return f"{self.name:32}  step {step!s:>8}  epoch {epoch!s:>4}  val R@1 {recall:>6}{owner}"


def list_runs(storage: Storage) -> list[RunLine]:
    """All runs below `storage`, by name."""
    return [_line(storage, name) for name in sorted(storage.folders("runs/"))]


def _line(storage: Storage, name: str) -> RunLine:
    state = Ledger(storage.below(f"runs/{name}")).read()
    newest = state.checkpoints[-1] if state.checkpoints else None
    return RunLine(
        name=name,
        step=newest and newest.step,
        epoch=newest and newest.epoch,
        recall_at_1=newest and newest.metrics.get(BEST_METRIC),
        owner=state.owner,
    )
