"""The report of a sweep: readable at any time of it, and right about what it says."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from made_up_sweep import RECALL, as_asha_leaves_them, made_up_sweep, made_up_trial, made_up_trials

from clip_ray.tuning.journal import Exploit, Trial
from clip_ray.tuning.report import write_report
from clip_ray.tuning.summary import duration, number, saved_share, savings

SCRIPT = "plotly.js v"


def written(
    tmp_path: Path,
    trials: Sequence[Trial],
    tune: dict[str, Any] | None = None,
    fields: dict[str, Any] | None = None,
) -> str:
    """The page, its blanks made one."""
    sweep, space, config = made_up_sweep(tune, fields)
    path = tmp_path / "report.html"
    write_report(path, sweep, trials, config, space)
    return re.sub(r"\s+", " ", path.read_text())


def in_element(page: str, key: str) -> str:
    found = re.search(rf'<(\w+) id="{key}"[^>]*>(.*?)</\1>', page)
    assert found, f"the page has no {key}"
    return " ".join(re.sub(r"<[^>]*>", " ", found[2]).split())


def plots(page: str) -> list[str]:
    return re.findall(r'id="plot-(\w+)"', page)


def missing(page: str) -> list[str]:
    return re.findall(r'id="missing-(\w+)"', page)


def test_a_whole_sweep(tmp_path: Path) -> None:
    trials = as_asha_leaves_them(made_up_trials())
    page = written(tmp_path, trials)
    assert plots(page) == ["curves", "map", "parallel", "importances"]
    assert page.count(SCRIPT) == 1
    ended = [trial for trial in trials if trial.state == "finished"]
    best = max(ended, key=lambda trial: trial.figure(RECALL) or 0)
    assert in_element(page, "best-run") == best.run
    assert f"{best.figure(RECALL):.4g}" in in_element(page, "best-figures")
    for state in ("finished", "stopped", "failed", "running"):
        assert int(in_element(page, f"count-{state}")) == sum(t.state == state for t in trials)
    assert "RunError: &lt;two&gt; workers died" in page


@pytest.mark.parametrize(
    ("count", "drawn"),
    [(0, []), (1, ["curves", "map"]), (2, ["curves", "map", "parallel", "importances"])],
)
def test_few_trials(tmp_path: Path, count: int, drawn: list[str]) -> None:
    page = written(tmp_path, made_up_trials(count))
    assert plots(page) == drawn
    assert sorted(plots(page) + missing(page)) == ["curves", "importances", "map", "parallel"]
    assert page.count(SCRIPT) == bool(drawn)


def test_no_trial_has_a_figure(tmp_path: Path) -> None:
    failed = made_up_trials(1)[0].model_copy(update={"state": "failed", "error": "no nodes"})
    waiting = made_up_trials(2)[1].model_copy(update={"reports": [], "state": "running"})
    page = written(tmp_path, [failed, waiting])
    assert f"No trial has reported {RECALL} yet." in page
    assert "no nodes" in page
    assert "best-run" not in page.partition("</style>")[2]


def test_figures_that_are_no_numbers(tmp_path: Path) -> None:
    trials = made_up_trials(3)
    trials[0].reports[-1].figures[RECALL] = math.nan
    trials[1].reports[-1].figures["loss"] = math.inf
    page = written(tmp_path, trials)
    others = max(trials[1:], key=lambda trial: trial.figure(RECALL) or 0)
    assert in_element(page, "best-run") == others.run


def test_nothing_of_a_sweep_is_taken_for_html(tmp_path: Path) -> None:
    odd = "a</script><b>"
    fields = {"logging.wandb_project": {"choice": [odd, "c"]}}
    trials = made_up_trials(2)
    for trial, value in zip(trials, (odd, "c"), strict=True):
        trial.values = {"logging.wandb_project": value}
    trials[0].run = trials[0].error = odd
    page = written(tmp_path, trials, None, fields)
    assert plots(page) == ["curves", "parallel", "importances"]
    assert odd not in page
    assert "a&lt;/script&gt;&lt;b&gt;" in page


def test_spread_over_the_seeds_of_a_point(tmp_path: Path) -> None:
    trials = [
        made_up_trial(3 * trial.number + seed, trial.values, point=trial.number, seed=seed)
        for trial in made_up_trials(4)
        for seed in range(3)
    ]
    trials[3].state, trials[3].reports = "failed", []  # the best point's first seed
    page = written(tmp_path, trials, {"repeats": 3})
    found = [trial.figure(RECALL) or 0 for trial in trials[4:6]]
    mean, spread = sum(found) / 2, abs(found[0] - found[1]) / math.sqrt(2)
    assert in_element(page, "best-run") == trials[4].run
    figures = in_element(page, "best-figures")
    assert re.search(rf"{mean:.4g} ± {spread:.2g} 2$", figures), figures


def test_what_stopping_early_saved() -> None:
    _, _, config = made_up_sweep()
    trials = as_asha_leaves_them(made_up_trials())
    found = savings(trials, config)
    assert [saving.trial.state for saving in found] == ["stopped"] * len(found)
    assert all(saving.epochs == 14 - saving.trial.epochs for saving in found)
    assert all(math.isclose(saving.worker_hours, 0.02 * saving.epochs) for saving in found)
    ended = [trial for trial in trials if trial.state in ("finished", "stopped")]
    share = 1 - sum(trial.epochs for trial in ended) / (14 * len(ended))
    assert math.isclose(saved_share(trials, config) or 0, share)
    assert saved_share([], config) is None


def test_several_objectives(tmp_path: Path) -> None:
    tune = {"scheduler": "none", "objectives": {"loss": "min", "images_per_s": "max"}}
    page = written(tmp_path, made_up_trials(), tune)
    assert plots(page) == ["curves", "map", "pareto", "parallel", "importances"]
    best = min(made_up_trials(), key=lambda trial: trial.figure("loss") or math.inf)
    assert in_element(page, "best-run") == best.run
    four = {
        "objectives": {"loss": "min", "images_per_s": "max", "worker_hours": "min", RECALL: "max"}
    }
    page = written(tmp_path, made_up_trials(), tune | four)
    assert "1 more objective" in page


def test_exploits_name_the_trial_that_was_gone_on_from(tmp_path: Path) -> None:
    trials = made_up_trials(3)
    values = trials[0].values
    trials[1].exploits = [
        Exploit(epoch=4, source="made-up-00000@160", run="made-up-00001.1", values=values)
    ]
    trials[2].exploits = [
        Exploit(epoch=2, source="made-up-00001@80", run="made-up-00002.1", values=values),
        Exploit(epoch=6, source="made-up-00001.1@240", run="made-up-00002.2", values=values),
    ]
    trials[1].run, trials[2].run = "made-up-00001.1", "made-up-00002.2"
    page = written(tmp_path, trials, {"scheduler": "pbt", "search": "random"})
    table = in_element(page, "exploits")
    assert re.findall(r"(\d) (\d) trial (\d):", table) == [
        ("2", "2", "1"), ("4", "1", "0"), ("6", "2", "1"),
    ]  # fmt: skip
    assert f"loss.temperature {number(values['loss.temperature'])}" in table
    assert "No trial has gone on" in written(
        tmp_path, made_up_trials(2), {"scheduler": "pbt", "search": "random"}
    )


def test_fields_on_conditions_and_choices(tmp_path: Path) -> None:
    fields = {
        "optim.image.trained_groups": {"choice": [None, 0, 1]},
        "optim.image.layer_decay": {
            "uniform": [0.6, 1.0],
            "when": {"optim.image.trained_groups": None},
        },
    }
    groups = [None, 0, 1, None, 0, 1]
    trials = [
        made_up.model_copy(
            update={
                "values": {"optim.image.trained_groups": group}
                | ({"optim.image.layer_decay": 0.7 + made_up.number / 20} if group is None else {})
            }
        )
        for made_up, group in zip(made_up_trials(6), groups, strict=True)
    ]
    page = written(tmp_path, trials, None, fields)
    assert plots(page) == ["curves", "parallel", "importances"]
    assert "The space varies no two numbers." in page


def test_numbers_as_one_reads_them() -> None:
    texts = {0.66071: "0.6607", 12345.6: "12,346", 1e-5: "1e-5", 931.84: "931.8", 0.0: "0"}
    assert {value: number(value) for value in texts} == texts
    assert [number(value) for value in (True, None, 512, "ring")] == ["true", "null", "512", "ring"]
    hours = {0.0: "0 h", 1.234: "1.234 h", 0.28: "16.8 min", 0.005: "18 s"}
    assert {value: duration(value) for value in hours} == hours
