"""What the controller tells the driver's board: who it is, who failed, how long it waits."""

from __future__ import annotations

from typing import Any

import ray
from ray.train import UserCallback

# Custom callbacks over Ray Train's own are what it has for the controller's state.
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    RunningState,
    SchedulingState,
)

_ADVICE_OF_COMPILER = "TORCHDYNAMO_VERBOSE"  # after what it has to say


class TellsFailures(UserCallback):
    """Says which ranks failed, and of what, before Ray Train starts the workers again."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called in the controller, before it starts the workers again."""
        for rank, error in sorted(worker_exceptions.items()):
            self._board.put.remote(f"train: rank {rank} failed: {root_cause(error)}")


class TellsState(ControllerCallback):
    """Says which the controller is, and from when to when its workers' nodes are not there."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def after_controller_start(self, train_run_context: Any) -> None:
        """Called in the controller."""
        self._board.is_led_by.remote(ray.get_runtime_context().current_actor)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Called in the controller."""
        if isinstance(current_state, InitializingState | SchedulingState | ReschedulingState):
            self._board.waits.remote(True)
        elif isinstance(current_state, RunningState):
            self._board.waits.remote(False)


def root_cause(error: BaseException) -> str:
    """What the innermost error of a worker says, in a line."""
    failures = getattr(error, "worker_failures", None) or {}
    error = next(iter(failures.values()), error)
    while inner := _inner(error):
        error = inner
    said = (line.strip() for line in str(error).splitlines())
    lines = [line for line in said if line and _ADVICE_OF_COMPILER not in line] or [""]
    # Ray's own errors explain themselves at length, after a first line; others end with the point.
    line = lines[0] if type(error).__module__.startswith("ray.") else lines[-1]
    return f"{type(error).__name__}: {line}"


def _inner(error: BaseException) -> BaseException | None:
    fields = ("cause", "health_check_failure", "__cause__")
    found = (getattr(error, field, None) for field in fields)
    return next((each for each in found if isinstance(each, BaseException)), None)
