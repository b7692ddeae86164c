"""The jobs under the real Job API: submitted as the README says, followed, their end reported."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_head import RAY, ray_head

from clip_ray.config import Config
from clip_ray.storage import Storage

REPOSITORY = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def head(s3_environment: None) -> Iterator[dict[str, str]]:
    with ray_head(os.environ) as environment:
        yield environment


def submit(head: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit`, from a folder that holds the code and no data."""
    return subprocess.run(
        [str(RAY), "job", "submit", "--working-dir", ".", "--", "python", *arguments],
        env=os.environ | head,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


@pytest.mark.cluster
@pytest.mark.s3
@pytest.mark.timeout(900)
def test_the_main_job_by_submission(head: dict[str, str], small_config: Config) -> None:
    config = [
        "jobs/configs/shapes.yaml",
        f"storage.root={small_config.storage.root}",
        f"data.source={small_config.data.source}",
        f"data.zero_shot_source={small_config.data.zero_shot_source}",
        "train.global_batch=32",
        "train.epochs=1",
    ]
    prepared = submit(head, "jobs/prepare.py", *config)
    assert prepared.returncode == 0, prepared.stdout[-2000:]
    assert "128 train, 16 val, 32 test" in prepared.stdout
    trained = submit(head, "jobs/train.py", *config)
    assert trained.returncode == 0, trained.stdout[-2000:]
    assert "train: step 4/4" in trained.stdout  # the followed log
    assert "succeeded" in trained.stdout
    evaluated = submit(head, "jobs/evaluate.py", *config)
    assert evaluated.returncode == 0, evaluated.stdout[-2000:]
    run = Storage(small_config.run_root)
    (result,) = [key for key in run.keys("results/") if key.endswith("zeroshot_retrieval.json")]
    assert set(json.loads(run.read_bytes(result))) == {
        "dataset", "model", "pretrained", "task", "metrics", "language",
    }  # fmt: skip


@pytest.mark.cluster
@pytest.mark.s3
@pytest.mark.timeout(300)
def test_a_job_that_fails_is_reported_as_failed(head: dict[str, str]) -> None:
    failed = submit(
        head, "jobs/train.py", "jobs/configs/shapes.yaml", "storage.root=s3://no-such-bucket/x"
    )
    assert failed.returncode != 0
    assert "the bucket 'no-such-bucket' does not exist" in failed.stdout + failed.stderr
    assert "failed" in (failed.stdout + failed.stderr).lower()
    listed = subprocess.run(
        [str(RAY), "job", "list"],
        env=os.environ | head, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "FAILED" in listed.stdout + listed.stderr
