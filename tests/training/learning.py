"""The options of the engine, and what a run with any of them shows: it learns, and logs it."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator

import pytest
from conftest import override
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from clip_ray.config import Config
from clip_ray.pipeline import train_model
from clip_ray.storage import Storage

# Each option at least once; none of them excludes another in its line.
OPTIONS = {
    "bf16": [
        "train.precision=bf16", "train.zero_stage=1", "train.ema_decay=0.9",
        "optim.image.layer_decay=0.8", "optim.text.layer_decay=0.8",
        "model.image.kwargs.depth=2",
    ],
    "fp16": [
        "train.precision=fp16", "train.zero_stage=2", "train.micro_batch=8",
        "train.recompute=[image, text]", "model.image.kwargs.patch_drop_rate=0.25",
        "model.image.kwargs.depth=2", "model.text.kwargs.num_hidden_layers=1",
    ],
    "offload_parameters": [
        "train.offload=parameters", "train.zero_stage=3", "optim.image.trained_groups=2",
        "data.captions_per_image=2",
    ],
    "offload_optimizer": [
        "train.offload=optimizer", "train.zero_stage=2", "loss.kind=sigmoid", "loss.method=ring",
        "loss.tile=8",
    ],
    "compile": [
        "train.compile=true", "train.zero_stage=0", "optim.text.trained_groups=1",
        "loss.method=tiled", "loss.tile=8", "loss.label_smoothing=0.1",
        "loss.learn_temperature=false", "model.image.kwargs.depth=1",
        "model.text.kwargs.num_hidden_layers=1",
    ],
}  # fmt: skip
FIGURES = {
    "loss", "scale", "lr", "grad_norm", "skipped", "images_per_s", "images_per_s_per_worker",
    "data_wait_share", "communication_share", "compute_share", "peak_memory_gb", "mfu",
}  # fmt: skip


def check_that_it_learns(config: Config) -> None:
    config = override(config, ["train.epochs=5", "checkpoint.every_epochs=5"])
    train_model(config, lambda line: None)
    run = Storage(config.run_root)
    log = [json.loads(line) for line in run.read_bytes("metrics.jsonl").splitlines()]
    losses = [entry["loss"] for entry in log]
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4]), losses
    assert log[-1].keys() >= FIGURES
    assert 0 < log[-1]["compute_share"] <= 1
    assert 0 < log[-1]["mfu"] < 1
    events = list(scalars(run))
    assert ("loss", 20, pytest.approx(losses[-1], rel=1e-5)) in events
    assert {name for name, _, _ in events} >= FIGURES | {"image_retrieval_recall_at_1"}


def scalars(run: Storage) -> Iterator[tuple[str, int, float]]:
    """What TensorBoard reads: records of a length, its checksum, the event, its checksum."""
    for key in run.keys("tensorboard/"):
        data, start = run.read_bytes(key), 0
        while start < len(data):
            (length,) = struct.unpack_from("<Q", data, start)
            event = Event.FromString(data[start + 12 : start + 12 + length])
            for value in event.summary.value:
                yield value.tag, event.step, value.simple_value
            start += 12 + length + 4
