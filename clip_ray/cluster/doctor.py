"""Looks at every node of a cluster before a run is paid for: asked here, judged in `judge`."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence

import ray

from clip_ray.cluster import judge
from clip_ray.cluster.checks import MachineFacts, versions
from clip_ray.cluster.findings import Finding, Report
from clip_ray.cluster.judge import Node
from clip_ray.cluster.network import network
from clip_ray.cluster.probes import Answers, Probes, alive_nodes, ask, machine_here, probes
from clip_ray.cluster.store_checks import store_facts
from clip_ray.config import Config
from clip_ray.embedded_s3 import embedded_folder, storage_session
from clip_ray.environment import FORWARDED

START_TIMEOUT_S = 90
CLOCK_TIMEOUT_S, CLOCK_ROUNDS = 10, 3
LOOK_TIMEOUT_S = 60
STORE_TIMEOUT_S = 120
SILENT_ADVICE = "look at its raylet.err and worker logs in the session's folder; start it again"


def examine(config: Config | None, head: str, say: Callable[[str], None]) -> Report:
    """Checks all nodes of the cluster of `head`, HOST:PORT, for what `config` needs if given."""
    with _storage(config), _connected(head):
        nodes = alive_nodes()
        say(f"doctor: looks at {', '.join(node.name for node in nodes)}")
        with probes(nodes) as started:
            return _examine(config, nodes, started)


def _examine(config: Config | None, nodes: Sequence[Node], started: Probes) -> Report:
    up = ask(started, START_TIMEOUT_S, time.time)
    findings = _silent("process", up)
    there = {name: started[name] for name in up.found}
    ahead_s = _ahead_s(there)
    machines = ask(there, LOOK_TIMEOUT_S, machine_here)
    findings += _silent("machine", machines) + _machine_findings(config, nodes, machines.found)
    of_store_s: dict[str, float] = {}
    if config is not None:
        store_findings, of_store_s = _store(config.storage.root, nodes, there)
        findings += store_findings
    findings += judge.clock_findings(nodes, ahead_s, of_store_s)
    kind, joined = _joined(config, nodes, machines.found)
    outcome, found = network(joined, there, kind)
    return Report([node.name for node in nodes], findings + found, outcome.bytes_per_s)


def _machine_findings(
    config: Config | None, nodes: Sequence[Node], facts: Mapping[str, MachineFacts]
) -> list[Finding]:
    own = versions()
    looked_at = [node for node in nodes if node.name in facts]
    found = [
        finding
        for node in looked_at
        for finding in judge.machine_findings(node, facts[node.name], own)
    ]
    found += judge.gpu_findings(looked_at, facts.values(), config and config.cluster)
    return found + judge.access_findings(looked_at, facts)


def _store(
    root: str, nodes: Sequence[Node], started: Probes
) -> tuple[list[Finding], dict[str, float]]:
    """What S3 lets each node do, and how far the node's clock is ahead of the store's."""
    # A key for each node, or their conditional puts would meet.
    place = f"doctor/{uuid.uuid4().hex[:8]}"
    calls = {
        node.name: started[node.name].run.remote(store_facts, root, f"{place}/{node.node_id[:12]}")
        for node in nodes
        if node.name in started
    }
    answers = Answers(calls, STORE_TIMEOUT_S)
    found = _silent("s3", answers)
    for node in nodes:
        if node.name in answers.found:
            found += judge.store_findings(node, answers.found[node.name])
    ahead_s = {name: facts.ahead_s for name, facts in answers.found.items()}
    return found, {name: value for name, value in ahead_s.items() if value is not None}


def _ahead_s(started: Probes) -> dict[str, float]:
    """How far each node's clock is ahead of the driver's, by its fastest answer."""
    best: dict[str, tuple[float, float]] = {}
    for name, probe in started.items():
        for _ in range(CLOCK_ROUNDS):
            asked_s = time.time()
            answers = ask({name: probe}, CLOCK_TIMEOUT_S, time.time)
            if answers.silent:
                break
            took_s = time.time() - asked_s
            ahead_s = answers.found[name] - (asked_s + took_s / 2)
            best[name] = min(best.get(name, (took_s, ahead_s)), (took_s, ahead_s))
    return {name: ahead_s for name, (_, ahead_s) in best.items()}


def _silent(check: str, answers: Answers) -> list[Finding]:
    return [
        Finding(name, check, "fail", reason, SILENT_ADVICE)
        for name, reason in answers.silent.items()
    ]


def _joined(
    config: Config | None, nodes: Sequence[Node], facts: Mapping[str, MachineFacts]
) -> tuple[str, list[Node]]:
    """What carries a run's collectives, and the nodes that have it."""
    looked_at = [node for node in nodes if node.name in facts]
    with_gpus = [node for node in looked_at if facts[node.name].gpus.visible]
    on_gpus = config is None or config.cluster.gpus_per_worker > 0
    return ("nccl", with_gpus) if on_gpus and len(with_gpus) > 1 else ("gloo", looked_at)


def _storage(config: Config | None) -> contextlib.AbstractContextManager[object]:
    """The embedded server, where it is the run's."""
    if config is None or embedded_folder(config.storage) is None:
        return contextlib.nullcontext()
    return storage_session(config.storage)


@contextlib.contextmanager
def _connected(head: str) -> Iterator[None]:
    env_vars = {name: os.environ[name] for name in FORWARDED if name in os.environ}
    ray.init(
        head,
        logging_level=logging.WARNING,
        log_to_driver=False,
        runtime_env={"env_vars": env_vars},
    )
    try:
        yield
    finally:
        ray.shutdown()
