"""Jobs on a cluster, through its dashboard alone: sent with the code, followed, listed, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import clip_ray
from clip_ray.cluster.access import Access
from clip_ray.config import Config
from clip_ray.config_file import dump_config
from clip_ray.environment import FORWARDED
from clip_ray.errors import RunError

SPACE = "space.yaml"
POLL_S = 1.0
STOP_TIMEOUT_S = 180
# Ray kills a stopped job after three seconds; a last checkpoint takes longer.
JOB_ENV = {"RAY_JOB_STOP_WAIT_TIME_S": "150"}


class Jobs:
    """The jobs of a cluster. A job is named by its id, or by its run: the newest attempt's then."""

    def __init__(self, access: Access) -> None:
        # Ray lets the environment win over the argument.
        os.environ["RAY_API_SERVER_ADDRESS"] = access.dashboard
        self._client = JobSubmissionClient(access.dashboard, headers=access.headers)

    def submit(self, command: str, config: Config, space: str | None = None) -> str:
        """Starts `clip-ray COMMAND` on the cluster, with this code and config; the job's id.

        `space`: what a space file holds, for `tune`. Raises RunError where an attempt at the run is
        alive.
        """
        attempts = self._attempts(config.name)
        if alive := [number for number, job in attempts.items() if not job.status.is_terminal()]:
            name = f"{config.name}-{alive[-1]}"
            raise RunError(
                f"{name} is {attempts[alive[-1]].status.value.lower()}: a run has one job at a "
                f"time; clip-ray logs {name} follows it, clip-ray stop {name} ends it"
            )
        env_vars = {name: os.environ[name] for name in FORWARDED if name in os.environ}
        with _working_dir(config) as folder:
            entrypoint = f"python -m clip_ray {command} config.yaml"
            if space is not None:
                (folder / SPACE).write_text(space)
                entrypoint += f" --space {SPACE}"
            return self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=f"{config.name}-{max(attempts, default=0) + 1}",
                runtime_env={"working_dir": str(folder), "env_vars": env_vars | JOB_ENV},
                metadata={"run": config.name, "command": command},
            )

    def list(self) -> list[JobDetails]:
        """All jobs of the cluster, the newest first."""
        jobs = [job for job in self._client.list_jobs() if job.submission_id]
        return sorted(jobs, key=lambda job: job.start_time or 0, reverse=True)

    def named(self, name: str) -> JobDetails:
        """The job with this id, or the run's newest. Raises RunError."""
        jobs = {job.submission_id: job for job in self.list()}
        attempts = self._attempts(name)
        if name in jobs:
            return jobs[name]
        if attempts:
            return attempts[max(attempts)]
        known = ", ".join(str(job) for job in jobs) or "none"
        raise RunError(f"there is no job {name!r}; the cluster has: {known}")

    def follow(self, job_id: str) -> None:
        """Prints the job's output until it ends. Raises RunError where it fails or is stopped."""
        seen = 0
        while True:
            with contextlib.suppress(RuntimeError):  # the connection was lost: once more
                seen = asyncio.run(self._tail(job_id, seen))
            info = self._client.get_job_info(job_id)
            if info.status.is_terminal():
                break
            time.sleep(POLL_S)
        if info.status != JobStatus.SUCCEEDED:
            reason = (info.message or "").strip().splitlines()[:1]
            raise RunError(f"{job_id} has {info.status.value.lower()}: {' '.join(reason)}")

    def stop(self, job_id: str) -> JobStatus:
        """Asks the job for a last checkpoint and its end, and waits for that."""
        self._client.stop_job(job_id)
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < deadline_s:
            status = self._client.get_job_status(job_id)
            if status.is_terminal():
                return status
            time.sleep(POLL_S)
        raise RunError(f"{job_id} has not stopped within {STOP_TIMEOUT_S} s")

    async def _tail(self, job_id: str, seen: int) -> int:
        """Prints what comes after the `seen` characters; how many there are now."""
        count = 0
        async for text in self._client.tail_job_logs(job_id):
            fresh = text[max(0, seen - count) :]
            count += len(text)
            sys.stdout.write(fresh)
            sys.stdout.flush()
        return max(seen, count)

    def _attempts(self, run: str) -> dict[int, JobDetails]:
        pattern = re.compile(rf"{re.escape(run)}-(\d+)")
        found = {}
        for job in self._client.list_jobs():
            if match := pattern.fullmatch(job.submission_id or ""):
                found[int(match[1])] = job
        return dict(sorted(found.items()))


@contextlib.contextmanager
def _working_dir(config: Config) -> Iterator[Path]:
    """A folder with this package and the config, and nothing else of the user's."""
    package = Path(clip_ray.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(package, Path(folder) / package.name, ignore=ignored)
        Path(folder, "config.yaml").write_text(dump_config(_elsewhere(config)))
        yield Path(folder)


def _elsewhere(config: Config) -> Config:
    """The config as it is right in another folder; S3 is what the nodes' environment names."""
    data = config.data.model_copy(
        update={
            "source": _absolute(config.data.source),
            "zero_shot_source": _absolute(config.data.zero_shot_source),
        }
    )
    storage = config.storage.model_copy(update={"embedded_dir": None})
    cluster = config.cluster.model_copy(update={"address": None})
    return config.model_copy(update={"data": data, "storage": storage, "cluster": cluster})


def _absolute(place: str | None) -> str | None:
    return place if place is None or "://" in place else str(Path(place).resolve())
