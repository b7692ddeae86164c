"""What a step costs: its rate, where its time goes, its memory, its share of the peak.

Every rank makes one and tells it of every step; rank 0 alone profiles.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from clip_ray.collectives import rank
from clip_ray.training.hardware import Precision, peak_flops, peak_memory_bytes

# A profiled step takes some 10 ms more.
PROFILE_INTERVAL_S = 10
Interval = tuple[int, int]


class StepMeter:
    """Measures steps between two logged ones."""

    def __init__(
        self,
        global_batch: int,
        flops_per_step: float,
        workers: int,
        device: torch.device,
        precision: Precision,
    ) -> None:
        self._global_batch, self._workers = global_batch, workers
        self._flops_per_step = flops_per_step
        self._device, self._precision = device, precision
        self._begun, self._profiled_s = False, float("-inf")
        self._exposed_share = 0.0  # of a step's own time
        self.restart()

    def restart(self) -> None:
        """Forgets the steps so far, and what came after them."""
        self._since_s, self._steps, self._waited_s = time.monotonic(), 0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for data."""
        started_s = time.monotonic()
        yield
        self._waited_s += time.monotonic() - started_s

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around one step. Now and then one that is not the first is profiled."""
        self._steps += 1
        now_s, first, self._begun = time.monotonic(), not self._begun, True
        if rank() != 0 or first or now_s - self._profiled_s < PROFILE_INTERVAL_S:
            yield
            return
        self._profiled_s = now_s
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities, acc_events=False) as profiler:
            started_s = time.monotonic()
            yield
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            step_s = time.monotonic() - started_s
        self._exposed_share = exposed_communication_s(profiler) / step_s

    def figures(self) -> dict[str, float]:
        """Of the steps since the last call or restart: images/s, shares of time, peak memory, MFU.

        data_wait_share, communication_share and compute_share add up to 1; communication is that
        of the newest profiled step, as far as nothing was computed meanwhile.
        """
        passed_s, steps = time.monotonic() - self._since_s, self._steps
        waiting = self._waited_s / passed_s
        communicating = self._exposed_share * (1 - waiting)
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
            "mfu": steps * self._flops_per_step / passed_s / peak,
        }


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
