"""Runs a function in real process groups: gloo's on CPUs, NCCL's on one GPU."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` on each rank of a gloo group; what each returned, by rank.

    `function` must be importable, and what it returns must survive torch.save.
    """
    return _run("gloo", world_size, function, arguments)


def run_on_gpu(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function(*arguments)` returns in an NCCL group of one rank, its tensors on the CPU."""
    return _run("nccl", 1, function, arguments)[0]


def device() -> torch.device:
    """What the ranks of this group compute on."""
    on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda" if on_gpu else "cpu")


def _run(backend: str, world_size: int, function: Callable[..., Any], arguments: Any) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        given = world_size, backend, folder, function, arguments
        start_processes(_entry, given, world_size, start_method="spawn")
        files = [Path(folder) / str(rank) for rank in range(world_size)]
        return [torch.load(file, map_location="cpu") for file in files]


def _entry(
    rank: int,
    world_size: int,
    backend: str,
    folder: str,
    function: Callable[..., Any],
    arguments: Any,
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ["DS_ACCELERATOR"] = "cpu" if backend == "gloo" else "cuda"
    store = f"file://{folder}/store"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=world_size)
    torch.save(function(*arguments), Path(folder) / str(rank))
    dist.destroy_process_group()
