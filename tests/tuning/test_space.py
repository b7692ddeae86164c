"""A search space is checked against the config before anything starts, and drawn within bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from conftest import SHAPES_YAML, override

from clip_ray.config import Config
from clip_ray.config_file import load_config
from clip_ray.errors import ConfigError
from clip_ray.tuning.space import Distribution, Space, with_values
from clip_ray.tuning.space_file import parse_space, read_space

SPACES = Path(__file__).parent.parent.parent / "tune_spaces"


def shapes() -> Config:
    return load_config(SHAPES_YAML)


def space_of(text: str, *overrides: str) -> Space:
    config = load_config(SHAPES_YAML, overrides)
    return parse_space({"space": yaml.safe_load(text)}, config, origin="space.yaml")[0]


def mistakes_of(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        space_of(text, *overrides)
    head, *lines = str(caught.value).splitlines()
    assert head == f"space.yaml: {len(lines)} error{'s' if len(lines) > 1 else ''}"
    return [line.removeprefix("  - ") for line in lines]


def drawn(space: Space, count: int) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [space.draw(study.ask(), number) for number in range(count)]


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_space_that_is_shipped_fits_the_shapes_config(path: Path) -> None:
    space, config = parse_space(read_space(path), shapes(), origin=str(path))
    for values in drawn(space, 20):
        with_values(config, values)


def test_kinds_and_numbers_as_people_write_them() -> None:
    space = space_of(
        "optim.lr: {loguniform: [1e-4, 1e-2]}\n"
        "optim.warmup_steps: {quniform: [0, 100, 25]}\n"
        "train.epochs: {randint: [1, 5]}\n"
        "train.zero_stage: {choice: [0, 2]}\n"
    )
    assert space.fields == {
        "optim.lr": Distribution("loguniform", (1e-4, 1e-2)),
        "optim.warmup_steps": Distribution("quniform", (0, 100), step=25),
        "train.epochs": Distribution("randint", (1, 5)),
        "train.zero_stage": Distribution("choice", (0, 2)),
    }
    points = drawn(space, 200)
    assert {point["optim.warmup_steps"] for point in points} == {0, 25, 50, 75, 100}
    assert {point["train.epochs"] for point in points} == {1, 2, 3, 4, 5}
    assert all(1e-4 <= point["optim.lr"] <= 1e-2 for point in points)
    low = [point for point in points if point["optim.lr"] < 1e-3]
    assert 70 < len(low) < 130  # by the logarithm, half of them


def test_a_field_is_drawn_only_where_its_condition_holds() -> None:
    space = space_of(
        "loss.tile: {choice: [64, 128], when: {loss.method: [tiled, ring], loss.kind: info_nce}}\n"
        "loss.method: {choice: [gathered, tiled, ring], when: {loss.kind: info_nce}}\n"
        "loss.kind: {choice: [info_nce, sigmoid]}\n"
    )
    assert list(space.fields) == ["loss.kind", "loss.method", "loss.tile"]
    points = drawn(space, 100)
    assert {tuple(point) for point in points} == {
        ("loss.kind",),
        ("loss.kind", "loss.method"),
        ("loss.kind", "loss.method", "loss.tile"),
    }
    for point in points:
        assert ("loss.method" in point) == (point["loss.kind"] == "info_nce")
        assert ("loss.tile" in point) == (point.get("loss.method") in ("tiled", "ring"))


def test_a_grid_goes_through_all_its_combinations_while_the_rest_is_drawn() -> None:
    text = "train.zero_stage: {grid: [0, 1, 2]}\nloss.method: {grid: [gathered, tiled]}\n"
    pairs = [tuple(point.values()) for point in drawn(space_of(text), 12)]
    assert sorted(pairs[:6]) == sorted(pairs[6:]) == sorted({*pairs})
    mixed = drawn(space_of(text + "optim.lr: {uniform: [0.1, 0.2]}\n"), 12)
    assert len({point["optim.lr"] for point in mixed}) == 12


def test_combinations_of_a_conditional_grid_come_once() -> None:
    space = space_of(
        "loss.method: {grid: [gathered, tiled]}\n"
        "loss.tile: {grid: [64, 128], when: {loss.method: tiled}}\n",
        "tune.search=grid",
    )
    assert list(space.combinations()) == [
        {"loss.method": "gathered"},
        {"loss.method": "tiled", "loss.tile": 64},
        {"loss.method": "tiled", "loss.tile": 128},
    ]


def test_perturbed_numbers_come_back_within_their_bounds() -> None:
    space = space_of(
        "optim.lr: {loguniform: [1e-4, 1e-2]}\n"
        "optim.warmup_steps: {quniform: [10, 60, 25]}\n"
        "loss.tile: {randint: [1, 9]}\n"
        "loss.kind: {choice: [info_nce]}\n"
    )
    drawn = {"optim.lr": 0.012, "optim.warmup_steps": 44, "loss.tile": 7.6, "loss.kind": "info_nce"}
    clipped = {"optim.lr": 0.01, "optim.warmup_steps": 35, "loss.tile": 8, "loss.kind": "info_nce"}
    assert space.clip(drawn) == clipped


def test_tune_of_the_file_stands_under_what_the_config_says() -> None:
    tree = {"tune": {"max_trials": 30, "scheduler": "median"},
            "space": {"optim.lr": {"uniform": [0.1, 0.2]}}}  # fmt: skip
    config = load_config(SHAPES_YAML, ["tune.max_trials=5"])
    resolved = parse_space(tree, config, origin="space.yaml")[1].tune
    assert (resolved.max_trials, resolved.scheduler, resolved.search) == (5, "median", "optuna")


def test_all_mistakes_of_fields_in_one_report() -> None:
    lines = mistakes_of(
        "optim.lrr: {uniform: [0.1, 0.2]}\n"
        "optim.lr: {uniform: [0.1, 3]}\n"
        "optim.warmup_steps: {uniform: [0, 10]}\n"
        "loss.temperature: {choice: [0.1, hot]}\n"
        "train.zero_stage: {choice: [2, 7]}\n"
        "name: {choice: [a, b]}\n"
    )
    assert "optim.lrr: unknown key; did you mean 'lr'?" in lines[0]
    assert "optim.lr is 3.0: input should be less than or equal to 1" in lines[1]
    assert "optim.warmup_steps is 3.8" in lines[2]
    assert "valid integer" in lines[2]
    assert "loss.temperature is 'hot': input should be a valid number" in lines[3]
    assert "train.zero_stage is 7" in lines[4]
    assert "name: a sweep cannot vary it" in lines[5]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("optim.lr: {normal: [0, 1]}", "must be {kind: values}, kind one of uniform, loguniform"),
        ("optim.lr: 0.1", "must be {kind: values}"),
        ("optim.lr: {loguniform: [0, 1]}", "needs 0 < low < high"),
        ("optim.lr: {uniform: [0.2, 0.1]}", "needs low < high"),
        ("optim.lr: {uniform: [0.1]}", "must be two numbers"),
        ("optim.lr: {quniform: [0.1, 0.2]}", "must be two numbers and a step"),
        ("optim.lr: {quniform: [0.1, 0.2, 0]}", "must be a multiple of the step"),
        ("optim.lr: {quniform: [0.1, 0.2, 0.03]}", "must be a multiple of the step"),
        ("train.epochs: {randint: [1.5, 3]}", "must be whole numbers"),
        ("optim.betas: {choice: [[0.9, 0.98]]}", "must be numbers, words, true, false or null"),
        ("loss.tile: {choice: []}", "must be a list"),
        ("loss.tile: {choice: [1], when: tiled}", "must be {field: value}"),
        ("loss.tile: {choice: [1], when: {loss.kind: x}}", "which the space does not vary"),
    ],
)
def test_one_clear_error_for_what_is_no_distribution(text: str, reason: str) -> None:
    (line,) = mistakes_of(text)
    assert line.startswith(text.partition(":")[0])
    assert reason in line


def test_conditions_that_can_never_hold_are_errors() -> None:
    kind = "loss.kind: {choice: [info_nce]}\n"
    (line,) = mistakes_of(kind + "loss.tile: {choice: [1], when: {loss.kind: sigmoid}}\n")
    assert line == "loss.tile: when wants loss.kind to be 'sigmoid': it never is"
    (line,) = mistakes_of(
        "loss.tile: {choice: [1, 2], when: {train.zero_stage: 1}}\n"
        "train.zero_stage: {choice: [1, 2], when: {loss.tile: 1}}\n"
    )
    assert line == "when goes round in a circle: loss.tile, train.zero_stage"


def test_a_space_must_fit_its_search_and_its_scheduler() -> None:
    (line,) = mistakes_of("optim.lr: {uniform: [0.1, 0.2]}", "tune.search=grid")
    assert "optim.lr: is a uniform: tune.search grid needs grid or choice" in line
    lines = mistakes_of(
        "train.global_batch: {grid: [64, 65]}\ntrain.zero_stage: {grid: [0, 1]}\n",
        "tune.search=grid",
    )
    assert len(lines) == 1
    assert "train.global_batch is 65" in lines[0]
    pbt = ("tune.scheduler=pbt", "tune.search=random")
    (line,) = mistakes_of("train.epochs: {randint: [1, 5]}", *pbt)
    assert line == "train.epochs: tune.scheduler pbt changes fields of optim and loss alone"
    (line,) = mistakes_of("loss.kind: {choice: [info_nce]}", *pbt)
    assert line == "tune.scheduler pbt needs a field with two bounds, to perturb"


def test_a_file_without_a_space_says_what_it_must_hold(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must hold `space:` with lines such as"):
        parse_space({"tune": {}}, shapes(), origin="space.yaml")
    with pytest.raises(ConfigError, match=r"unknown key 'optim\.lr'"):
        parse_space({"optim.lr": {"uniform": [0, 1]}}, shapes(), origin="space.yaml")
    with pytest.raises(
        ConfigError, match=r"tune\.schedular: unknown key; did you mean 'scheduler'"
    ):
        tree = {"tune": {"schedular": "asha"}, "space": {"optim.lr": {"uniform": [0.1, 0.2]}}}
        parse_space(tree, shapes(), origin="space.yaml")


def test_a_sweep_config_must_agree_with_itself() -> None:
    with pytest.raises(ConfigError, match="scheduler asha would stop trials by the first alone"):
        override(shapes(), ["tune.objectives={loss: min, worker_hours: min}"])
    with pytest.raises(ConfigError, match="search is optuna: scheduler pbt searches itself"):
        override(shapes(), ["tune.scheduler=pbt"])
    with pytest.raises(ConfigError, match="repeats is 2: scheduler pbt changes"):
        override(shapes(), ["tune.scheduler=pbt", "tune.search=random", "tune.repeats=2"])
