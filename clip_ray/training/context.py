"""What the training loop needs from whoever runs it: Ray, or a plain process in a debugger."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Any, Protocol

from numpy.typing import NDArray


class Asked(enum.IntEnum):
    """What somebody outside wants of the run at its next step; the strongest wish counts.

    LEAVE: a worker's process or node is about to end, and the run shall go on without it.
    """

    NOTHING = 0
    CHECKPOINT = 1
    LEAVE = 2
    STOP = 3


class WorkerContext(Protocol):
    """A worker's view of its run.

    `owner` is the holder of the run's lease, whose worker it is; `node` where the worker is.
    `decided`: somebody decides at each report how the run goes on, from the checkpoint of it.
    """

    owner: str
    node: str
    decided: bool

    def micro_batches(self, steps: range) -> Iterator[dict[str, NDArray[Any]]]:
        """This rank's micro batches (data.stream) of these steps."""
        ...

    def progress(self, state: dict[str, Any]) -> None:
        """Shows where training is. Called by rank 0, often; must not wait."""
        ...

    def say(self, line: str) -> None:
        """Says a line to who started the run."""
        ...

    def asked(self) -> Asked:
        """What is wanted of the run since the last call. Called in each step; must not wait."""
        ...

    def report(self, metrics: dict[str, float]) -> None:
        """Hands on an epoch's metrics; where that is `decided`, waits until they were heard.

        Every rank must call it, equally often.
        """
        ...
