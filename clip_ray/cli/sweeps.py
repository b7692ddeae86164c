"""The commands of sweeps: search a space of config fields, and see what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clip_ray.cli.common import Overrides, say
from clip_ray.cli.steps import RIGHT, DryRun
from clip_ray.config_file import dump_config, load_config, shipped
from clip_ray.errors import RunError

Config = Annotated[
    Path | None, typer.Argument(metavar="CONFIG", help="A YAML file; default: the demo's.")
]
DEMO = shipped("jobs/configs/shapes.yaml")


def tune(
    path: Config = None,
    overrides: Overrides = None,
    space: Annotated[Path, typer.Option(help="A YAML file of distributions.")] = Path(
        "tune_spaces/temperature_lr.yaml"
    ),
    resume: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Go on with this sweep, or s3://…/sweeps/NAME."),
    ] = None,
    max_trials: Annotated[int | None, typer.Option(min=1, help="Points to try.")] = None,
    max_hours: Annotated[float | None, typer.Option(help="Of the sweep, by the clock.")] = None,
    max_gpu_hours: Annotated[float | None, typer.Option(help="Of all trials together.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Search a space of config fields for the best R@1 on the val split, or for what `tune` names.

    Example: clip-ray tune jobs/configs/shapes.yaml --space tune_spaces/temperature_lr.yaml
    """
    budget = {"max_trials": max_trials, "max_hours": max_hours, "max_gpu_hours": max_gpu_hours}
    given = {name: value for name, value in budget.items() if value is not None}
    fields = [f"tune.{name}={value}" for name, value in given.items()]
    resolved = load_config(path or DEMO, [*(overrides or ()), *fields])
    from clip_ray import pipeline
    from clip_ray.embedded_s3 import storage_session
    from clip_ray.tuning.journal import Sweep, journal_of, parse_sweep
    from clip_ray.tuning.space_file import parse_space, read_space

    journal = journal_of(resolved, resume)
    if resume is not None:
        with storage_session(resolved.storage):
            sweep = journal.sweep()
        checked, resolved = parse_sweep(sweep, given)
    else:
        tree = read_space(space)
        checked, resolved = parse_space(tree, resolved, origin=str(space))
        sweep = Sweep(config=resolved.model_dump(mode="json"), space=tree)
    pipeline.check(resolved)
    if dry_run:
        return say(RIGHT)
    # Tune frees the workers of a stopped trial through the dashboard.
    with pipeline.session(resolved, say, dashboard=True):
        journal.check_begins_or_is(sweep)
        pipeline.prepare_data(resolved, say)
        pipeline.tune_model(journal, sweep, resolved, checked, say)


def tune_report(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A sweep, or s3://…/sweeps/NAME.")],
    path: Config = None,
    report: Annotated[Path, typer.Option(help="The page to write.")] = Path("sweep.html"),
    results: Annotated[
        Path | None, typer.Option(help="A file of all trials, too: .csv or .parquet.")
    ] = None,
    apply: Annotated[
        Path | None, typer.Option(help="A YAML file of the best config, for clip-ray train.")
    ] = None,
) -> None:
    """Write a page on a sweep, while it runs or after: curves, what mattered, what it cost.

    Example: clip-ray tune-report shapes --results trials.csv --apply best.yaml
    """
    resolved = load_config(path or DEMO)
    from clip_ray.embedded_s3 import storage_session
    from clip_ray.tuning.journal import journal_of, parse_sweep, ranked
    from clip_ray.tuning.report import write_report
    from clip_ray.tuning.results import results_table, write_results
    from clip_ray.tuning.space import with_values

    with storage_session(resolved.storage):
        journal = journal_of(resolved, name)
        sweep, trials = journal.sweep(), journal.trials()
    space, config = parse_sweep(sweep, {})
    write_report(report, sweep, trials, config, space)
    say(f"tune-report: {len(trials)} trials in {report}")
    if results is not None:
        write_results(results, results_table(trials, config))
        say(f"tune-report: {results}")
    if apply is not None:
        if not trials:
            raise RunError(f"{name}: has no trial yet, whose config could be applied")
        best = ranked(trials, config)[0]
        apply.write_text(dump_config(with_values(config, best.values)), encoding="utf-8")
        say(f"tune-report: {apply} has the values of {best.run}; clip-ray train takes it")
