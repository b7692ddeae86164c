"""The Kubernetes files: well formed by KubeRay's and Kubernetes' schemas, as secure as is said."""

from __future__ import annotations

import copy
import shutil
import subprocess
from typing import Any

import pytest
import yaml
from manifests import KUBERNETES, Manifest, containers, kustomization, manifests, mistakes, schemas
from ray.scripts.scripts import start

from clip_ray.config_file import load_config

FOLDERS = ["cluster", "job"]
pytestmark = pytest.mark.timeout(60)


def of_kind(kind: str, folder: str = "cluster") -> Manifest:
    (found,) = [m for m in manifests(folder) if m["kind"] == kind]
    return found


def pod_specs(folder: str) -> list[Manifest]:
    """Those of the head, of each group of workers, of the submitter and of Redis."""
    by_kind = {m["kind"]: m["spec"] for m in manifests(folder) if "spec" in m}
    job = by_kind.get("RayJob", {})
    cluster = job.get("rayClusterSpec") or by_kind["RayCluster"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"], by_kind["StatefulSet"]]
    submitter = [job["submitterPodTemplate"]["spec"]] if job else []
    return [group["template"]["spec"] for group in groups] + submitter


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_object_is_well_formed(folder: str) -> None:
    for manifest in manifests(folder):
        assert not mistakes(manifest)


@pytest.mark.parametrize("folder", FOLDERS)
def test_kustomize_makes_the_objects_that_are_checked_here(folder: str) -> None:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl, which brings kustomize, is not there")
    made = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / folder)],
        capture_output=True, text=True, timeout=50, check=True,
    )  # fmt: skip
    by_name = {(m["kind"], m["metadata"]["name"]): m for m in yaml.safe_load_all(made.stdout)}
    assert by_name == {(m["kind"], m["metadata"]["name"]): m for m in manifests(folder)}


def test_every_file_is_part_of_a_kustomization() -> None:
    named = set()
    for folder in (path for path in KUBERNETES.iterdir() if path.is_dir()):
        rules = kustomization(folder.name)
        files = [name for rule in rules.get("configMapGenerator", []) for name in rule["files"]]
        named |= {(folder / name).resolve() for name in rules["resources"] + files}
        named |= {folder / "kustomization.yaml", folder}
    assert {path for path in KUBERNETES.rglob("*")} <= named
    assert all(path.exists() for path in named)


def changed(manifest: Manifest, *path: Any, to: Any) -> Manifest:
    """A copy with another value at `path`."""
    copied = part = copy.deepcopy(manifest)
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = to
    return copied


WORKERS = ("spec", "workerGroupSpecs", 0)
CONTAINER = (*WORKERS, "template", "spec", "containers", 0)


@pytest.mark.parametrize(
    ("path", "to"),
    [
        (("spec", "rayVersions"), "2.60.0"),
        (("metadata", "label"), {}),
        (("spec", "authOptions", "mode"), "tokens"),
        (("spec", "autoscalerOptions", "version"), "v3"),
        (("spec", "enableInTreeAutoscaling"), "true"),
        ((*WORKERS, "maxReplicas"), "8"),
        ((*WORKERS, "rayStartParams"), {"num-cpus": 4}),
        ((*CONTAINER, "resource"), {}),
        ((*CONTAINER, "resources", "limits", "memory"), "160 GB"),
        ((*CONTAINER, "readinessProbe", "httpGet", "port"), None),
        ((*CONTAINER, "name"), None),
        ((*WORKERS, "template", "spec", "tolerations"), {"key": "a"}),
    ],
)
def test_a_mistake_in_a_cluster_is_found(path: tuple[str | int, ...], to: Any) -> None:
    (mistake, *_) = mistakes(changed(of_kind("RayCluster"), *path, to=to))
    assert str(path[-1]) in mistake or str(to) in mistake


@pytest.mark.parametrize(
    ("kind", "path", "to"),
    [
        ("RayJob", ("spec", "backOffLimit"), 5),
        ("RayJob", ("spec", "rayClusterSpec", "rayVersion"), 2.6),
        ("RayJob", ("spec", "ttlSecondsAfterFinished"), "10m"),
        ("StatefulSet", ("spec", "replica"), 1),
        ("StatefulSet", ("spec", "template", "spec", "volumes", 0, "emptydir"), {}),
        ("ServiceAccount", ("annotations",), {}),
        ("Namespace", ("metadata", "labels"), ["a"]),
        ("ConfigMap", ("data", "config.yaml"), {"name": "run"}),
    ],
)
def test_a_mistake_in_another_object_is_found(kind: str, path: tuple[Any, ...], to: Any) -> None:
    (mistake, *_) = mistakes(changed(of_kind(kind, "job"), *path, to=to))
    assert str(path[-1]) in mistake or str(to) in mistake


def test_the_schemas_name_their_source() -> None:
    assert schemas()["source"]["KubeRay"].startswith("https://github.com/ray-project/kuberay v1.")
    assert schemas()["source"]["licence"] == "Apache-2.0"


def test_a_cluster_wants_the_token_keeps_its_state_and_scales() -> None:
    spec = of_kind("RayCluster")["spec"]
    assert spec["authOptions"] == {"mode": "token", "secretName": "clip-ray-token"}
    assert spec["gcsFaultToleranceOptions"]["redisAddress"] == "redis:6379"
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"


def test_ray_start_takes_the_parameters() -> None:
    spec = of_kind("RayCluster")["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        parameters = [f"--{name}={value}" for name, value in group["rayStartParams"].items()]
        start.make_context("ray start", parameters)


def test_spot_nodes_are_tolerated_and_come_first() -> None:
    groups = {g["groupName"]: g for g in of_kind("RayCluster")["spec"]["workerGroupSpecs"]}
    spot, on_demand = groups["gpu-spot"], groups["gpu-on-demand"]
    assert spot["priority"] > on_demand["priority"]
    taints = {
        name: {taint["key"] for taint in group["template"]["spec"]["tolerations"]}
        for name, group in groups.items()
    }
    assert taints["gpu-spot"] == {"nvidia.com/gpu", "clip-ray/spot"}
    assert taints["gpu-on-demand"] == {"nvidia.com/gpu"}
    assert groups["readers"]["labels"] == {"clip-ray/role": "reader"}


def test_a_job_is_tried_again_and_its_run_has_a_name_to_resume_by() -> None:
    spec = of_kind("RayJob", "job")["spec"]
    script, config = spec["entrypoint"].removeprefix("python ").split()
    assert script == "/opt/clip-ray/jobs/train.py" and config == "/etc/clip-ray/config.yaml"
    assert spec["backoffLimit"] > 0 and spec["shutdownAfterJobFinishes"]
    assert "working_dir" not in yaml.safe_load(spec["runtimeEnvYAML"])
    run = load_config(KUBERNETES / "job" / "config.yaml")
    assert run.name and run.storage.root.startswith("s3://")
    assert run.cluster.gpus_per_worker == 1 and run.cluster.address is None


@pytest.mark.parametrize("folder", FOLDERS)
def test_pods_are_not_root_and_have_no_more_rights_than_they_need(folder: str) -> None:
    for pod in pod_specs(folder):
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert not any("hostPath" in volume for volume in pod.get("volumes", []))
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    with_token = [p for p in pod_specs(folder) if p.get("automountServiceAccountToken", True)]
    assert [pod["containers"][0]["name"] for pod in with_token] == ["ray-head"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_container_has_limits_probes_and_a_fixed_image(folder: str) -> None:
    found = [container for manifest in manifests(folder) for container in containers(manifest)]
    assert len(found) == len(pod_specs(folder))
    for container in found:
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
        assert container["image"].rsplit(":", 1)[1][0].isdigit()
        if container["name"] != "ray-job-submitter":
            assert container["readinessProbe"] and container["livenessProbe"]


def test_ray_nodes_share_memory_within_their_limit() -> None:
    for pod in pod_specs("cluster")[:-1]:
        shm = next(volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm")
        (container,) = pod["containers"]
        assert shm["medium"] == "Memory"
        assert gib(shm["sizeLimit"]) < gib(container["resources"]["limits"]["memory"])
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]


def gib(size: str) -> float:
    assert size.endswith("Gi")
    return float(size.removesuffix("Gi"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_secret_is_in_the_tree(folder: str) -> None:
    assert "Secret" not in {manifest["kind"] for manifest in manifests(folder)}
    for container in (c for manifest in manifests(folder) for c in containers(manifest)):
        for variable in container.get("env", []):
            secret = any(word in variable["name"] for word in ("AUTH", "KEY", "PASS", "TOKEN"))
            assert not secret or "secretKeyRef" in variable["valueFrom"]


def test_redis_and_the_dashboard_are_reached_by_those_who_need_them() -> None:
    policies = {m["metadata"]["name"]: m["spec"] for m in manifests("cluster")
                if m["kind"] == "NetworkPolicy"}  # fmt: skip
    (to_redis,) = policies["redis"]["ingress"]
    (peer,) = to_redis["from"]
    assert peer["podSelector"]["matchExpressions"][0]["values"] == ["head", "redis-cleanup"]
    from_elsewhere = policies["ray"]["ingress"][1]
    assert [port["port"] for port in from_elsewhere["ports"]] == [8265]
