"""A new run begins with another's weights, or with its whole state; or is told why it cannot."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import override
from plain_run import plain_run
from process_group import run_ranks

from clip_ray.config import Config
from clip_ray.config_file import parse_config
from clip_ray.data.prepare import prepare
from clip_ray.errors import ConfigError, RunError
from clip_ray.pipeline import session
from clip_ray.storage import Storage
from clip_ray.training.checkpoint import Checkpoints

pytestmark = [pytest.mark.cluster, pytest.mark.s3]


@pytest.fixture
def prepared(small_config: Config) -> Config:
    config = override(
        small_config, ["name=base", "logging.tensorboard=false", "checkpoint.keep_every=4"]
    )
    with session(config, print):
        prepare(config.data, Storage(config.data_root), print)
    return config


def begun_of_this_rank(tree: dict) -> dict[str, object]:
    base = parse_config(tree, origin="test")
    ended = plain_run(base)
    assert ended is not None
    weights = f"{base.run_root}/weights"
    child = override(base, ["name=child", "start.fork=base@4", "optim.lr=1e-5", "train.epochs=3"])
    forked = plain_run(child)
    assert forked is not None
    hotter = override(base, ["name=hotter", "start.fork=base@4", "loss.temperature=0.05"])
    plain_run(hotter, stop_at=5)
    newest = override(base, ["name=newest", f"start.fork={base.run_root}", "train.epochs=3"])
    continued = plain_run(newest)
    assert continued is not None
    tuned = plain_run(override(base, ["name=tuned", f"start.weights={weights}"]), stop_at=1)
    plain = plain_run(override(base, ["name=plain"]), stop_at=1)
    assert tuned is not None
    assert plain is not None
    errors = {}
    for name, options in {
        "another model": ["start.fork=base", "model.embed_dim=64"],
        "another batch": ["start.fork=base", "train.global_batch=16"],
        "another loss": ["start.fork=base", "loss.kind=sigmoid"],
        "frozen layers": ["start.fork=base", "optim.text.trained_groups=0"],
        "no such step": ["start.fork=base@5"],
        "weights of another model": [f"start.weights={weights}", "model.embed_dim=64"],
    }.items():
        try:
            plain_run(override(base, ["name=wrong", *options]))
        except RunError as error:
            errors[name] = str(error)
    return {
        "forked": forked.start_step,
        "same order": all(forked.ids[step] == ended.ids[step] for step in range(4, 8)),
        "other rate": forked.losses[8] != ended.losses[8],
        "changed by another temperature": changed_by(hotter, base, step=4),
        "log before": forked.losses[4] == ended.losses[4],
        "continued": (continued.start_step, sorted(continued.ids)),
        "tuned loss": tuned.losses[1],
        "plain loss": plain.losses[1],
        "errors": errors,
    }


def changed_by(fork: Config, base: Config, step: int) -> dict[str, list[float]]:
    """The tensors of a fork's first checkpoint that are not those of the run it comes from."""
    ours, theirs = (
        Checkpoints(Storage(config.run_root)).read(
            next(e for e in Checkpoints(Storage(config.run_root)).list() if e.step == step)
        )
        for config in (fork, base)
    )
    assert ours.tensors.keys() == theirs.tensors.keys()
    return {
        name: tensor.tolist()
        for name, tensor in ours.tensors.items()
        if not torch.equal(tensor, theirs.tensors[name])
    }


def test_runs_begin_with_what_another_has_made(prepared: Config) -> None:
    (found,) = run_ranks(1, begun_of_this_rank, prepared.model_dump(mode="json"))
    assert found["forked"] == 4
    assert found["same order"]
    assert found["other rate"]
    assert found["log before"]
    assert found["changed by another temperature"] == {
        "param/logit_scale": [pytest.approx(math.log(20))],
        "exp_avg/logit_scale": [0.0],
        "exp_avg_sq/logit_scale": [0.0],
    }
    assert found["continued"] == (8, [8, 9, 10, 11])
    assert found["tuned loss"] < found["plain loss"]
    errors = found["errors"]
    assert "model was" in errors["another model"]
    assert "train.global_batch was 32, is 16" in errors["another batch"]
    assert "loss.kind was info_nce, is sigmoid" in errors["another loss"]
    assert "optim.text.trained_groups was None, is 0" in errors["frozen layers"]
    assert "has no checkpoint 5; it has [4, 8]" in errors["no such step"]
    assert "does not fit the config's model" in errors["weights of another model"]
    checkpoints = Checkpoints(Storage(override(prepared, ["name=base"]).run_root))
    assert checkpoints.ledger.read().pins == ()


def test_a_run_begins_with_one_of_the_two(small_config: Config) -> None:
    with pytest.raises(ConfigError, match="weights and fork are both set"):
        override(small_config, ["start.weights=a", "start.fork=b"])
    with pytest.raises(ConfigError, match=r"start\.fork"):
        override(small_config, ["start.fork=base@newest"])
