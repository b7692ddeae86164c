"""The commands of clusters and of the jobs that are sent to them."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from clip_ray.cli.common import ConfigPath, Overrides, say, storage_at
from clip_ray.config_file import load_config, shipped
from clip_ray.errors import ConfigError, RunError

if TYPE_CHECKING:
    from clip_ray.cluster.jobs import Jobs

cluster = typer.Typer(no_args_is_help=True, help="A Ray cluster on this machine.")
Address = Annotated[
    str | None,
    typer.Option(help="The dashboard, http://HOST:PORT; default: RAY_API_SERVER_ADDRESS, or the "
                 "local cluster's."),
]  # fmt: skip
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Send it to a cluster that wants no token, too.")
]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, or a run's name.")]


@cluster.command()
def start(
    path: Annotated[
        Path | None, typer.Argument(metavar="CLUSTER", help="A YAML file; default: local.yaml.")
    ] = None,
    fewest: Annotated[
        int | None, typer.Option("--min", min=0, help="Nodes that are kept, idle or not.")
    ] = None,
    most: Annotated[int | None, typer.Option("--max", min=1, help="Nodes at most.")] = None,
) -> None:
    """Start a Ray cluster here: a head with a token, nodes that come and go with the work.

    Prints what other programs need to use it: eval "$(clip-ray cluster start)"

    Example: clip-ray cluster start --min 0 --max 3
    """
    from clip_ray.cluster import local

    started = local.start(path or shipped("raycluster/local.yaml"), fewest, most)
    say(f"cluster: runs, its dashboard is {started.dashboard}; clip-ray cluster stop ends it")
    for name, value in started.environment().items():
        print(f"export {name}={value}")


@cluster.command()
def status() -> None:
    """Show the nodes of the cluster that runs here, and its jobs.

    Example: clip-ray cluster status
    """
    from clip_ray.cluster import local

    running = local.running()
    if running is None:
        raise RunError("no cluster runs here; clip-ray cluster start starts one")
    from clip_ray.cluster.access import access
    from clip_ray.cluster.jobs import Jobs

    found = access(running.dashboard)
    for node in found.nodes():
        kind, total = "head" if node["is_head_node"] else "node", node["resources_total"]
        print(f"{kind}  {node['node_id'][:12]}  {total.get('CPU', 0):g} CPUs")
    alive = [job for job in Jobs(found).list() if not job.status.is_terminal()]
    say(f"cluster: {running.dashboard}, {len(alive)} jobs")


@cluster.command("stop")
def stop_cluster() -> None:
    """End the cluster that runs here, and no other Ray.

    Example: clip-ray cluster stop
    """
    from clip_ray.cluster import local

    say("cluster: ended" if local.stop() else "cluster: none ran here")


def doctor(
    path: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG", help="A YAML file; without one S3 is not tried."),
    ] = None,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="The head, HOST:PORT; default: the config's, RAY_ADDRESS, or the local cluster's."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON as the last line.")] = False,
) -> None:
    """Look at all nodes of a cluster before a run: a table, and advice for what is wrong.

    Versions, GPUs, disks, limits, S3, clocks, the network and the token.

    Example: clip-ray doctor jobs/configs/shapes.yaml
    """
    resolved = load_config(path, overrides or ()) if path else None
    from clip_ray.cluster.access import head_address

    head = head_address(address or (resolved and resolved.cluster.address))
    from clip_ray.cluster.doctor import examine

    report = examine(resolved, head, say)
    print(report.table())
    if as_json:
        print(json.dumps(report.as_json()))
    if report.failures:
        raise RunError(f"{report.failures} checks failed; each has its advice above")
    say(f"doctor: {len(report.nodes)} nodes are right")


def submit(
    command: Annotated[
        Literal["doctor", "prepare", "train", "evaluate", "tune"],
        typer.Argument(help="What is to run."),
    ],
    path: ConfigPath,
    overrides: Overrides = None,
    address: Address = None,
    insecure: Insecure = False,
    space: Annotated[
        Path | None, typer.Option(help="Of tune: a YAML file of distributions.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not follow its output.")] = False,
) -> None:
    """Run a command on a cluster as a job, and follow it; sent again, a run resumes.

    Example: clip-ray submit train jobs/configs/shapes.yaml train.epochs=20
    """
    resolved = load_config(path, [*(overrides or ()), *(["cluster.insecure=true"] * insecure)])
    if (command == "tune") != (space is not None):
        raise ConfigError(f"submit {command}: --space FILE is for tune, and tune needs it")
    if space is not None:
        from clip_ray.tuning.space_file import parse_space, read_space

        resolved = parse_space(read_space(space), resolved, origin=str(space))[1]
    found = _jobs_at(address, resolved.cluster.insecure)
    job = found.submit(command, resolved, space and space.read_text(encoding="utf-8"))
    say(f"submit: {job}; clip-ray logs {job} follows it, clip-ray stop {job} ends it")
    if not detach:
        _follow(found, job)


def jobs(
    address: Address = None,
    insecure: Insecure = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """List the cluster's jobs, the newest first.

    Example: clip-ray jobs
    """
    for job in _jobs_at(address, insecure).list():
        began = datetime.fromtimestamp((job.start_time or 0) / 1000)
        line = f"{job.submission_id:32} {job.status.value:10} {began:%Y-%m-%d %H:%M:%S}"
        fields = {"id": job.submission_id, "status": job.status, "start_time_ms": job.start_time}
        print(json.dumps(fields) if as_json else line)


def logs(job: JobName, address: Address = None, insecure: Insecure = False) -> None:
    """Print a job's output, and follow it until it ends.

    Example: clip-ray logs shapes
    """
    found = _jobs_at(address, insecure)
    _follow(found, str(found.named(job).submission_id))


def stop(job: JobName, address: Address = None, insecure: Insecure = False) -> None:
    """End a job; a training takes a last checkpoint first.

    Example: clip-ray stop shapes
    """
    found = _jobs_at(address, insecure)
    job_id = str(found.named(job).submission_id)
    say(f"stop: {job_id} has {found.stop(job_id).value.lower()}")


def runs(
    root: Annotated[str, typer.Argument(metavar="ROOT", help="A YAML file, or its storage.root.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """List the runs in storage: step, epoch, R@1 of the newest checkpoint, and who trains it.

    Example: clip-ray runs jobs/configs/shapes.yaml
    """
    from clip_ray.training.runs import list_runs

    with storage_at(root, lambda resolved: resolved.storage.root) as storage:
        found = list_runs(storage)
    for run in found:
        print(json.dumps(asdict(run)) if as_json else run)
    say(f"runs: {len(found)}")


def _jobs_at(address: str | None, insecure: bool) -> Jobs:
    from clip_ray.cluster.access import access
    from clip_ray.cluster.jobs import Jobs

    return Jobs(access(address, insecure))


def _follow(found: Jobs, job_id: str) -> None:
    try:
        found.follow(job_id)
    except KeyboardInterrupt:
        if sys.stdin.isatty() and typer.confirm(f"stop {job_id}, too?", err=True):
            say(f"stop: {job_id} has {found.stop(job_id).value.lower()}")
        else:
            say(f"{job_id} goes on; clip-ray logs {job_id} follows it again")
