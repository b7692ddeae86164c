"""What a worker computes on: its precision, its peak rate and its memory."""

from __future__ import annotations

import resource
import time
from functools import lru_cache
from typing import Literal

import torch
from torch import nn

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Dense peak of matrix products in TFLOP/s: 16 bit with fp32 sums, and fp32 without TF32, from
# NVIDIA's data sheets. The first name that the device's name contains.
_PEAK_TFLOPS: dict[str, tuple[float, float]] = {
    "B200": (2250, 75), "H200": (989, 67), "H100 PCIe": (756, 51), "H100": (989, 67),
    "A100": (312, 19.5), "L40S": (362, 91.6), "L4": (121, 30.3), "A10G": (70, 31.2),
    "A10": (125, 31.2), "V100": (125, 15.7), "T4": (65, 8.1),
}  # fmt: skip
_MATRIX, _PRODUCTS = 1024, 5


def resolve_precision(precision: Literal["auto", "fp32", "bf16", "fp16"]) -> Precision:
    """`auto`: bf16 on a GPU that computes in it, fp32 elsewhere."""
    if precision != "auto":
        return precision
    gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if gpu else "fp32"


def device_name(device: torch.device) -> str:
    """As its driver calls it; a CPU with the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


@lru_cache(maxsize=1)
def peak_flops(device: torch.device, precision: Precision) -> float:
    """FLOP/s of matrix products: the data sheet's, or measured where there is none."""
    if device.type == "cuda":
        for name, tflops in _PEAK_TFLOPS.items():
            if name in torch.cuda.get_device_name(device):
                return tflops[precision == "fp32"] * 1e12
    # A CPU without instructions for 16 bit computes in fp32 underneath, and faster where it may.
    dtypes = {torch.float32, _DTYPES[precision]}
    return max(_measured_flops(device, dtype) for dtype in dtypes)


def seed_generators(device: torch.device, seed: int) -> None:
    """What torch.manual_seed does for the CPU and this device, without looking for others.

    It takes a millisecond on a machine without a GPU, where it keeps a traceback for each call.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process held so far: of the GPU's memory, or of the host's (RSS)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """On a CPU in its own seconds, since others often compute on it at the same time."""
    on_cpu = device.type == "cpu"
    clock, threads = (time.process_time, torch.get_num_threads()) if on_cpu else (time.monotonic, 1)
    left, right = (torch.randn(_MATRIX, _MATRIX, device=device).to(dtype) for _ in range(2))
    times_s = []
    for _ in range(_PRODUCTS):
        started_s = clock()
        # Reading one number waits for the device.
        float(nn.functional.linear(left, right)[0, 0])
        times_s.append((clock() - started_s) / threads)
    return 2 * _MATRIX**3 / min(times_s)
