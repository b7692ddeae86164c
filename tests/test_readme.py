"""What the README says is there: its configs load, its commands and files exist."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from clip_ray.cli import app
from clip_ray.config_file import load_config, parse_config
from clip_ray.tuning.space_file import parse_space

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```\w*\n(.*?)```", README, re.DOTALL)


def test_the_example_config_is_right() -> None:
    (block,) = [block for block in BLOCKS if block.startswith("name: flickr30k")]
    config = parse_config(yaml.safe_load(block), origin="README")
    assert config.model.image.timm_name == "resnet50_gn"


def test_the_example_space_is_right() -> None:
    (block,) = [block for block in BLOCKS if "\nspace:\n" in block]
    config = load_config(ROOT / "jobs/configs/shapes.yaml")
    space, resolved = parse_space(yaml.safe_load(block), config, origin="README")
    assert len(space.fields) == 4
    assert resolved.tune.max_trials == 24


def test_every_command_and_target_exists() -> None:
    commands = {each.callback.__name__ for each in app.registered_commands if each.callback}
    commands |= {str(group.name) for group in app.registered_groups}
    assert set(re.findall(r"clip-ray (\w+)", README)) - {"is"} <= commands
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z]+)", README, re.MULTILINE)) <= targets


def test_every_path_exists() -> None:
    named = re.findall(r"(?:clip_ray|jobs|raycluster|tests|tune_spaces|\.assets)/[\w./]*\w", README)
    missing = [path for path in named if not (ROOT / path).exists()]
    assert missing == []
