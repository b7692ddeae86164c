"""The training loop of one worker. It knows a WorkerContext, not Ray."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch

from clip_ray.collectives import (
    all_gather_objects,
    backend,
    broadcast_object,
    max_over_ranks,
    mean_over_ranks,
    rank,
    world_size,
)
from clip_ray.config import Config
from clip_ray.data.shards import read_manifest
from clip_ray.data.tokenizer import CaptionTokenizer
from clip_ray.errors import RunError
from clip_ray.model.clip import CLIP
from clip_ray.model.pretrained import load_weights, pack_weights
from clip_ray.storage import Storage
from clip_ray.training.checkpoint import Checkpoint, Checkpoints
from clip_ray.training.context import Asked, WorkerContext
from clip_ray.training.engine import Engine, StepResult, deepspeed_config
from clip_ray.training.feed import on_device
from clip_ray.training.flops import StepFlops
from clip_ray.training.hardware import device_name, seed_generators
from clip_ray.training.ledger import Entry
from clip_ray.training.meter import StepMeter
from clip_ray.training.run import make_order, run_identity, step_seed
from clip_ray.training.run_log import open_run_logs
from clip_ray.training.saver import Saver
from clip_ray.training.schedule import learning_rate
from clip_ray.training.stragglers import straggler
from clip_ray.training.validation import Validation


class Trainer:
    """A run on this rank: made, resumed, stepped to its end. Every rank must do the same."""

    def __init__(self, config: Config, tokenizer: CaptionTokenizer, context: WorkerContext) -> None:
        torch.manual_seed(config.seed)
        self._made_s = time.monotonic()
        self.config, self.tokenizer, self.context = config, tokenizer, context
        run = Storage(config.run_root)
        self.checkpoints = Checkpoints(run)
        data = Storage(config.data_root)
        self.manifest = read_manifest(data)
        self.order = make_order(config, self.manifest)
        self.total_steps = self.order.steps_per_epoch * config.train.epochs
        attempt = broadcast_object(self._begin_attempt(run) if rank() == 0 else None)
        entries = broadcast_object(self.checkpoints.list() if rank() == 0 else None)
        model = CLIP(config.model, tokenizer.vocab_size, config.loss)
        if config.start.weights is not None and not entries:
            load_weights(model, config.start.weights)
        self.architecture = model.architecture
        self.engine = Engine(model, config)
        self.validation = Validation(config, data, self.manifest, tokenizer)
        self.log: list[dict[str, Any]] = []
        self._skipped = self._skipped_in_a_row = 0
        identity = run_identity(config, self.manifest, tokenizer)
        self.saver = Saver(run, config.checkpoint, identity, context.owner, attempt, context.say)
        self.start_step = self._resume(entries)
        self._logs = open_run_logs(config, self.start_step) if rank() == 0 else []

    def train(self) -> None:
        """Runs from the newest checkpoint to the last step, or to a stop that is asked for."""
        self._say_what_it_runs_on()
        try:
            self._run_steps()
        finally:
            for log in self._logs:
                log.close()

    def _run_steps(self) -> None:
        micro_batches = self.context.micro_batches(range(self.start_step, self.total_steps))
        twice = self.config.data.captions_per_image > 1
        batches = on_device(micro_batches, self.engine.device, with_image_ids=twice)
        self._meter = self._new_meter()
        flops = StepFlops(self.config, self.tokenizer.vocab_size)
        self._nodes = all_gather_objects(self.context.node)
        self._started_s = time.monotonic()
        for step in range(self.start_step, self.total_steps):
            with self._meter.waiting():
                batch = next(batches)
            lr = learning_rate(step, self.total_steps, self.config.optim)
            seed_generators(self.engine.device, step_seed(self.config.seed, step, rank()))
            with self._meter.step(flops(batch["token_ids"].shape[-1])):
                result = self.engine.train_step(batch, lr, self._votes)
            if step == self.start_step:
                self._first_step_at_s = time.time()
            self._count_skipped(step, result)
            if not self._after_step(step + 1, result, lr):
                break
        self.saver.finish()

    def _votes(self) -> list[int]:
        return self.saver.votes(self.context.asked())

    def _after_step(self, done: int, result: StepResult, lr: float) -> bool:
        """Logs, validates and saves what is due; whether training goes on."""
        epoch, of_epoch = divmod(done, self.order.steps_per_epoch)
        ends_epoch, ends = of_epoch == 0, done == self.total_steps
        asked, due = self.saver.poll(done, result.voted)
        if done % self.config.logging.every_steps == 0 or ends_epoch or done == 1 or due:
            self._log_step(done, result, lr)
        metrics = self._validate() if ends_epoch else {}
        every = self.config.checkpoint.every_epochs
        if due or ends or (ends_epoch and every is not None and epoch % every == 0):
            must = ends or asked > Asked.NOTHING or self.context.decided
            self.saver.save(self.engine.masters, done, epoch, metrics, self.log, self._pack, must)
        if asked >= Asked.LEAVE:
            self.saver.finish()
            if asked == Asked.LEAVE:
                raise RunError(f"a worker was told to end; the run goes on from step {done}")
            return False
        if ends_epoch:
            self._name_the_straggler()
            if self.context.decided:
                self.saver.finish()
            self.context.report(self._report(done, epoch) | metrics)
            self._meter.restart()
        return True

    def _report(self, done: int, epoch: int) -> dict[str, float]:
        """`run_s` is for how long the worker has been there, `first_step_at_s` by the clock."""
        of_epoch = [entry for entry in self.log if entry["epoch"] > epoch - 1]
        return {
            "step": done,
            "epoch": epoch,
            "loss": of_epoch[-1]["loss"],
            "images_per_s": median(entry["images_per_s"] for entry in of_epoch),
            "run_s": time.monotonic() - self._made_s,
            "first_step_at_s": self._first_step_at_s,
        }

    def _say_what_it_runs_on(self) -> None:
        if rank() == 0:
            train = self.config.train
            self.context.say(
                f"train: {world_size()} workers on "
                f"{device_name(self.engine.device)}, {backend()}, {self.engine.precision}, "
                f"ZeRO-{train.zero_stage}, from step {self.start_step}"
            )

    def _name_the_straggler(self) -> None:
        own_s = self._meter.own_s
        if rank() == 0 and own_s and (line := straggler(own_s, self._nodes)):
            self.context.say(line)

    def _new_meter(self) -> StepMeter:
        return StepMeter(
            self.config.train.global_batch,
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
            **self.saver.figures.as_dict(),
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

    def _validate(self) -> dict[str, float]:
        with self.engine.masters.averaged():
            metrics = self.validation(self.engine)
        self.log[-1] = self.log[-1] | metrics
        self._write_logs(metrics)
        self._show_progress()
        return metrics

    def _pack(self, weights: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
        last = self.log[-1]
        metrics = {name: value for name, value in last.items() if "recall" in name}
        about = {"step": last["step"], "epoch": last["epoch"], "metrics": metrics}
        return pack_weights(weights, self.architecture, self.tokenizer, about)

    def _begin_attempt(self, run: Storage) -> int:
        attempt = self.checkpoints.ledger.begin_attempt(self.context.owner)
        run.write_json("deepspeed.json", deepspeed_config(self.config))
        return attempt

    def _resume(self, entries: tuple[Entry, ...]) -> int:
        """Takes the newest checkpoint that is whole; the step to go on at."""
        for entry in reversed(entries):
            found, error = self._read(entry)
            if not any(max_over_ranks([error is not None])):
                assert found is not None
                self.engine.masters.load_state(found.tensors)
                self.log = found.log
                return entry.step
            if error is not None:
                self.context.say(f"train: step {entry.step} is not resumed from: {error}")
        if entries:
            raise RunError(
                f"{self.config.run_root}: none of its {len(entries)} checkpoints can be read"
            )
        return 0

    def _read(self, entry: Entry) -> tuple[Checkpoint | None, RunError | None]:
        try:
            return self.checkpoints.read(entry), None
        except RunError as error:
            return None, error
