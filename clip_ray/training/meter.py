"""What a step costs: its rate, where its time goes, its memory, its share of the peak.

Every rank makes one and tells it of every step. All profile the same steps.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from statistics import median

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from clip_ray.collectives import all_gather
from clip_ray.training.hardware import Precision, peak_flops, peak_memory_bytes

# A profiled step takes some 10 ms more.
PROFILE_INTERVAL_S = 10
Interval = tuple[int, int]


class StepMeter:
    """Measures steps between two logged ones."""

    def __init__(
        self,
        global_batch: int,
        workers: int,
        device: torch.device,
        precision: Precision,
    ) -> None:
        self._global_batch, self._workers = global_batch, workers
        self._device, self._precision = device, precision
        self._profiles_next, self._profiled_s = False, float("-inf")
        self._exposed_share = 0.0  # of a step's own time
        self._own_step_s: float | None = None  # of the newest profiled step
        self.own_s: list[float] = []
        """Seconds of a step by rank, its wait for data included, its collectives not.

        Empty until a step has been profiled.
        """
        self.restart()

    def restart(self) -> None:
        """Forgets the steps so far, and what came after them."""
        self._since_s, self._steps, self._waited_s = time.monotonic(), 0, 0.0
        self._flops = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for data."""
        started_s = time.monotonic()
        yield
        self._waited_s += time.monotonic() - started_s

    @contextlib.contextmanager
    def step(self, flops: float) -> Iterator[None]:
        """Around one step, of so many FLOPs on all ranks together, as far as this one can tell.

        Now and then one that follows a logged one is profiled.
        """
        self._steps += 1
        self._flops += flops
        if not self._profiles_next:
            yield
            return
        self._profiles_next, self._profiled_s = False, time.monotonic()
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities, acc_events=False) as profiler:
            started_s = time.monotonic()
            yield
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            step_s = time.monotonic() - started_s
        exposed_s = exposed_communication_s(profiler)
        self._exposed_share = exposed_s / step_s
        self._own_step_s = step_s - exposed_s

    def figures(self) -> dict[str, float]:
        """Of the steps since the last call or restart: images/s, shares of time, peak memory, MFU.

        Every rank must call it. data_wait_share, communication_share and compute_share add up to
        1; communication is that of the newest profiled step, as far as nothing was computed
        meanwhile. Once one has been profiled, the slowest and the median of `own_s` too.
        """
        passed_s, steps, flops = time.monotonic() - self._since_s, self._steps, self._flops
        waiting = self._waited_s / passed_s
        communicating = self._exposed_share * (1 - waiting)
        self._compare_ranks(self._waited_s / steps)
        self.restart()
        rate = steps * self._global_batch / passed_s
        peak = peak_flops(self._device, self._precision) * self._workers
        return {
            "images_per_s": rate,
            "images_per_s_per_worker": rate / self._workers,
            "data_wait_share": waiting,
            "communication_share": communicating,
            "compute_share": 1 - waiting - communicating,
            "peak_memory_gb": peak_memory_bytes(self._device) / 1e9,
            "mfu": flops / passed_s / peak,
            **(
                {"slowest_rank_s": max(self.own_s), "median_rank_s": median(self.own_s)}
                if self.own_s
                else {}
            ),
        }

    def _compare_ranks(self, waited_s: float) -> None:
        """Gathers the ranks' own seconds, and agrees with rank 0 on whether to profile a step."""
        late = time.monotonic() - self._profiled_s >= PROFILE_INTERVAL_S
        mine = [waited_s + (self._own_step_s or 0.0), float(late)]
        rows: list[list[float]] = all_gather(torch.tensor([mine], device=self._device)).tolist()
        if self._own_step_s is not None:
            self.own_s = [row[0] for row in rows]
        self._profiles_next = rows[0][1] > 0


def exposed_communication_s(profiler: profile) -> float:
    """Seconds in which collectives ran (NCCL's kernels, gloo's work) and no other kernel did."""
    results = profiler.profiler
    assert results is not None
    assert results.kineto_results is not None
    communicating: list[Interval] = []
    computing: list[Interval] = []
    for event in results.kineto_results.events():
        interval = event.start_ns(), event.start_ns() + event.duration_ns()
        on_gpu = event.device_type() == DeviceType.CUDA
        if event.name().startswith("gloo:") or (on_gpu and "nccl" in event.name().lower()):
            communicating.append(interval)
        elif on_gpu:
            computing.append(interval)
    either = _covered_ns([*communicating, *computing])
    return (either - _covered_ns(computing)) / 1e9


def _covered_ns(intervals: Iterable[Interval]) -> int:
    """Length of the union."""
    total = reached = 0
    for start, end in sorted(intervals):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total
