"""The engine at every ZeRO stage and precision, in a real group of two processes."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch
from conftest import SHAPES_YAML
from engine_state import whole_state
from process_group import device, run_on_gpu, run_ranks
from torch import Tensor

from clip_ray.collectives import rank

CASES = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16", "fp16")]
AVERAGED = "train.ema_decay=0.9"
Outcome = dict[str, float | bool]


def outcomes_of_this_rank() -> dict[str, Outcome]:
    return {f"{stage} {precision}": outcome(stage, precision) for stage, precision in CASES}


def outcome(stage: int, precision: str) -> Outcome:
    engine = make_engine(stage, precision, AVERAGED)
    largest, stepped = 0.0, False
    for _ in range(8):
        engine.masters.set(engine.module.logit_scale, torch.tensor([4.7], device=device()))
        stepped = not engine.train_step(batch(), lr=1e-3).skipped
        scale = engine.masters.weights()["logit_scale"]
        largest = max(largest, float(scale))
    state = whole_state(engine)
    resumed = make_engine(stage, precision, AVERAGED)
    resumed.masters.load_state(state)
    restored = same(state, whole_state(resumed))
    for each in (engine, resumed):
        each.train_step(batch(), lr=1e-3)
    return {
        "bound": engine.max_logit_scale,
        "largest": largest,
        "stepped": stepped,  # in fp16 not from the start: the loss scale has to come down first
        "restored": restored,
        "continued": same(whole_state(engine), whole_state(resumed)),
    }


def make_engine(stage: int, precision: str, *more: str):
    """Of towers with one layer each, where `more` says nothing else."""
    from clip_ray.config_file import load_config
    from clip_ray.model.clip import CLIP
    from clip_ray.training.engine import Engine

    overrides = [
        f"train.zero_stage={stage}",
        f"train.precision={precision}",
        "train.global_batch=8",
        "model.image.kwargs.depth=1",
        "model.text.kwargs.num_hidden_layers=1",
        *more,
    ]
    config = load_config(SHAPES_YAML, overrides)
    torch.manual_seed(0)
    return Engine(CLIP(config.model, 400, config.loss), config)


def batch(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(10 * seed + rank())
    tensors = {
        "images": torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8, generator=generator),
        "token_ids": torch.randint(4, 400, (4, 1, 40), dtype=torch.int32, generator=generator),
        "token_lengths": torch.randint(5, 40, (4, 1), dtype=torch.int32, generator=generator),
    }
    return {name: tensor.to(device()) for name, tensor in tensors.items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.cluster
def test_clamp_holds_and_state_resumes_bit_for_bit() -> None:
    for outcomes in run_ranks(2, outcomes_of_this_rank):
        check(outcomes)


@pytest.mark.gpu
def test_clamp_holds_and_state_resumes_on_a_gpu() -> None:
    check(run_on_gpu(outcomes_of_this_rank))


def check(outcomes: dict[str, Outcome]) -> None:
    assert len(outcomes) == len(CASES)
    for case, result in outcomes.items():
        assert result["largest"] <= result["bound"] + 1e-6, case
        assert result["stepped"], case
        assert result["restored"], case
        assert result["continued"], case


def skips_of_this_rank() -> list[bool]:
    return [step_is_skipped(*case) for case in itertools.product((0, 2, 3), (4, 2))]


def step_is_skipped(stage: int, micro_batch: int) -> bool:
    """One rank's loss is not finite; then a step as ever."""
    engine = make_engine(stage, "fp32", f"train.micro_batch={micro_batch}")
    before, right = engine.masters.weights(), engine._loss
    if rank() == 1:
        engine._loss = lambda outputs, image_ids: right(outputs, image_ids) * torch.nan
    first = engine.train_step(batch(), lr=1e-3, votes=lambda: [rank(), 3 - rank()])
    untouched = same(before, engine.masters.weights())
    engine._loss = right
    second = engine.train_step(batch(), lr=1e-3, votes=lambda: [0, rank()])
    assert (first.voted, second.voted) == ([1, 3], [0, 1])
    skipped, stepped = first.skipped, not second.skipped
    return skipped and untouched and stepped and not same(before, engine.masters.weights())


@pytest.mark.cluster
def test_no_rank_steps_where_one_has_a_loss_that_is_not_finite() -> None:
    assert run_ranks(2, skips_of_this_rank) == [[True] * 6] * 2


def unequal_parts_of_this_rank() -> str:
    engine = make_engine(2, "fp32")
    part = {name: tensor[: 4 - rank()] for name, tensor in batch().items()}
    if rank() == 0:
        return ""  # it would wait for the other in vain
    with pytest.raises(ValueError) as error:
        engine.train_step(part, lr=1e-3)
    return str(error.value)


@pytest.mark.cluster
def test_unequal_parts_of_a_batch_are_refused() -> None:
    assert (
        "rank 1 has 3 images: every rank must have" in run_ranks(2, unequal_parts_of_this_rank)[1]
    )


def offloaded_of_this_rank(empty_folder: str) -> list[bool]:
    # On a machine without a compiler, where nothing has been compiled.
    os.environ["PATH"] = os.environ["TORCH_EXTENSIONS_DIR"] = empty_folder
    kept = []
    for stage, offload in ((2, "optimizer"), (3, "optimizer"), (3, "parameters")):
        plain = make_engine(stage, "fp32")
        offloaded = make_engine(stage, "fp32", f"train.offload={offload}")
        for engine in (plain, offloaded):
            engine.train_step(batch(), lr=1e-3)
        kept.append(close(whole_state(plain), whole_state(offloaded)))
    return kept


def fixed_temperature_of_this_rank() -> list[bool]:
    kept = []
    for stage in (0, 2, 3):
        engine = make_engine(stage, "fp32", "loss.learn_temperature=false")
        before = engine.masters.weights()["logit_scale"]
        engine.train_step(batch(), lr=1e-3)
        resumed = make_engine(stage, "fp32", "loss.learn_temperature=false")
        resumed.masters.load_state(whole_state(engine))
        kept.append(torch.equal(before, engine.masters.weights()["logit_scale"]))
        kept.append(same(whole_state(engine), whole_state(resumed)))
    return kept


@pytest.mark.cluster
def test_a_fixed_temperature_stays_and_is_kept_with_the_state() -> None:
    assert run_ranks(2, fixed_temperature_of_this_rank) == [[True] * 6] * 2


def recomputed_of_this_rank() -> bool:
    engines = make_engine(3, "fp32"), make_engine(3, "fp32", "train.recompute=[image, text]")
    for engine in engines:
        engine.train_step(batch(), lr=1e-3)
    return close(*(whole_state(engine) for engine in engines))


@pytest.mark.cluster
def test_activations_made_again_train_the_same() -> None:
    assert run_ranks(2, recomputed_of_this_rank) == [True, True]


def close(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.allclose(left[name], right[name], rtol=1e-5, atol=1e-7) for name in left
    )


@pytest.mark.cluster
def test_what_is_offloaded_trains_the_same_and_needs_no_compiler(tmp_path: Path) -> None:
    assert run_ranks(2, offloaded_of_this_rank, str(tmp_path)) == [[True] * 3] * 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_what_is_offloaded_or_made_again_trains_the_same_on_a_gpu(tmp_path: Path) -> None:
    assert run_on_gpu(offloaded_of_this_rank, str(tmp_path)) == [True] * 3
    assert run_on_gpu(recomputed_of_this_rank)
