"""What the training loop needs from whoever runs it: Ray, or a plain process in a debugger."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from numpy.typing import NDArray


class WorkerContext(Protocol):
    """A worker's view of its run."""

    def micro_batches(self, start_step: int) -> Iterator[dict[str, NDArray[Any]]]:
        """This rank's micro batches (data.stream) from `start_step` on."""
        ...

    def progress(self, state: dict[str, Any]) -> None:
        """Shows where training is. Called by rank 0, often; must not wait."""
        ...

    def say(self, line: str) -> None:
        """Says a line to who started the run. Called by rank 0."""
        ...

    def report(self, metrics: dict[str, float]) -> None:
        """Hands on an epoch's metrics. Every rank must call it, equally often."""
        ...
