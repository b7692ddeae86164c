"""A search space is checked against the config before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import SHAPES_YAML

from clip_ray.config_file import load_config
from clip_ray.errors import ConfigError
from clip_ray.tuning.space import Distribution, load_space

SPACES = Path(__file__).parent.parent.parent / "tune_spaces"


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_space_that_is_shipped_fits_the_shapes_config(path: Path) -> None:
    assert load_space(path, load_config(SHAPES_YAML))


def test_kinds_and_numbers_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("optim.lr: {loguniform: [1e-4, 1e-2]}\ntrain.zero_stage: {choice: [0, 2]}\n")
    assert load_space(path, load_config(SHAPES_YAML)) == {
        "optim.lr": Distribution("loguniform", (1e-4, 1e-2)),
        "train.zero_stage": Distribution("choice", (0, 2)),
    }


def test_all_mistakes_in_one_report(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(
        "optim.lrr: {uniform: [0.1, 0.2]}\n"
        "optim.lr: {uniform: [0.1, 3]}\n"
        "optim.eps: {loguniform: [0, 1]}\n"
        "loss.temperature: {normal: [0, 1]}\n"
        "train.zero_stage: {choice: [2, 7]}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_space(path, load_config(SHAPES_YAML))
    head, *lines = str(caught.value).splitlines()
    assert head == f"{path}: 5 errors"
    assert "optim.lrr: unknown key; did you mean 'lr'?" in lines[0]
    assert "optim.lr is 3.0: input should be less than or equal to 1" in lines[1]
    assert "optim.eps: loguniform is [0, 1]: needs 0 < low < high" in lines[2]
    assert "loss.temperature: {'normal': [0, 1]} must be" in lines[3]
    assert "train.zero_stage is 7" in lines[4]
