"""What the engine can be told beside stage and batch: averages, frozen layers, compiled towers."""

from __future__ import annotations

import collections
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHAPES_YAML
from engine_state import whole_state
from process_group import device, run_on_gpu, run_ranks
from test_engine import batch, make_engine, same
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from clip_ray.collectives import mean_over_ranks, rank
from clip_ray.config import OptimConfig
from clip_ray.config_file import load_config
from clip_ray.data.images import decode_rgb
from clip_ray.data.tokenizer import make_tokenizer
from clip_ray.data.transforms import center_crop
from clip_ray.errors import ConfigError
from clip_ray.loss.reference import info_nce_reference
from clip_ray.model.towers import without_padding
from clip_ray.training.schedule import learning_rate

LR = 1e-3
DEEP = ("model.image.kwargs.depth=4", "model.text.kwargs.num_hidden_layers=2")
DROPOUT = ("model.image.kwargs.patch_drop_rate=0.5", "model.text.kwargs.attention_dropout=0.1")


def averages_of_this_rank() -> list[bool]:
    return [
        average_is_right(*case) for case in ((0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32"))
    ]


def average_is_right(stage: int, precision: str) -> bool:
    """The shards' average is that of the whole weights, and training does not see it."""
    engine = make_engine(stage, precision, "train.ema_decay=0.5")
    wanted = engine.masters.weights()
    for step in (1, 2):
        engine.train_step(batch(), lr=LR)
        decay = min(0.5, (1 + step) / (10 + step))
        wanted = {
            n: torch.lerp(w, engine.masters.weights()[n], 1 - decay) for n, w in wanted.items()
        }
    trained, features = engine.masters.weights(), engine.encode(images=batch()["images"])[0]
    with engine.masters.averaged():
        averaged, other = engine.masters.weights(), engine.encode(images=batch()["images"])[0]
    again = engine.encode(images=batch()["images"])[0]
    assert features is not None
    assert other is not None
    assert again is not None
    right = all(torch.allclose(averaged[n], wanted[n], rtol=1e-5, atol=1e-7) for n in wanted)
    differs = not torch.equal(features, other)
    return (
        right
        and differs
        and same(trained, engine.masters.weights())
        and torch.equal(features, again)
    )


@pytest.mark.cluster
def test_the_moving_average_on_shards_is_that_of_the_weights() -> None:
    assert run_ranks(2, averages_of_this_rank) == [[True] * 4] * 2


@pytest.mark.gpu
def test_the_moving_average_on_a_gpu() -> None:
    assert run_on_gpu(averages_of_this_rank) == [True] * 4


def changes_of_this_rank() -> list[dict[str, float]]:
    options = (
        *DEEP, "optim.image.trained_groups=2", "optim.image.layer_decay=0.5",
        "optim.text.trained_groups=0", "optim.weight_decay=0", "optim.grad_clip_norm=null",
    )  # fmt: skip
    found = []
    for stage in (0, 2, 3):
        engine = make_engine(stage, "fp32", *options)
        before = engine.masters.weights()
        engine.train_step(batch(), lr=LR)
        after = engine.masters.weights()
        resumed = make_engine(stage, "fp32", *options)
        resumed.masters.load_state(whole_state(engine))
        assert same(whole_state(engine), whole_state(resumed))
        # AdamW's first step is the learning rate, whatever the gradient's size.
        found.append({n: float((after[n] - before[n]).abs().max() / LR) for n in before})
    return found


@pytest.mark.cluster
def test_frozen_layers_stay_and_lower_ones_learn_less() -> None:
    for changes in run_ranks(2, changes_of_this_rank)[0]:
        for name, change in changes.items():
            if name.startswith(("image.trunk.blocks.3.", "image.trunk.norm")):
                wanted = 1.0
            elif name.startswith("image.trunk.blocks.2."):
                wanted = 0.5
            elif name.startswith(("image.trunk", "text.encoder")):
                wanted = 0.0
            else:
                wanted = 1.0
            assert change == pytest.approx(wanted, abs=0.03), name


def test_a_tower_has_no_more_groups_to_train_than_it_has() -> None:
    with pytest.raises(ConfigError, match=r"image.trained_groups is 9: this tower has 5 groups"):
        make_engine(2, "fp32", *DEEP, "optim.image.trained_groups=9")


def replayed_of_this_rank() -> float:
    """Patch dropout and attention dropout in two forwards, against one graph over the same two."""
    options = (*DEEP, *DROPOUT, "train.micro_batch=2", "optim.grad_clip_norm=null")
    engine = make_engine(2, "fp32", "cluster.num_workers=1", "train.global_batch=4", *options)
    model = make_model(*options).to(device())
    torch.manual_seed(7)
    engine.train_step(batch(), lr=LR)
    torch.manual_seed(7)
    model.train()
    parts = [
        model(images, ids.flatten(0, 1), lengths.flatten())
        for images, ids, lengths in zip(*(t.split(2) for t in batch().values()), strict=True)
    ]
    images, texts = (torch.cat([part[side] for part in parts]) for side in (0, 1))
    info_nce_reference(images, texts, parts[0][2]).backward()
    state, errors = whole_state(engine), []
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        if parameter.grad.norm() > 1e-6:
            found = state[f"exp_avg/{name}"].to(device()) / (1 - 0.9)
            errors.append(float((found - parameter.grad).norm() / parameter.grad.norm()))
    return max(errors)


def make_model(*more: str):
    from clip_ray.model.clip import CLIP

    config = load_config(SHAPES_YAML, list(more))
    torch.manual_seed(0)
    return CLIP(config.model, 400, config.loss)


@pytest.mark.cluster
def test_dropout_is_replayed_in_the_second_forward() -> None:
    assert run_ranks(1, replayed_of_this_rank)[0] < 1e-5


@pytest.mark.gpu
def test_dropout_is_replayed_on_a_gpu() -> None:
    assert run_on_gpu(replayed_of_this_rank) < 1e-5


def compiled_of_this_rank() -> list[float]:
    from torch._dynamo.utils import counters  # slow to import

    options = (*DROPOUT, "train.micro_batch=2")
    found = []
    for stage in (0, 2):
        states, graphs = [], []
        for compiled in ("false", "true"):
            engine = make_engine(stage, "fp32", *options, f"train.compile={compiled}")
            torch.manual_seed(7)
            for text_length in (40, 24, 32):
                engine.train_step(with_texts_of(text_length), lr=LR)
                if compiled == "true":
                    graphs.append(counters["stats"]["unique_graphs"])
            states.append(whole_state(engine))
        assert len(set(graphs)) == 1, graphs  # compiled once for all lengths
        found.append(distance(*states))
    return found


def with_texts_of(length: int) -> dict[str, Tensor]:
    whole = batch()
    lengths = whole["token_lengths"].clamp(max=length)
    lengths[::2] = length
    token_ids = without_padding(whole["token_ids"], lengths)
    return whole | {"token_ids": token_ids, "token_lengths": lengths}


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Of the gradients, which AdamW's first moment has, relative to all of them."""
    moments = [name for name in left if name.startswith("exp_avg/")]
    difference = torch.stack([(left[name] - right[name]).norm() for name in moments]).norm()
    return float(difference / torch.stack([left[name].norm() for name in moments]).norm())


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_compiled_towers_train_as_eager_ones_at_all_lengths_dropout_included() -> None:
    for errors in run_ranks(2, compiled_of_this_rank):
        assert max(errors) < 1e-5


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_compiled_towers_train_as_eager_ones_on_a_gpu() -> None:
    assert max(run_on_gpu(compiled_of_this_rank)) < 1e-5


def reductions_of_this_rank() -> dict[str, int]:
    return {
        f"{stage} {forwards}": reductions(stage, forwards)
        for stage in range(4)
        for forwards in (1, 2, 4)
    }


def reductions(stage: int, forwards: int) -> int:
    """Collectives that sum something over the ranks, in one step."""
    engine = make_engine(stage, "fp32", f"train.micro_batch={4 // forwards}")
    engine.train_step(batch(), lr=LR)
    with profile(activities=[ProfilerActivity.CPU], acc_events=False) as profiler:
        engine.train_step(batch(), lr=LR)
    results = profiler.profiler
    assert results is not None
    assert results.kineto_results is not None
    names = collections.Counter(event.name() for event in results.kineto_results.events())
    return names["c10d::allreduce_"] + names["c10d::_reduce_scatter_base_"]


@pytest.mark.cluster
def test_gradients_are_reduced_once_or_with_each_forward() -> None:
    """ZeRO-0 and 1 keep whole gradients until the last forward; 2 and 3 keep a shard, so each
    forward's are reduced: once, and nothing more."""
    found = run_ranks(2, reductions_of_this_rank)[0]
    for stage in range(4):
        for forwards in (2, 4):
            more = found[f"{stage} {forwards}"] - found[f"{stage} 1"]
            assert more == (forwards - 1 if stage >= 2 else 0), (stage, forwards)


def curves_of_this_rank(folder: str) -> list[list[float]]:
    batches = shapes_batches(Path(folder))
    return [curve(stage, batches) for stage in range(4)]


def shapes_batches(folder: Path) -> list[dict[str, Tensor]]:
    """This rank's half of four global batches of 32 shapes, each with its first caption."""
    records = json.loads((folder / "dataset_flickr30k.json").read_text())["images"]
    records = [record for record in records if record["split"] == "train"][rank() :: 2]
    files = [folder / "flickr30k-images" / record["filename"] for record in records]
    images = np.stack([center_crop(decode_rgb(file.read_bytes()), 64) for file in files])
    captions = [record["sentences"][0]["raw"] for record in records]
    text = load_config(SHAPES_YAML).model.text
    ids, lengths = make_tokenizer(text, captions)(captions)
    tensors = {"images": images, "token_ids": ids[:, None], "token_lengths": lengths[:, None]}
    parts = {name: torch.from_numpy(array).split(16) for name, array in tensors.items()}
    return [dict(zip(parts, part, strict=True)) for part in zip(*parts.values(), strict=True)]


def curve(stage: int, batches: list[dict[str, Tensor]]) -> list[float]:
    """The loss over the whole batch at 50 steps."""
    engine = make_engine(stage, "fp32", *DEEP, "train.global_batch=32")
    optim = OptimConfig(lr=1.5e-3, warmup_steps=2)
    losses = []
    for step in range(50):
        result = engine.train_step(batches[step % 4], lr=learning_rate(step, 50, optim))
        losses.append(mean_over_ranks(result.loss))
    return losses


@pytest.mark.cluster
def test_all_stages_have_the_same_loss_for_fifty_steps(raw_shapes: Path) -> None:
    unsharded, *sharded = run_ranks(2, curves_of_this_rank, str(raw_shapes))[0]
    assert unsharded[-1] < 0.9 * unsharded[0]
    for curve_of_stage in sharded:
        assert curve_of_stage == pytest.approx(unsharded, abs=1e-4)
