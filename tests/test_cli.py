"""The command line: one clear error and an exit code, before anything is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SHAPES_YAML

from clip_ray.storage import Storage


def clip_ray(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "clip_ray", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
        check=False,
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lrr=1", "optim.lrr: unknown key; did you mean 'lr'?"),
        ("optim.lr=-1", "optim.lr is -1: input should be greater than 0"),
        ("train.global_batch=33", "cluster.num_workers (2) must divide it"),
        ("model.image.timm_name=resnet5O", "timm cannot build it"),
    ],
)
def test_a_wrong_config_ends_with_2_and_one_report(override: str, said: str) -> None:
    result = clip_ray("train", str(SHAPES_YAML), override)
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_a_bucket_that_does_not_exist_ends_with_1(storage: Storage) -> None:
    result = clip_ray("train", str(SHAPES_YAML), "storage.root=s3://no-such-bucket/x")
    assert result.returncode == 1
    assert "the bucket 'no-such-bucket' does not exist" in result.stderr
    assert "Traceback" not in result.stderr


def test_config_prints_what_it_resolves_and_its_schema() -> None:
    assert "lr: 0.001\n" in clip_ray("config", str(SHAPES_YAML), "optim.lr=1e-3").stdout
    schema = json.loads(clip_ray("config", str(SHAPES_YAML), "--schema").stdout)
    for section in schema["$defs"].values():
        assert all(
            "description" in field or "$ref" in field for field in section["properties"].values()
        )


def test_dry_run_starts_nothing(tmp_path: Path) -> None:
    place = f"storage.embedded_dir={tmp_path / 's3'}"
    result = clip_ray("train", str(SHAPES_YAML), place, "--dry-run", AWS_ENDPOINT_URL="")
    assert result.returncode == 0
    assert "config, model and storage are right" in result.stderr
    assert list(tmp_path.iterdir()) == []
