"""The trials of a sweep as a table: whatever they are, one column has one type."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from made_up_sweep import RECALL, as_asha_leaves_them, made_up_sweep, made_up_trial, made_up_trials

from clip_ray.errors import ConfigError
from clip_ray.tuning.results import check_results, results_table, write_results

_, _, CONFIG = made_up_sweep()


def test_one_row_for_each_trial() -> None:
    trials = as_asha_leaves_them(made_up_trials())
    table = results_table(trials, CONFIG)
    assert table.num_rows == len(trials)
    assert table["run"].to_pylist() == [trial.run for trial in trials]
    assert table["error"].to_pylist()[3] == "RunError: <two> workers died"
    for trial, row in zip(trials, table.to_pylist(), strict=True):
        assert row["epochs"] == trial.epochs
        # Two workers with a GPU each.
        assert row["gpu_hours"] == pytest.approx(2 * trial.worker_hours)
        assert row["config/loss.temperature"] == trial.values["loss.temperature"]
        assert row[f"figure/{RECALL}"] == trial.figure(RECALL)


def test_no_trial_has_the_columns_of_all() -> None:
    empty, full = results_table([], CONFIG), results_table(made_up_trials(1), CONFIG)
    assert empty.num_rows == 0
    assert empty.schema.names == full.schema.names[: len(empty.schema.names)]
    assert empty.schema.types == full.schema.types[: len(empty.schema.names)]


@pytest.mark.parametrize(
    ("values", "kind", "found"),
    [
        ([0, 1, None], pa.int64(), [0, 1, None]),
        ([1, 0.5, None], pa.float64(), [1.0, 0.5, None]),
        ([True, False], pa.bool_(), [True, False]),
        ([True, 1, "auto", None], pa.string(), ["True", "1", "auto", None]),
        ([None, None], pa.string(), [None, None]),
    ],
)
def test_types_of_a_field(values: list[object], kind: pa.DataType, found: list[object]) -> None:
    made_up = {"loss.temperature": 0.1, "optim.lr": 1e-3, "loss.learn_temperature": True}
    trials = [made_up_trial(place, made_up) for place in range(len(values))]  # type: ignore[arg-type]
    for trial, value in zip(trials, values, strict=True):
        trial.values = {"some.field": value}  # type: ignore[dict-item]
    column = results_table(trials, CONFIG)["config/some.field"]
    assert column.type == kind
    assert column.to_pylist() == found


def test_workers_that_a_sweep_varies_are_counted() -> None:
    trial = made_up_trials(1)[0]
    trial.values = {"cluster.num_workers": 4}
    hours = results_table([trial], CONFIG)["gpu_hours"].to_pylist()
    assert hours == [pytest.approx(4 * trial.worker_hours)]


def test_files(tmp_path: Path) -> None:
    table = results_table(as_asha_leaves_them(made_up_trials()), CONFIG)
    write_results(tmp_path / "results.parquet", table)
    assert pq.read_table(tmp_path / "results.parquet").equals(table)
    write_results(tmp_path / "results.CSV", table)
    read = pyarrow.csv.read_csv(tmp_path / "results.CSV")
    assert read.schema.names == table.schema.names
    assert read["run"].to_pylist() == table["run"].to_pylist()


def test_other_files_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        check_results(Path("results.xlsx"))
    assert str(caught.value) == "--results is 'results.xlsx': must end in .csv or .parquet"
