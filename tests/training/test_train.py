"""The main job on a small set: two Ray Train workers, ZeRO-2, over a real S3 server."""

from __future__ import annotations

import json

import pytest
from conftest import override
from PIL import Image
from test_gauges import dashboard_figures

from clip_ray import load_model
from clip_ray.config import Config
from clip_ray.pipeline import evaluate_model, prepare_data, search_images, session, train_model
from clip_ray.storage import Storage
from clip_ray.training.checkpoint import Checkpoints


@pytest.mark.cluster
@pytest.mark.s3
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "cluster",
    [
        ["cluster.num_workers=2"],
        pytest.param(["cluster.num_workers=1", "cluster.gpus_per_worker=1"], marks=pytest.mark.gpu),
    ],
    ids=["two workers", "a GPU"],
)
def test_prepare_train_resume_and_load(small_config: Config, cluster: list[str]) -> None:
    small_config, said = override(small_config, cluster), []
    run = Storage(small_config.run_root)
    with session(small_config, said.append):
        prepare_data(small_config, said.append)
        prepare_data(small_config, said.append)
        train_model(small_config, said.append)
        uncut = parts(run)
        train_model(small_config, said.append)
        forget_newest(run)
        train_model(small_config, said.append)
        results = evaluate_model(small_config, said.append)
    assert any("is there already" in line for line in said)
    assert any("is trained already: 8 steps" in line for line in said)
    assert any("resumes at step 4 of 8" in line for line in said)
    newest = Checkpoints(run).newest()
    assert newest is not None
    assert newest.step == 8
    # Ray's metrics carry what is logged, and the Grafana dashboard asks for no other.
    logged = [json.loads(line) for line in run.read_bytes("metrics.jsonl").splitlines()]
    names = {name.replace("@", "_at_") for entry in logged for name in entry}
    assert dashboard_figures() <= names
    assert parts(run) == uncut  # checksums of parameters and moments: bit for bit
    assert 0 <= newest.metrics["image_retrieval_recall@1"] <= 1
    model = load_model(f"{small_config.run_root}/weights")
    assert model.encode_text(["a red star"]).shape == (1, 128)
    assert model.encode_image([Image.new("RGB", (80, 70))]).shape == (1, 128)
    assert set(results) == {"zeroshot_retrieval", "zeroshot_classification"}
    hits = search_images(small_config, "a red star", None, top=3)
    assert len(hits) == 3
    assert hits[0].score >= hits[1].score
    assert len(hits[0].captions) == 5


def parts(run: Storage) -> dict[str, str]:
    """The checksums of the newest checkpoint's state."""
    checkpoints = Checkpoints(run)
    newest = checkpoints.newest()
    assert newest is not None
    files = checkpoints.manifest(newest).files
    return {file.name: file.sha256 for file in files if file.name.startswith("part-")}


def forget_newest(run: Storage) -> None:
    checkpoints = Checkpoints(run)
    newest = checkpoints.newest()
    assert newest is not None
    ledger = checkpoints.ledger
    owner = ledger.take(print)
    ledger.forget(owner, ledger.begin_attempt(owner), {newest.folder})
    ledger.give_back(owner)
