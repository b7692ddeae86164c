"""The training loop of one worker. It knows a WorkerContext, not Ray."""

from __future__ import annotations

import json
import time
import warnings
from typing import Any

import torch
from numpy.typing import NDArray

from clip_ray.collectives import backend, barrier, broadcast_object, mean_over_ranks, rank
from clip_ray.config import Config
from clip_ray.config_file import dump_config
from clip_ray.data.shards import read_manifest
from clip_ray.data.tokenizer import CaptionTokenizer
from clip_ray.errors import RunError
from clip_ray.model.clip import CLIP
from clip_ray.model.pretrained import pack_weights
from clip_ray.storage import Storage
from clip_ray.training.checkpoint import BEST_METRIC, Checkpoints, best_of
from clip_ray.training.context import WorkerContext
from clip_ray.training.engine import INPUTS, Engine, StepResult, deepspeed_config
from clip_ray.training.flops import step_flops
from clip_ray.training.hardware import device_name
from clip_ray.training.meter import StepMeter
from clip_ray.training.run import METRICS_KEY, make_order, run_identity
from clip_ray.training.run_log import open_run_logs
from clip_ray.training.schedule import learning_rate
from clip_ray.training.validation import Validation


class Trainer:
    """A run on this rank: made, resumed, stepped to its end. Every rank must do the same."""

    def __init__(self, config: Config, tokenizer: CaptionTokenizer, context: WorkerContext) -> None:
        torch.manual_seed(config.seed)
        self.config, self.tokenizer, self.context = config, tokenizer, context
        self.run = Storage(config.run_root)
        self.checkpoints = Checkpoints(self.run)
        data = Storage(config.data_root)
        self.manifest = read_manifest(data)
        self.order = make_order(config, self.manifest)
        self.total_steps = self.order.steps_per_epoch * config.train.epochs
        model = CLIP(config.model, tokenizer.vocab_size, config.loss)
        self.architecture = model.architecture
        self.engine = Engine(model, config)
        self.validation = Validation(config, data, self.manifest, tokenizer)
        self.log: list[dict[str, Any]] = []
        self._skipped = self._skipped_in_a_row = 0
        self.start_step = self._resume()
        self._logs = open_run_logs(config, self.start_step) if rank() == 0 else []

    def train(self) -> None:
        """Runs from the newest checkpoint to the last step."""
        self._say_what_it_runs_on()
        try:
            self._run_steps()
        finally:
            for log in self._logs:
                log.close()

    def _run_steps(self) -> None:
        micro_batches = self.context.micro_batches(self.start_step)
        self._meter = self._new_meter()
        self._started_s = time.monotonic()
        for step in range(self.start_step, self.total_steps):
            with self._meter.waiting():
                batch = self._on_device(next(micro_batches))
            lr = learning_rate(step, self.total_steps, self.config.optim)
            with self._meter.step():
                result = self.engine.train_step(batch, lr)
            self._count_skipped(step, result)
            done = step + 1
            ends_epoch = done % self.order.steps_per_epoch == 0
            if done % self.config.logging.every_steps == 0 or ends_epoch or done == 1:
                self._log_step(done, result, lr)
            if ends_epoch:
                self._end_epoch(done)

    def _say_what_it_runs_on(self) -> None:
        if rank() == 0:
            train = self.config.train
            self.context.say(
                f"train: {self.config.cluster.num_workers} workers on "
                f"{device_name(self.engine.device)}, {backend()}, {self.engine.precision}, "
                f"ZeRO-{train.zero_stage}"
            )

    def _new_meter(self) -> StepMeter:
        return StepMeter(
            self.config.train.global_batch,
            step_flops(self.config, self.tokenizer.vocab_size),
            self.config.cluster.num_workers,
            self.engine.device,
            self.engine.precision,
        )

    def _count_skipped(self, step: int, result: StepResult) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if result.skipped else 0
        self._skipped += result.skipped
        if self._skipped_in_a_row > self.config.train.max_skipped_in_a_row:
            ids = self.order.sample_ids(step).tolist()
            raise RunError(
                f"step {step}: the loss was not finite {self._skipped_in_a_row} times in a row, "
                f"more than train.max_skipped_in_a_row ({self.config.train.max_skipped_in_a_row}); "
                f"lower optim.lr or take train.precision=fp32. The batch's samples: {ids}"
            )

    def _on_device(self, micro_batch: dict[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
        with warnings.catch_warnings():  # Ray's arrays are read-only, and nobody writes to them
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            tensors = {name: torch.from_numpy(micro_batch[name]) for name in INPUTS}
            if self.config.data.captions_per_image > 1:
                tensors["image_ids"] = torch.from_numpy(micro_batch["sample_ids"])
        return {name: tensor.to(self.engine.device) for name, tensor in tensors.items()}

    def _log_step(self, step: int, result: StepResult, lr: float) -> None:
        entry = {
            "step": step,
            "epoch": step / self.order.steps_per_epoch,
            "loss": mean_over_ranks(result.loss),
            "scale": float(result.scale),
            "lr": lr,
            "grad_norm": result.grad_norm,
            "skipped": self._skipped,
            **self._meter.figures(),
        }
        self.log.append(entry)
        self._write_logs(entry)
        self._show_progress()

    def _write_logs(self, figures: dict[str, float]) -> None:
        for log in self._logs:
            log.write(self.log[-1]["step"], figures)

    def _show_progress(self) -> None:
        if rank() == 0:
            step, passed_s = self.log[-1]["step"], time.monotonic() - self._started_s
            left_s = (self.total_steps - step) * passed_s / (step - self.start_step)
            self.context.progress(
                self.log[-1] | {"total_steps": self.total_steps, "left_s": left_s}
            )

    def _end_epoch(self, step: int) -> None:
        epoch = step // self.order.steps_per_epoch
        with self.engine.masters.averaged():
            metrics = self.validation(self.engine)
        self.log[-1] = self.log[-1] | metrics
        self._write_logs(metrics)
        self._show_progress()
        if epoch % self.config.checkpoint.every_epochs == 0 or step == self.total_steps:
            self._checkpoint(step, epoch, metrics)
        self.context.report({"step": step, "epoch": epoch, "loss": self.log[-1]["loss"], **metrics})
        self._meter.restart()

    def _checkpoint(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        state = self.engine.masters.state()
        with self.engine.masters.averaged():
            weights = self.engine.masters.weights()
        if rank() == 0:
            best = best_of(self.checkpoints.list())
            if best is None or metrics[BEST_METRIC] >= best.metrics[BEST_METRIC]:
                self._write_weights(weights, {"step": step, "epoch": epoch, "metrics": metrics})
            lines = "".join(json.dumps(entry) + "\n" for entry in self.log)
            self.run.write_bytes(METRICS_KEY, lines.encode())
            identity = run_identity(self.config, self.manifest, self.tokenizer)
            self.checkpoints.write(step, epoch, state, metrics, identity)
            self.checkpoints.prune(self.config.checkpoint.keep_last)
        barrier()

    def _write_weights(self, weights: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
        files = pack_weights(weights, self.architecture, self.tokenizer, about)
        for name, data in files.items():
            self.run.write_bytes(f"weights/{name}", data)

    def _resume(self) -> int:
        newest = broadcast_object(self.checkpoints.newest() if rank() == 0 else None)
        if rank() == 0:
            self.run.write_bytes("config.yaml", dump_config(self.config).encode())
            self.run.write_json("deepspeed.json", deepspeed_config(self.config))
        if newest is None:
            return 0
        self.engine.masters.load_state(self.checkpoints.read(newest))
        lines = self.run.read_bytes(METRICS_KEY).decode().splitlines()
        self.log = [entry for entry in map(json.loads, lines) if entry["step"] <= newest.step]
        return newest.step
