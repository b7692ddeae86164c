"""Runs a function in real process groups: gloo's on CPUs, NCCL's on one GPU."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` on each rank of a gloo group; what each returned, by rank.

    `function` must be importable, and what it returns must survive torch.save.
    """
    # The ranks are forks of one process that has imported what they need: that takes long.
    multiprocessing.set_forkserver_preload(["clip_ray.training.engine"])
    with patch.dict(os.environ, DS_ACCELERATOR="cpu"):
        forkserver.ensure_running()
    return _run("gloo", "forkserver", world_size, function, arguments)


def run_on_gpu(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function(*arguments)` returns in an NCCL group of one rank, its tensors on the CPU."""
    return _run("nccl", "spawn", 1, function, arguments)[0]


def device() -> torch.device:
    """What the ranks of this group compute on."""
    on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda" if on_gpu else "cpu")


def _run(
    backend: str,
    start_method: str,
    world_size: int,
    function: Callable[..., Any],
    arguments: Any,
) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        given = world_size, backend, folder, dict(os.environ), function, arguments
        start_processes(_entry, given, world_size, start_method=start_method)
        files = [Path(folder) / str(rank) for rank in range(world_size)]
        return [torch.load(file, map_location="cpu") for file in files]


def _entry(
    rank: int,
    world_size: int,
    backend: str,
    folder: str,
    environment: dict[str, str],
    function: Callable[..., Any],
    arguments: Any,
) -> None:
    torch.set_num_threads(1)
    os.environ |= environment | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
    }
    os.environ["DS_ACCELERATOR"] = "cpu" if backend == "gloo" else "cuda"
    store = f"file://{folder}/store"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=world_size)
    torch.save(function(*arguments), Path(folder) / str(rank))
    dist.destroy_process_group()
