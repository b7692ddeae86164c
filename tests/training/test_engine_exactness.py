"""Through the engine: the gradient of every parameter is one process's on the whole batch.

World sizes and losses in full; ZeRO stages, numbers of forwards and methods pairwise. In float32,
to 1e-5 relative. AdamW's first moment after one step is the gradient, times 1 - beta.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import SHAPES_YAML
from engine_state import whole_state
from process_group import device, run_on_gpu, run_ranks
from torch import Tensor

from clip_ray.collectives import rank, world_size
from clip_ray.config import Config
from clip_ray.config_file import load_config
from clip_ray.loss.reference import (
    info_nce_reference,
    masked_info_nce_reference,
    sigmoid_reference,
)

GLOBAL_BATCH, SIZE, LENGTH, VOCABULARY = 72, 16, 12, 60
TOLERANCE = 1e-5
LOSSES: list[dict[str, Any]] = [
    {"kind": "info_nce", "captions": 1},
    {"kind": "info_nce", "captions": 2, "label_smoothing": 0.1},
    {"kind": "info_nce", "captions": 2, "positives": "masked"},
    {"kind": "sigmoid", "captions": 2},
]
METHODS = ("gathered", "tiled", "ring")


@dataclass(frozen=True)
class Case:
    """One engine and one step."""

    loss: int
    zero_stage: int
    forwards: int
    method: str

    def config(self, ranks: int) -> Config:
        loss = dict(LOSSES[self.loss])
        captions = loss.pop("captions")
        fields = loss | {"method": self.method, "tile": 7, "bias": -3.0}
        micro_batch = GLOBAL_BATCH // ranks // self.forwards
        return load_config(
            SHAPES_YAML,
            [
                *(f"loss.{name}={value}" for name, value in fields.items()),
                f"data.captions_per_image={captions}",
                f"model.image.size={SIZE}",
                "model.image.kwargs.depth=1",
                "model.text.kwargs.num_hidden_layers=1",
                f"model.text.context_length={LENGTH}",
                f"train.global_batch={GLOBAL_BATCH}",
                f"train.micro_batch={micro_batch}",
                f"cluster.num_workers={ranks}",
                f"train.zero_stage={self.zero_stage}",
                "optim.grad_clip_norm=null",
            ],
        )


# Each loss meets each stage; forwards and methods change along, so that each pair comes.
CASES = [
    Case(loss, stage, forwards=1 + (loss + stage) % 3, method=METHODS[(loss + 2 * stage) % 3])
    for loss, stage in itertools.product(range(len(LOSSES)), range(4))
]


def batch(captions: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def random(low: int, high: int, *shape: int) -> Tensor:
        numbers = torch.randint(low, high, (GLOBAL_BATCH, *shape), generator=generator)
        return numbers.to(device())

    return {
        "images": random(0, 256, SIZE, SIZE, 3).to(torch.uint8),
        "token_ids": random(4, VOCABULARY, captions, LENGTH),
        "token_lengths": random(3, LENGTH, captions),
    }


def new_model(config: Config):
    from clip_ray.model.clip import CLIP

    torch.manual_seed(0)
    return CLIP(config.model, VOCABULARY, config.loss).to(device())


def outcomes_of_this_rank(every: int) -> list[dict[str, Tensor]]:
    return [outcome(case) for case in CASES[::every]]


def outcome(case: Case) -> dict[str, Tensor]:
    from clip_ray.training.engine import Engine

    config = case.config(world_size())
    engine = Engine(new_model(config), config)
    whole = batch(config.data.captions_per_image)
    mine = {name: tensor.chunk(world_size())[rank()] for name, tensor in whole.items()}
    result = engine.train_step(mine, lr=1e-3)
    moments = {
        name.removeprefix("exp_avg/"): tensor / (1 - config.optim.betas[0])
        for name, tensor in whole_state(engine).items()
        if name.startswith("exp_avg/")
    }
    return {"loss": result.loss, **moments}


def expected(case: Case) -> dict[str, Tensor]:
    config = case.config(1)
    model = new_model(config)
    whole = batch(config.data.captions_per_image)
    images, texts, scale, bias = model(
        whole["images"], whole["token_ids"].flatten(0, 1), whole["token_lengths"].flatten()
    )
    assert images is not None
    assert texts is not None
    if bias is not None:
        loss = sigmoid_reference(images, texts, scale, bias)
    elif config.loss.positives == "masked":
        loss = masked_info_nce_reference(images, texts, scale)
    else:
        smoothing = config.loss.label_smoothing
        loss = info_nce_reference(images, texts, scale, None, smoothing)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.cluster
@pytest.mark.exactness
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_gradients_of_the_engine_are_those_of_one_process(ranks: int) -> None:
    compare(ranks, every=1)


@pytest.mark.cluster
def test_a_sample_of_the_engines_at_an_odd_world_size() -> None:
    compare(3, every=5)


def found_and_expected() -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    return outcomes_of_this_rank(1), [expected(case) for case in CASES]


@pytest.mark.gpu
def test_gradients_on_a_gpu() -> None:
    found, wanted = run_on_gpu(found_and_expected)
    check([found], wanted, every=1)


def compare(ranks: int, every: int) -> None:
    by_rank = run_ranks(ranks, outcomes_of_this_rank, every)
    compared = check(by_rank, [expected(case) for case in CASES[::every]], every)
    print(f"{len(CASES[::every])} engines, {compared} tensors at world size {ranks}")


def check(
    by_rank: list[list[dict[str, Tensor]]], expected: list[dict[str, Tensor]], every: int
) -> int:
    """How many tensors were compared."""
    compared = 0
    for number, (case, wanted_all) in enumerate(zip(CASES[::every], expected, strict=True)):
        norm_of_all = torch.stack([g.norm() for g in wanted_all.values()]).norm()
        for name, wanted in wanted_all.items():
            of_ranks = [outcomes[number][name] for outcomes in by_rank]
            found = torch.stack(of_ranks).mean(0) if name == "loss" else of_ranks[0]
            # A key's bias changes no attention: its gradient is rounding, and has no direction.
            scale = norm_of_all if wanted.norm() < 1e-6 * norm_of_all else wanted.norm()
            error = float((found - wanted).norm() / scale)
            assert error <= TOLERANCE, (case, name, error)
            compared += 1
    return compared
