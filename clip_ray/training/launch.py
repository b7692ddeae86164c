"""A training run on a Ray cluster: Ray Train's workers, fed by Ray Data's stream."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from clip_ray.config import ClusterConfig, Config
from clip_ray.config_file import dump_config
from clip_ray.data.shards import Manifest, read_manifest
from clip_ray.data.tokenizer import CaptionTokenizer
from clip_ray.errors import RunError
from clip_ray.priority import COMES_FIRST
from clip_ray.storage import Storage, arrow_filesystem
from clip_ray.training.board import Heard, board_of
from clip_ray.training.callbacks import TellsFailures, TellsState, root_cause
from clip_ray.training.checkpoint import Checkpoints, check_identity, other_versions
from clip_ray.training.context import Asked
from clip_ray.training.ledger import lease
from clip_ray.training.run import make_order, run_identity
from clip_ray.training.start import begin
from clip_ray.training.worker import PreparesWorker, train_worker

# Training runs in a thread, whose allocator gives large tensors back to the system after every
# operation, and takes their pages anew: a sixth of a step on a CPU. With these it keeps them.
WORKER_ENV = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}
RESIZE_INTERVAL_S = 60.0
POLL_S = 0.5
SAY_WAIT_S = 20.0
END_TIMEOUT_S = 30.0
Say = Callable[[str], None]


def train(config: Config, say: Say, heard: Heard | None = None) -> bool:
    """Trains the run to its end, from its newest checkpoint; False if it was at its end already.

    Needs a Ray session and reachable storage. `heard` is called, in a thread, with each epoch's
    report. Raises RunError.
    """
    run = Storage(config.run_root)
    manifest = read_manifest(Storage(config.data_root))
    total_steps = _total_steps(config, manifest)
    newest = Checkpoints(run).newest()
    if newest is not None and newest.step >= total_steps:
        say(f"train: {config.name} is trained already: {newest.step} steps are in {run.root}")
        return False
    with board_of(config.logging.progress_interval_s, say, heard) as board:

        def lost() -> None:
            board.ask.remote(int(Asked.STOP))

        with lease(Checkpoints(run).ledger, say, lost) as owner:
            tokenizer = begin(config, manifest, owner, say)
            _check_resumes(config, manifest, tokenizer, total_steps, say)
            run.write_bytes("config.yaml", dump_config(config).encode())
            _fit(config, owner, board, say)
    return True


def _total_steps(config: Config, manifest: Manifest) -> int:
    order = make_order(config, manifest)
    if order.steps_per_epoch == 0:
        raise RunError(
            f"train.global_batch is {config.train.global_batch}: the train split has only "
            f"{order.num_samples} images; take at most that many"
        )
    return order.steps_per_epoch * config.train.epochs


def _check_resumes(
    config: Config, manifest: Manifest, tokenizer: CaptionTokenizer, total_steps: int, say: Say
) -> None:
    """Says where the run goes on. Raises RunError where this config cannot continue it."""
    checkpoints = Checkpoints(Storage(config.run_root))
    for entry in reversed(checkpoints.list()):
        try:
            found = checkpoints.manifest(entry)
        except RunError as error:  # the workers take the one before
            say(f"train: step {entry.step}: {error}")
            continue
        check_identity(found, run_identity(config, manifest, tokenizer))
        for line in other_versions(found):
            say(f"train: {line}")
        say(f"train: {config.name} resumes at step {entry.step} of {total_steps}")
        return


def _fit(config: Config, owner: str, board: Any, say: Say) -> None:
    """Runs Ray Train to the end; its controller once more where that has died."""
    for failures in itertools.count(1):
        trainer = _trainer(config, owner, board)
        try:
            _run(trainer, config, board, say)
        except ray.train.TrainingFailedError as error:
            raise RunError(f"training failed: {root_cause(error)}") from error
        except RayActorError as error:
            say(f"train: Ray Train's controller has died: {root_cause(error)}")
            if 0 <= config.cluster.max_failures < failures:
                raise RunError("training failed: Ray Train's controller died too often") from error
        else:
            return


def _trainer(config: Config, owner: str, board: Any) -> TorchTrainer:
    cluster = config.cluster
    # Any: it is declared for user callbacks alone, and takes its own kinds too.
    callbacks: Any = [TellsFailures(board), TellsState(board), PreparesWorker()]
    # Ray Train reads it where the trainer is made; a collective may wait twice as long, so that the
    # silent worker is found before those that wait for it give up.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(cluster.hang_timeout_s)
    gpus = {"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {}
    return TorchTrainer(
        train_worker,
        torch_config=TorchConfig(
            backend="nccl" if gpus else "gloo", timeout_s=int(2 * cluster.hang_timeout_s)
        ),
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "owner": owner,
            "board": board,
        },
        scaling_config=ScalingConfig(
            num_workers=(cluster.min_workers, cluster.num_workers)
            if cluster.min_workers
            else cluster.num_workers,
            elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,
            use_gpu=bool(gpus),
            resources_per_worker={"CPU": cluster.cpus_per_worker, **gpus},
            placement_strategy=cluster.placement.upper(),
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=Storage(config.run_root).arrow_path("").rstrip("/"),
            storage_filesystem=arrow_filesystem(),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            callbacks=callbacks,
            worker_runtime_env={"env_vars": WORKER_ENV | COMES_FIRST},
        ),
    )


def _run(trainer: TorchTrainer, config: Config, board: Any, say: Say) -> None:
    """fit(), in a thread: the first Ctrl-C or SIGTERM asks the workers for a last checkpoint.

    Raises RunError where the workers do not start in time.
    """
    raised: list[BaseException] = []
    # Not join(): interrupted in it, Python 3.11 takes the thread for ended.
    ended = threading.Event()

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            raised.append(error)
        finally:
            ended.set()

    threading.Thread(target=fit, name="train", daemon=True).start()
    try:
        _await(ended, config.cluster, board, say)
    except KeyboardInterrupt:
        say("train: stops at a checkpoint; interrupt once more to stop at once")
        board.ask.remote(int(Asked.STOP))
        _await(ended, config.cluster, board, say)
        raise
    finally:
        _end_controller(ended, board)
    if raised:
        raise raised[0]


def _end_controller(ended: threading.Event, board: Any) -> None:
    """Kills the controller of a run that is given up, so that nothing waits for it any more.

    Ray, ended while a thread still waits in it, may end the whole process.
    """
    deadline_s = time.monotonic() + END_TIMEOUT_S
    while not ended.wait(timeout=POLL_S) and time.monotonic() < deadline_s:
        controller: Any = ray.get(board.controller.remote())
        if controller is not None:
            ray.kill(controller)


def _await(ended: threading.Event, cluster: ClusterConfig, board: Any, say: Say) -> None:
    said = False
    while not ended.wait(timeout=POLL_S):
        waited_s: Any = ray.get(board.waited_s.remote())
        if waited_s > cluster.start_timeout_s:
            raise RunError(
                f"{_waits_for(cluster)}; none came within cluster.start_timeout_s "
                f"({cluster.start_timeout_s:g}): ask for less, or give the cluster more nodes"
            )
        if waited_s > SAY_WAIT_S and not said:
            say(f"train: {_waits_for(cluster)}")
        said = waited_s > SAY_WAIT_S


def _waits_for(cluster: ClusterConfig) -> str:
    fewest = cluster.min_workers or cluster.num_workers
    there = ray.cluster_resources()
    return (
        f"waits for {fewest} workers, each with {cluster.cpus_per_worker:g} CPUs and "
        f"{cluster.gpus_per_worker:g} GPUs: the cluster has {there.get('CPU', 0):g} and "
        f"{there.get('GPU', 0):g}"
    )
