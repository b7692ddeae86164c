"""What benches measure of a pipeline of batches: rates, waits, memory, CPU time."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import psutil

WARM_SHARE = 0.2  # of the first epoch, which the steady state leaves out
AROUND = 3  # batches on each side of an epoch's end in which the longest wait is sought
# A look at all of Ray's processes takes a core for 0.2 s.
LOOK_EVERY_S = 10


def measure(batches: Callable[[], Iterator[int]], images: int, epochs: int) -> dict[str, float]:
    """Consumes batches of so many images each, as fast as they come.

    `steady` and `total` are images per second; `epoch_gap_s` is the longest wait around an epoch's
    end less the median interval between batches, `mid_epoch_gap_s` the same around the middles of
    epochs; `start_s` is the life of this process before.
    """
    start_s = time.time() - psutil.Process().create_time()
    peak = PeakMemory()
    started = time.perf_counter()
    times_s, counts = [started], [0]
    for count in batches():
        times_s.append(time.perf_counter())
        counts.append(count)
    done, waits_s = np.cumsum(counts), np.diff(times_s)
    warm = int(np.searchsorted(done, WARM_SHARE * images))
    per_epoch, median_s = len(waits_s) // epochs, float(np.median(waits_s[warm:]))

    def gap_s(places: Iterable[int]) -> float:
        longest = (max(waits_s[place - AROUND : place + AROUND + 1]) for place in places)
        return float(max(longest, default=0.0)) - median_s

    return {
        "steady": float((done[-1] - done[warm]) / (times_s[-1] - times_s[warm])),
        "total": float(done[-1] / (times_s[-1] - started)),
        "start_s": start_s,
        "first_batch_s": float(waits_s[0]),
        "epoch_gap_s": gap_s(per_epoch * epoch for epoch in range(1, epochs)),
        "mid_epoch_gap_s": gap_s(per_epoch * epoch + per_epoch // 2 for epoch in range(1, epochs)),
        **peak.stop(),
    }


class PeakMemory:
    """The largest sum of PSS over this process and its descendants, Ray's own apart.

    A process of its own looks: a thread would hold the interpreter meanwhile.
    """

    def __init__(self) -> None:
        command = [sys.executable, __file__, str(os.getpid())]
        self._watcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def stop(self) -> dict[str, float]:
        return json.loads(self._watcher.communicate(b"\n", timeout=60)[0])


def watch(pid: int) -> None:
    """Looks until it is written to, then prints the largest sums.

    The end of stdin would not do: forked loader processes hold it open. A look must not give way:
    while it waits for a core, it holds the memory map of the process that it looks at.
    """
    peak = {"pss_ours_mib": 0.0, "pss_ray_mib": 0.0}
    while not select.select([sys.stdin], [], [], LOOK_EVERY_S)[0]:
        sums = dict.fromkeys(peak, 0.0)
        measured = psutil.Process(pid)
        for process in {measured, *measured.children(recursive=True)} - {psutil.Process()}:
            try:
                name = process.name() + " ".join(process.cmdline()[:1])
                pss = process.memory_full_info().pss / 2**20
            except psutil.Error:
                continue
            is_ray = any(word in name for word in ("raylet", "gcs_server", "ray/", "ray::IDLE"))
            sums["pss_ray_mib" if is_ray else "pss_ours_mib"] += pss
        if sum(sums.values()) > sum(peak.values()):
            peak = sums
    print(json.dumps(peak))


def store_cpu_s() -> float:
    """CPU seconds so far of the embedded object store."""
    total_s = 0.0
    for process in psutil.process_iter(["name"]):
        if process.info["name"] == "weed":
            times = process.cpu_times()
            total_s += times.user + times.system
    return total_s


if __name__ == "__main__":
    watch(int(sys.argv[1]))
