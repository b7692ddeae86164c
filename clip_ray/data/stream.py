"""The training stream: each worker's own Ray Data graph, in the order of `order.py`.

Units of work (`unit.py`) wait at the reader processes, a few at each, so that none waits for the
scheduler. One execution serves many epochs; a run of any length is a chain of them, each begun
before the one before it ends.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from ray.data import ExecutionResources
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.metadata_fetcher import InlineMetadataFetcher
from ray.data._internal.execution.streaming_executor import StreamingExecutor

from clip_ray.data.unit import Arrays, StreamSpec, UnitMaker
from clip_ray.errors import RunError
from clip_ray.priority import COMES_FIRST

# Half a CPU for each reader: they wait for S3 part of the time.
READER_CPUS = 0.5
# At each process, two of them begun: one is handed on while the next is made.
UNITS_AT_PROCESS = 4
UNITS_BEGUN = 2
# Of a worker's finished units in the object store, so that nothing spills. Beside them are those
# at the readers and three on their way to the worker.
STORE_BYTES = 256 * 2**20
SCHEDULER_PAUSE_S = 0.02
# Units before a link's end at which the next one starts its readers, which takes seconds.
UNITS_AHEAD = 40


def training_stream(spec: StreamSpec, rank: int, steps: range) -> Iterator[Arrays]:
    """The micro batches of `rank` at `steps`, in order, for as many epochs as they span.

    Needs a Ray session. The arrays are those of `UnitMaker`, read-only, for one step each. Raises
    RunError where the stream brings another step than the next one.
    """
    return checked_micro_batches(_chain(spec, rank, steps), rank, steps.start, spec.local_batch)


def _chain(spec: StreamSpec, rank: int, steps: range) -> Iterator[Arrays]:
    link_steps = max(1, spec.units_per_link // spec.units_per_step) * spec.steps_per_unit
    link = _Link(spec, rank, steps[:link_steps])
    while link is not None:
        following, rest = None, steps[link_steps:]
        for number, unit in enumerate(link):
            if rest and following is None and number + UNITS_AHEAD >= len(link):
                following = _Link(spec, rank, rest[:link_steps])
            yield unit
        link, steps = following, rest


class _Link:
    """One execution over a range of steps, begun at once."""

    def __init__(self, spec: StreamSpec, rank: int, steps: range) -> None:
        firsts, parts = steps[:: spec.steps_per_unit], range(spec.units_per_step)
        places = itertools.product(firsts, parts)
        blocks = [pa.table({"first_step": [first], "part": [part]}) for first, part in places]
        self._length = len(blocks)
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.custom_execution_callback_classes = [_Scheduling]
        context.execution_options.preserve_order = True
        context.execution_options.resource_limits = ExecutionResources(
            object_store_memory=max(STORE_BYTES, 2 * spec.unit_bytes)
        )
        with ray.data.DataContext.current(context):
            units: Any = ray.data.from_blocks(blocks).map_batches(
                UnitLoader,
                fn_constructor_args=(spec, rank, steps.stop),
                batch_size=None,
                num_cpus=READER_CPUS,
                label_selector=dict(spec.reader_labels),
                runtime_env={"env_vars": COMES_FIRST},
                compute=ray.data.ActorPoolStrategy(
                    size=min(spec.readers, len(blocks)),
                    max_tasks_in_flight_per_actor=UNITS_AT_PROCESS,
                    max_concurrent_calls_per_actor=UNITS_BEGUN,
                    enable_true_multi_threading=True,
                ),
            )
        self._units = iter(
            units.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2)
        )
        starter = ThreadPoolExecutor(1, thread_name_prefix="next-link")
        self._first = starter.submit(next, self._units)
        starter.shutdown(wait=False)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Arrays]:
        yield self._first.result()
        yield from self._units


class _Scheduling(ExecutionCallback):
    """How Ray Data's scheduler, a thread of the training worker, serves the stream."""

    def before_execution_starts(self, executor: StreamingExecutor) -> None:
        """Units are handed on in the round that sees them made.

        With Ray's default, a thread that asks for their sizes, it is a later one, and units of
        several rounds come at once.
        """
        executor._metadata_fetcher = InlineMetadataFetcher()

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        """It takes its time.

        Where the readers are ahead and must wait, it would look for work without a pause, and take
        the interpreter from the training.
        """
        time.sleep(SCHEDULER_PAUSE_S)


class UnitLoader:
    """A reader process: the actor that makes units, of which it may be asked several at once."""

    def __init__(self, spec: StreamSpec, rank: int, end_step: int) -> None:
        self._units, self._rank, self._end_step = UnitMaker(spec), rank, end_step
        self._steps_per_unit = spec.steps_per_unit
        torch.set_num_threads(1)  # of each of the process's own threads

    def __call__(self, batch: Arrays) -> Arrays:
        """The unit in `batch`: the step it begins at, and which part of it."""
        (first,), (part,) = batch["first_step"].tolist(), batch["part"].tolist()
        last = min(first + self._steps_per_unit, self._end_step)
        return self._units.make(self._rank, range(first, last), part)


def checked_micro_batches(
    units: Iterator[Arrays], rank: int, start_step: int, local_batch: int
) -> Iterator[Arrays]:
    """The micro batches of one rank, each proved to be the next one. Raises RunError if not."""
    step, parts, missing = start_step, [], local_batch
    for unit in units:
        place = unit.pop("place")
        # Where the step changes from one row to the next.
        ends = [*(np.flatnonzero(np.diff(place[:, 0])) + 1).tolist(), len(place)]
        start = 0
        for end in ends:
            found = set(map(tuple, place[start:end].tolist()))
            if found != {(step, rank)}:
                raise RunError(
                    f"rank {rank} expected step {step}, the stream brought {sorted(found)}"
                )
            parts.append({name: array[start:end] for name, array in unit.items()})
            missing -= end - start
            start = end
            if not missing:
                yield _joined(parts)
                step, parts, missing = step + 1, [], local_batch


def _joined(parts: list[Arrays]) -> Arrays:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
