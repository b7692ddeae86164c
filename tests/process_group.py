"""Runs a function in real gloo process groups."""

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
    with tempfile.TemporaryDirectory() as folder:
        start_processes(
            _entry, (world_size, folder, function, arguments), world_size, start_method="spawn"
        )
        return [torch.load(Path(folder) / str(rank)) for rank in range(world_size)]


def _entry(
    rank: int, world_size: int, folder: str, function: Callable[..., Any], arguments: Any
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    torch.save(function(*arguments), Path(folder) / str(rank))
    dist.destroy_process_group()
