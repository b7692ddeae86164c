"""A training run on a Ray cluster: Ray Train's workers, fed by Ray Data's stream."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import ray.data
import ray.train
import torch
from numpy.typing import NDArray
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from clip_ray.config import Config
from clip_ray.config_file import parse_config
from clip_ray.data.shards import read_column, read_manifest
from clip_ray.data.stream import READER_CPUS, StreamSpec, stream_spec, training_stream
from clip_ray.data.tokenizer import CaptionTokenizer, make_tokenizer
from clip_ray.errors import RunError
from clip_ray.storage import Storage, arrow_filesystem
from clip_ray.training.checkpoint import Checkpoints, check_identity
from clip_ray.training.progress import Progress
from clip_ray.training.run import TOKENIZER_KEY, make_order, run_identity

POLL_S = 1.0
# What workers on other nodes need to reach S3. Keys are never among them: nodes have their own.
FORWARDED = (
    "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_REGION",
    "AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION", "DS_ACCELERATOR",
)  # fmt: skip
# Training runs in a thread, whose allocator gives large tensors back to the system after every
# operation, and takes their pages anew: a sixth of a step on a CPU. With these it keeps them.
WORKER_ENV = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}


@contextlib.contextmanager
def ray_session(config: Config, dashboard: bool = False) -> Iterator[None]:
    """A connection to the cluster that the config or RAY_ADDRESS names, or a local Ray.

    A local Ray is stopped at the end of the block; `dashboard` says whether it has one.
    """
    if ray.is_initialized():
        yield
        return
    if config.cluster.gpus_per_worker == 0:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    env_vars = {name: os.environ[name] for name in FORWARDED if name in os.environ}
    arguments: dict[str, Any] = {"runtime_env": {"env_vars": env_vars}, "log_to_driver": False}
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        # Readers get CPUs of their own beside the workers', or a small machine would never start;
        # twice, since a link of the stream begins before the last one ends.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
        readers_cpus = 2 * READER_CPUS * config.cluster.readers_per_worker
        wanted = config.cluster.num_workers * (config.cluster.cpus_per_worker + readers_cpus) + 1
        arguments |= {
            "num_cpus": max(os.cpu_count() or 1, math.ceil(wanted)),
            "include_dashboard": dashboard,
            "object_store_memory": 2**30,
        }
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # What a submitted job's runtime_env says already may be said again here.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    ray.init(address or "local", logging_level=logging.WARNING, **arguments)
    data_context = ray.data.DataContext.get_current()
    data_context.enable_progress_bars = False
    data_context.print_on_execution_start = False
    try:
        yield
    finally:
        ray.shutdown()


def train(
    config: Config, say: Callable[[str], None], callbacks: Sequence[UserCallback] = ()
) -> bool:
    """Trains the run to its end, from its newest checkpoint; False if it was at its end already.

    Needs a Ray session and reachable storage. `callbacks` hear each epoch's report. Raises
    RunError.
    """
    run, data = Storage(config.run_root), Storage(config.data_root)
    manifest = read_manifest(data)
    tokenizer = _tokenizer(config, run, data)
    order = make_order(config, manifest)
    if order.steps_per_epoch == 0:
        raise RunError(
            f"train.global_batch is {config.train.global_batch}: the train split has only "
            f"{order.num_samples} images; take at most that many"
        )
    newest = Checkpoints(run).newest()
    total_steps = order.steps_per_epoch * config.train.epochs
    if newest is not None:
        check_identity(newest, run_identity(config, manifest, tokenizer))
        if newest.step >= total_steps:
            say(f"train: {config.name} is trained already: {newest.step} steps are in {run.root}")
            return False
        say(f"train: {config.name} resumes at step {newest.step} of {total_steps}")
    _fit(config, tokenizer, total_steps, say, callbacks)
    return True


def _tokenizer(config: Config, run: Storage, data: Storage) -> CaptionTokenizer:
    """The run's tokenizer: made once, by the driver, and kept with the run."""
    text = config.model.text
    if run.exists(TOKENIZER_KEY):
        return CaptionTokenizer(run.read_bytes(TOKENIZER_KEY).decode(), text.context_length)
    groups = read_column(data, read_manifest(data).splits["train"], "captions")
    tokenizer = make_tokenizer(text, (caption for group in groups for caption in group))
    run.write_bytes(TOKENIZER_KEY, tokenizer.json_text.encode())
    return tokenizer


def _fit(
    config: Config,
    tokenizer: CaptionTokenizer,
    total_steps: int,
    say: Callable[[str], None],
    callbacks: Sequence[UserCallback],
) -> None:
    data = Storage(config.data_root)
    manifest = read_manifest(data)
    spec = stream_spec(
        data=config.data,
        storage=data,
        manifest=manifest,
        tokenizer=tokenizer,
        order=make_order(config, manifest),
        world_size=config.cluster.num_workers,
        readers=config.cluster.readers_per_worker,
        image_size=config.model.image.size,
    )
    with _progress(config.logging.progress_interval_s, say) as board:
        trainer = TorchTrainer(
            _worker,
            torch_config=TorchConfig(backend=_backend(config)),
            train_loop_config={
                "config": config.model_dump(mode="json"),
                "spec": spec,
                "total_steps": total_steps,
                "board": board,
            },
            scaling_config=ScalingConfig(
                num_workers=config.cluster.num_workers,
                use_gpu=config.cluster.gpus_per_worker > 0,
                resources_per_worker={
                    "CPU": config.cluster.cpus_per_worker,
                    **(
                        {"GPU": config.cluster.gpus_per_worker}
                        if config.cluster.gpus_per_worker
                        else {}
                    ),
                },
            ),
            run_config=RunConfig(
                name="ray",
                storage_path=Storage(config.run_root).arrow_path("").rstrip("/"),
                storage_filesystem=arrow_filesystem(),
                failure_config=FailureConfig(max_failures=config.cluster.max_failures),
                callbacks=list(callbacks),
                worker_runtime_env={"env_vars": WORKER_ENV},
            ),
        )
        try:
            trainer.fit()
        except SystemExit:  # how Ray Train ends on SIGINT, its workers stopped
            raise KeyboardInterrupt from None
        except ray.train.TrainingFailedError as error:
            raise RunError(f"training failed: {_root_cause(error)}") from error


def _backend(config: Config) -> str:
    return "nccl" if config.cluster.gpus_per_worker > 0 else "gloo"


def _worker(loop_config: dict[str, Any]) -> None:
    """The function that Ray Train runs in each worker."""
    # Here, so that the driver does not wait for DeepSpeed.
    from clip_ray.training.loop import Trainer

    config = parse_config(loop_config["config"], origin="the run's config")
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    run = Storage(config.run_root)
    tokenizer_json = run.read_bytes(TOKENIZER_KEY).decode()
    tokenizer = CaptionTokenizer(tokenizer_json, config.model.text.context_length)
    Trainer(
        config,
        tokenizer,
        _RayContext(*(loop_config[name] for name in ("spec", "total_steps", "board"))),
    ).train()


class _RayContext:
    """training.context.WorkerContext over Ray Train."""

    def __init__(self, spec: StreamSpec, total_steps: int, board: Any) -> None:
        self._spec, self._total_steps, self._board = spec, total_steps, board

    def micro_batches(self, start_step: int) -> Iterator[dict[str, NDArray[Any]]]:
        rank = ray.train.get_context().get_world_rank()
        return training_stream(self._spec, rank, range(start_step, self._total_steps))

    def progress(self, state: dict[str, Any]) -> None:
        self._board.put.remote(state)

    def say(self, line: str) -> None:
        self._board.put.remote(line)

    def report(self, metrics: dict[str, float]) -> None:
        ray.train.report(metrics)


@ray.remote(num_cpus=0)
class _Board:
    """Where rank 0 pins its progress, and lines to say, and the driver reads them."""

    def __init__(self) -> None:
        self._notes: list[dict[str, Any] | str] = []

    def put(self, note: dict[str, Any] | str) -> None:
        self._notes.append(note)

    def take(self) -> list[dict[str, Any] | str]:
        notes, self._notes = self._notes, []
        return notes


@contextlib.contextmanager
def _progress(interval_s: float, say: Callable[[str], None]) -> Iterator[Any]:
    """A board whose notes a thread of the driver shows until the block ends."""
    board: Any = _Board.remote()
    progress, stop = Progress(interval_s), threading.Event()

    def show() -> None:
        ended = False
        while not ended:
            ended = stop.wait(POLL_S)
            try:
                notes = ray.get(board.take.remote(), timeout=10)
            except Exception:  # progress must never end a run
                return
            for note in notes:
                say(note) if isinstance(note, str) else progress.show(note)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield board
    finally:
        stop.set()
        thread.join(timeout=15)
        progress.close()
        ray.kill(board)


def _root_cause(error: BaseException) -> str:
    """The first line that says something, of the innermost error a worker raised."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        error = failure
        break
    while getattr(error, "cause", None) is not None or error.__cause__ is not None:
        error = getattr(error, "cause", None) or error.__cause__  # type: ignore[assignment]
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"
