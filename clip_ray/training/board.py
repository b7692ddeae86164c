"""Between the driver and its workers: what they say and how far they are; what is asked of them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clip_ray.training.context import Asked
from clip_ray.training.progress import Progress

POLL_S = 1.0
# Who hears the reports may take its time over the last one.
LAST_REPORT_S = 120.0
Heard = Callable[[dict[str, float]], None]


class EpochReport(NamedTuple):
    """An epoch's figures, for whoever hears them."""

    figures: dict[str, float]


# Progress of the training, a line to say, or a report.
Note = dict[str, Any] | str | EpochReport


@ray.remote(num_cpus=0)
class Board:
    """Where workers pin what they have to tell, and the driver what it wants of them."""

    def __init__(self, heard: bool) -> None:
        self._is_heard, self._heard = heard, 0
        self._notes: list[Note] = []
        self._asked = Asked.NOTHING
        self._waits_since_s: float | None = None
        self._controller: ActorHandle[Any] | None = None

    def put(self, note: Note) -> None:
        """Pins a note."""
        self._notes.append(note)

    def take(self) -> list[Note]:
        """What has been pinned since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def is_heard(self) -> bool:
        """Whether somebody hears the reports."""
        return self._is_heard

    def hear(self) -> None:
        """Pins that another report has been heard."""
        self._heard += 1

    def heard(self) -> int:
        """How many reports have been heard."""
        return self._heard

    def ask(self, wish: int) -> None:
        """Pins what is wanted of the run."""
        self._asked = Asked(wish)

    def asked(self) -> int:
        """What is wanted of the run."""
        return int(self._asked)

    def is_led_by(self, controller: ActorHandle[Any]) -> None:
        """Pins the handle of Ray Train's controller."""
        self._controller = controller

    def controller(self) -> ActorHandle[Any] | None:
        """Ray Train's controller, as soon as it runs."""
        return self._controller

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
def board_of(
    interval_s: float, say: Callable[[str], None], heard: Heard | None = None
) -> Iterator[Any]:
    """A board whose notes a thread of the driver shows, and hands on, until the block ends."""
    # On the driver's own node: it must not be lost with a worker's.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board: Any = Board.options(scheduling_strategy=here).remote(heard is not None)
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
                if isinstance(note, str):
                    say(note)
                elif not isinstance(note, EpochReport):
                    progress.show(note)
                elif heard is not None:
                    heard(note.figures)
                    board.hear.remote()

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield board
    finally:
        stop.set()
        thread.join(timeout=LAST_REPORT_S)
        progress.close()
        ray.kill(board)
