"""A run without Ray: the same loop, in this process and its group, cut where a test wants it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from engine_state import whole_state
from torch import Tensor

from clip_ray.collectives import broadcast_object, rank, world_size
from clip_ray.config import Config
from clip_ray.data.shards import read_manifest
from clip_ray.data.tokenizer import CaptionTokenizer
from clip_ray.data.unit import UnitMaker
from clip_ray.storage import Storage
from clip_ray.training.context import Asked
from clip_ray.training.ledger import Ledger
from clip_ray.training.run import make_stream_spec
from clip_ray.training.start import begin

if TYPE_CHECKING:
    from clip_ray.training.loop import Trainer


class Cut(Exception):
    """The run ends here, as if its process had died."""


class PlainContext:
    """training.context.WorkerContext in a plain process. Keeps what it saw, by step."""

    def __init__(
        self, config: Config, tokenizer: CaptionTokenizer, owner: str, cut_at: int, stop_at: int
    ) -> None:
        self._maker = UnitMaker(make_stream_spec(config, tokenizer))
        self._cut_at, self._stop_at = cut_at, stop_at
        self.owner, self.node, self.decided, self._done = owner, "here", False, 0
        self.ids: dict[int, list[int]] = {}
        self.said: list[str] = []

    def micro_batches(self, steps: range) -> Iterator[dict[str, Any]]:
        self._done = steps.start
        return self._units(steps)

    def _units(self, steps: range) -> Iterator[dict[str, Any]]:
        for step in steps:
            unit = self._maker.make(rank(), range(step, step + 1))
            self.ids[step] = unit["sample_ids"].tolist()
            yield unit

    def progress(self, state: dict[str, Any]) -> None:
        pass

    def say(self, line: str) -> None:
        self.said.append(line)

    def report(self, metrics: dict[str, float]) -> None:
        pass

    def asked(self) -> Asked:
        self._done += 1
        if self._done == self._cut_at:
            raise Cut
        return Asked.STOP if self._done == self._stop_at else Asked.NOTHING


class Ended:
    """What a run left behind on this rank."""

    def __init__(self, trainer: Trainer, context: PlainContext, say: list[str]) -> None:
        self.log = trainer.log
        self.losses = {entry["step"]: entry["loss"] for entry in trainer.log}
        self.start_step, self.ids, self.said = trainer.start_step, context.ids, say + context.said
        self.state: dict[str, Tensor] = whole_state(trainer.engine)
        self.figures = trainer.saver.figures


def plain_run(config: Config, cut_at: int = -1, stop_at: int = -1) -> Ended | None:
    """Trains on every rank of the group, from the newest checkpoint; None where it was cut."""
    from clip_ray.training.loop import Trainer

    config = config.at_world_size(world_size())
    ledger, said = Ledger(Storage(config.run_root)), []
    owner = broadcast_object(ledger.take(said.append) if rank() == 0 else None)
    try:
        manifest = read_manifest(Storage(config.data_root))
        tokenizer = broadcast_object(
            begin(config, manifest, owner, said.append) if rank() == 0 else None
        )
        context = PlainContext(config, tokenizer, owner, cut_at, stop_at)
        trainer = Trainer(config, tokenizer, context)
        trainer.train()
        return Ended(trainer, context, said)
    except Cut:
        return None
    finally:
        if rank() == 0:
            ledger.give_back(owner)
