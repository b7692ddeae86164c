"""Between the driver and its workers: what they say and how far they are; what is asked of them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clip_ray.training.context import Asked
from clip_ray.training.progress import Progress

POLL_S = 1.0


@ray.remote(num_cpus=0)
class Board:
    """Where workers pin their progress and lines to say, and the driver what it wants of them."""

    def __init__(self) -> None:
        self._notes: list[dict[str, Any] | str] = []
        self._asked = Asked.NOTHING
        self._waits_since_s: float | None = None

    def put(self, note: dict[str, Any] | str) -> None:
        """Pins progress, or a line."""
        self._notes.append(note)

    def take(self) -> list[dict[str, Any] | str]:
        """What has been pinned since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def ask(self, wish: int) -> None:
        """Pins what is wanted of the run."""
        self._asked = Asked(wish)

    def asked(self) -> int:
        """What is wanted of the run."""
        return int(self._asked)

    def waits(self, waits: bool) -> None:
        """Pins whether the run waits for its workers to start."""
        if not waits:
            self._waits_since_s = None
        elif self._waits_since_s is None:
            self._waits_since_s = time.monotonic()

    def waited_s(self) -> float:
        """For how long the run has waited for its workers by now."""
        return 0.0 if self._waits_since_s is None else time.monotonic() - self._waits_since_s


@contextlib.contextmanager
def board_of(interval_s: float, say: Callable[[str], None]) -> Iterator[Any]:
    """A board whose notes a thread of the driver shows until the block ends."""
    # On the driver's own node: it must not be lost with a worker's.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board: Any = Board.options(scheduling_strategy=here).remote()
    progress, stop = Progress(interval_s), threading.Event()

    def show() -> None:
        ended = False
        while not ended:
            ended = stop.wait(POLL_S)
            try:
                notes = ray.get(board.take.remote(), timeout=10)
            except Exception:  # progress must never end a run
                continue
            for note in notes:
                say(note) if isinstance(note, str) else progress.show(note)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield board
    finally:
        stop.set()
        thread.join(timeout=15)
        progress.close()
        ray.kill(board)
