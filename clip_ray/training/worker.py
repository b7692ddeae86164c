"""What Ray Train runs in each worker, and its view of the run."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from numpy.typing import NDArray

# Custom callbacks over Ray Train's own are what it has for what runs in a worker's main thread.
from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.context import get_train_context

from clip_ray.collectives import use_interface_of
from clip_ray.config import Config
from clip_ray.config_file import parse_config
from clip_ray.data.stream import training_stream
from clip_ray.data.tokenizer import CaptionTokenizer
from clip_ray.storage import Storage
from clip_ray.training.board import EpochReport
from clip_ray.training.context import Asked
from clip_ray.training.gauges import Gauges
from clip_ray.training.run import TOKENIZER_KEY, make_stream_spec

ASK_EVERY_S = 0.5
HEARD_POLL_S = 0.1
_TOLD_TO_END = threading.Event()


class PreparesWorker(WorkerCallback):
    """What a worker's process needs before its process group is made."""

    def after_init_train_context(self) -> None:
        """Runs in the worker's main thread, where alone a handler can be set."""
        # How schedulers announce the end: it waits for a checkpoint.
        signal.signal(signal.SIGTERM, lambda signum, frame: _TOLD_TO_END.set())
        use_interface_of(ray.util.get_node_ip_address())


def train_worker(loop_config: dict[str, Any]) -> None:
    """Trains the run's part of this worker: its rank and the world size are Ray Train's."""
    # Here, so that the driver does not wait for DeepSpeed. What tracks runs is imported by who uses
    # it: DeepSpeed's autotuner and timm would have each worker wait a second or two for it.
    with _hidden("mlflow", "wandb"):
        from clip_ray.training.loop import Trainer

    config = parse_config(loop_config["config"], origin="the run's config")
    config = config.at_world_size(ray.train.get_context().get_world_size())
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    if config.train.compile and not config.cluster.gpus_per_worker:
        _set_up_compiler()
    tokenizer_json = Storage(config.run_root).read_bytes(TOKENIZER_KEY).decode()
    tokenizer = CaptionTokenizer(tokenizer_json, config.model.text.context_length)
    context = RayContext(config, tokenizer, loop_config["owner"], loop_config["board"])
    Trainer(config, tokenizer, context).train()


@contextlib.contextmanager
def _hidden(*packages: str) -> Iterator[None]:
    """What the block imports takes these packages, where nobody has imported them, for missing."""
    modules: dict[str, Any] = sys.modules
    hidden = [package for package in packages if package not in modules]
    modules |= dict.fromkeys(hidden)
    try:
        yield
    finally:
        for package in hidden:
            del modules[package]


def _set_up_compiler() -> None:
    """On CPUs, Inductor compiles with this worker's threads, into a folder in Ray's own.

    Else each worker starts as many processes as its node has CPUs. The folder is that of this start
    of the workers: a C++ library whose link was killed stays there, and fails whoever loads it.
    """
    from torch._inductor import config

    config.compile_threads = torch.get_num_threads()
    group: Any = ray.util.get_current_placement_group()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path.cwd() / f"compiled-{group.id.hex()}")


class RayContext:
    """training.context.WorkerContext over Ray Train."""

    def __init__(self, config: Config, tokenizer: CaptionTokenizer, owner: str, board: Any) -> None:
        self._config, self._tokenizer, self._board = config, tokenizer, board
        self.owner, self.node = owner, ray.util.get_node_ip_address()
        self.decided = bool(ray.get(board.is_heard.remote()))
        self._gauges = Gauges(config.name)
        self._rank = ray.train.get_context().get_world_rank()
        self._drain_told = False
        self._answer: Any = None
        self._asked_s = 0.0

    def micro_batches(self, steps: range) -> Iterator[dict[str, NDArray[Any]]]:
        """This rank's part of the run's order."""
        return training_stream(make_stream_spec(self._config, self._tokenizer), self._rank, steps)

    def progress(self, state: dict[str, Any]) -> None:
        """To the driver's board, and to Ray's metrics."""
        self._board.put.remote(state)
        self._gauges.set(state)

    def say(self, line: str) -> None:
        """To the driver's board."""
        self._board.put.remote(line)

    def report(self, metrics: dict[str, float]) -> None:
        """To Ray Train, and to the driver's board; ranks beside 0 wait in their next collective."""
        ray.train.report(metrics)
        if self._rank == 0 and self.decided:
            before: Any = ray.get(self._board.heard.remote())
            self._board.put.remote(EpochReport(metrics))
            while ray.get(self._board.heard.remote()) == before:
                time.sleep(HEARD_POLL_S)

    def asked(self) -> Asked:
        """By a signal to this worker, a drain of its node, or, on rank 0, by the driver."""
        wish = Asked.LEAVE if _TOLD_TO_END.is_set() else Asked.NOTHING
        # The public get_preemption_info() waits for every rank, in each step.
        preemption = get_train_context().preemption_context.preemption_info
        if preemption is not None and not self._drain_told:
            self._drain_told = True
            if self._rank in preemption.preempted_ranks:
                self.say(f"train: the node of rank {self._rank} is about to go")
            wish = max(wish, Asked.CHECKPOINT)
        return max(wish, self._driver_asked()) if self._rank == 0 else wish

    def _driver_asked(self) -> Asked:
        if self._answer is None:
            if time.monotonic() - self._asked_s >= ASK_EVERY_S:
                self._asked_s = time.monotonic()
                self._answer = self._board.asked.remote()
        elif ray.wait([self._answer], timeout=0)[0]:
            answer, self._answer = self._answer, None
            return Asked(ray.get(answer))
        return Asked.NOTHING
