"""The engine at every ZeRO stage and precision, in a real group of two processes."""

from __future__ import annotations

import os

import pytest
import torch
from conftest import SHAPES_YAML
from process_group import run_ranks
from torch import Tensor

from clip_ray.collectives import rank

CASES = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]
Outcome = dict[str, float | bool]


def outcomes_of_this_rank() -> dict[str, Outcome]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    return {f"{stage} {precision}": outcome(stage, precision) for stage, precision in CASES}


def outcome(stage: int, precision: str) -> Outcome:
    engine = make_engine(stage, precision)
    largest = 0.0
    for _ in range(5):
        engine._set_master(engine.module.logit_scale, torch.tensor([4.7]))
        engine.train_step(batch(), lr=1e-3)
        scale = engine.weights()["logit_scale"]
        largest = max(largest, float(scale))
    state = engine.state()
    resumed = make_engine(stage, precision)
    resumed.load_state(state, step=5)
    restored = same(state, resumed.state())
    for each in (engine, resumed):
        each.train_step(batch(), lr=1e-3)
    return {
        "bound": engine.max_logit_scale,
        "largest": largest,
        "restored": restored,
        "continued": same(engine.state(), resumed.state()),
    }


def make_engine(stage: int, precision: str):
    from clip_ray.config_file import load_config
    from clip_ray.model.clip import CLIP
    from clip_ray.training.engine import Engine

    overrides = [
        f"train.zero_stage={stage}",
        f"train.precision={precision}",
        "train.global_batch=8",
    ]
    config = load_config(SHAPES_YAML, overrides)
    torch.manual_seed(0)
    return Engine(CLIP(config.model, vocab_size=400), config)


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rank())
    return {
        "images": torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8, generator=generator),
        "token_ids": torch.randint(4, 400, (4, 1, 40), dtype=torch.int32, generator=generator),
        "token_lengths": torch.randint(5, 40, (4, 1), dtype=torch.int32, generator=generator),
    }


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.cluster
def test_clamp_holds_and_state_resumes_bit_for_bit() -> None:
    for outcomes in run_ranks(2, outcomes_of_this_rank):
        assert len(outcomes) == len(CASES)
        for case, result in outcomes.items():
            assert result["largest"] <= result["bound"] + 1e-6, case
            assert result["restored"], case
            assert result["continued"], case
