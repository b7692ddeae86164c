"""A resumed run is the uncut one: bit for bit, at every ZeRO stage, and through several cuts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from conftest import make_small_config, make_storage, override
from plain_run import Ended, plain_run
from process_group import run_on_gpu, run_ranks

from clip_ray.collectives import barrier, rank
from clip_ray.config import Config
from clip_ray.config_file import parse_config
from clip_ray.data.prepare import prepare
from clip_ray.pipeline import session
from clip_ray.storage import Storage
from clip_ray.training.checkpoint import Checkpoints

pytestmark = [pytest.mark.cluster, pytest.mark.s3, pytest.mark.timeout(900)]
# Dropout and augmentation too, which draw random numbers.
OPTIONS = [
    "checkpoint.every_steps=2", "train.ema_decay=0.9", "logging.tensorboard=false",
    "model.text.kwargs.attention_dropout=0.1", "evaluation.batch=16",
    "model.image.kwargs.depth=1", "model.text.kwargs.num_hidden_layers=1",
]  # fmt: skip
CUTS = sorted(random.Random(5).sample(range(3, 8), 5))


@pytest.fixture(scope="module")
def prepared(
    s3_environment: None, raw_shapes: Path, tmp_path_factory: pytest.TempPathFactory
) -> Config:
    """A config whose data are prepared, for runs of several names."""
    config = make_small_config(make_storage("resume"), raw_shapes, tmp_path_factory.mktemp("cache"))
    config = override(config, ["cluster.num_workers=2", *OPTIONS])
    with session(config, print):
        prepare(config.data, Storage(config.data_root), print)
    return config


def same(left: Ended, right: Ended) -> bool:
    """State and losses to the last bit; the sample ids of the steps that both made."""
    return (
        left.state.keys() == right.state.keys()
        and all(torch.equal(left.state[name], right.state[name]) for name in left.state)
        and all(left.losses[step] == loss for step, loss in right.losses.items())
        and all(left.ids[step] == ids for step, ids in right.ids.items())
    )


def run_to_end(config: Config) -> Ended:
    ended = plain_run(config)
    assert ended is not None
    return ended


def cuts_of_this_rank(tree: dict) -> dict[str, bool]:
    config, found, uncut = parse_config(tree, origin="test"), {}, {}
    for stage in range(4):
        at_stage = override(config, [f"train.zero_stage={stage}", f"name=uncut-{stage}"])
        uncut[stage] = run_to_end(at_stage)
        for cut in CUTS:
            again = override(at_stage, [f"name=cut-{stage}-{cut}"])
            assert plain_run(again, cut_at=cut) is None
            resumed = run_to_end(again)
            found[f"{stage} {cut}"] = resumed.start_step < cut and same(uncut[stage], resumed)
        # Within its stage: once ZeRO-3 has been in a process, DeepSpeed's own linear layer stays
        # in PyTorch's place, and rounds otherwise.
        if stage == 2:
            thrice = override(at_stage, ["name=thrice"])
            for cut in (3, 6, 8):
                assert plain_run(thrice, cut_at=cut) is None
            found["thrice"] = same(uncut[stage], run_to_end(thrice))
    return found


def test_a_cut_run_resumes_bit_for_bit(prepared: Config) -> None:
    outcomes = run_ranks(2, cuts_of_this_rank, prepared.model_dump(mode="json"))
    assert outcomes == [dict.fromkeys(each, True) for each in outcomes]
    assert len(outcomes[0]) == 4 * len(CUTS) + 1


@pytest.mark.gpu
def test_a_cut_run_resumes_bit_for_bit_on_a_gpu(prepared: Config) -> None:
    config = override(prepared, ["cluster.num_workers=1", "train.precision=bf16"])
    found = run_on_gpu(cuts_of_this_rank, config.model_dump(mode="json"))
    assert found == dict.fromkeys(found, True)


def damages_of_this_rank(tree: dict) -> list[str | int]:
    config = override(parse_config(tree, origin="test"), ["checkpoint.keep_last=3", "name=damaged"])
    uncut = run_to_end(config)
    checkpoints = Checkpoints(Storage(config.run_root))
    damaged = checkpoints.list()[-1]
    barrier()
    if rank() == 0:
        key = f"{damaged.folder}/part-00001.safetensors"
        run = Storage(config.run_root)
        run.write_bytes(key, run.read_bytes(key)[:-100])
    barrier()
    resumed = run_to_end(config)
    assert same(uncut, resumed)
    return [resumed.start_step, *resumed.said]


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(prepared: Config) -> None:
    start, *said = run_ranks(2, damages_of_this_rank, prepared.model_dump(mode="json"))[0]
    assert start in {2, 4, 6}
    assert any("step 8 is not resumed" in str(line) and "is damaged" in str(line) for line in said)


def elastic_of_this_rank(tree: dict, name: str, stop_at: int, stage: int) -> dict:
    config = parse_config(tree, origin="test")
    ended = plain_run(
        override(config, [f"name={name}", f"train.zero_stage={stage}"]), stop_at=stop_at
    )
    assert ended is not None
    return {"losses": ended.losses, "ids": ended.ids, "start": ended.start_step}


def test_a_run_goes_on_at_other_world_sizes_and_stages(prepared: Config) -> None:
    options = [
        "train.global_batch=24", "train.epochs=40", "checkpoint.every_epochs=null",
        "checkpoint.every_steps=null", "model.text.kwargs.attention_dropout=0", "optim.lr=1e-4",
        "cluster.min_workers=1", "cluster.num_workers=3",
    ]  # fmt: skip
    tree = override(prepared, options).model_dump(mode="json")
    uncut = run_ranks(2, elastic_of_this_rank, tree, "uncut", 200, 2)
    wanted = {step: [*uncut[0]["ids"][step], *uncut[1]["ids"][step]] for step in uncut[0]["ids"]}
    for number, (workers, stage) in enumerate([(2, 2), (1, 0), (3, 3), (2, 1)]):
        ranks = run_ranks(workers, elastic_of_this_rank, tree, "elastic", 50 * (number + 1), stage)
        assert ranks[0]["start"] == 50 * number
        for step in range(50 * number, 50 * (number + 1)):
            ids = [sample_id for each in ranks for sample_id in each["ids"][step]]
            assert ids == wanted[step]
        for step, loss in ranks[0]["losses"].items():
            assert loss == pytest.approx(uncut[0]["losses"][step], rel=1e-4), step
