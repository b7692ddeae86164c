"""The file for `ray up`: well formed by Ray's and EC2's own schemas, and as secure as is said."""

from __future__ import annotations

import copy
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from botocore.exceptions import ParamValidationError
from botocore.loaders import Loader
from botocore.model import ServiceModel
from botocore.validate import validate_parameters
from ray.autoscaler._private.aws.config import _configure_from_network_interfaces
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

ROOT = Path(__file__).parents[2]
AWS = yaml.safe_load((ROOT / "raycluster" / "aws.yaml").read_text())
TYPES = AWS["available_node_types"]
GPUS = {"g6.12xlarge": 4, "g5.12xlarge": 4, "p5.48xlarge": 8}
VCPUS = {"g6.12xlarge": 48, "g5.12xlarge": 48, "p5.48xlarge": 192, "c6id.4xlarge": 16}
pytestmark = pytest.mark.timeout(60)


def changed(*path: str, to: Any) -> dict[str, Any]:
    """The file with another value at `path`."""
    copied = part = copy.deepcopy(AWS)
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = to
    return copied


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` does before it talks to AWS."""
    with_defaults = prepare_config(copy.deepcopy(config))
    validate_config(with_defaults)
    return _configure_from_network_interfaces(with_defaults)


@cache
def ec2() -> ServiceModel:
    return ServiceModel(Loader().load_service_model("ec2", "service-2"))


def check_instance(node_config: dict[str, Any]) -> None:
    """Raises ParamValidationError where EC2's RunInstances does not know what is asked for."""
    asked = {name: value for name, value in node_config.items() if name != "SubnetIds"}
    shape = ec2().operation_model("RunInstances").input_shape
    validate_parameters(asked | {"MinCount": 1, "MaxCount": 1}, shape)


def test_ray_takes_the_file() -> None:
    config = prepared(AWS)
    assert config["available_node_types"]["head"]["max_workers"] == 0
    assert config["head_setup_commands"] == AWS["setup_commands"]


@pytest.mark.parametrize("name", TYPES)
def test_ec2_takes_each_node_type(name: str) -> None:
    check_instance(prepared(AWS)["available_node_types"][name]["node_config"])


@pytest.mark.parametrize(
    ("path", "to"),
    [
        (("idle_timeout",), 5),
        (("max_workers",), "16"),
        (("provider", "use_internal_ips"), "yes"),
        (("auth", "ssh_key"), "a.pem"),
        (("available_node_types", "readers", "resources", "CPU"), 15.5),
        (("available_node_types", "readers", "spot"), True),
        (("available_node_types", "readers", "labels"), {"clip-ray/role": 1}),
        (("head_start_ray_commands",), "ray start --head"),
    ],
)
def test_a_mistake_in_the_file_is_found(path: tuple[str, ...], to: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        prepared(changed(*path, to=to))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("InstanceTypes", ["g6.12xlarge"]),
        ("MetadataOptions", {"HttpToken": "required"}),
        ("BlockDeviceMappings", {"DeviceName": "/dev/sda1"}),
        ("InstanceMarketOptions", "spot"),
        ("SecurityGroupIds", "sg-1"),
    ],
)
def test_a_mistake_in_a_node_type_is_found(name: str, value: Any) -> None:
    with pytest.raises(ParamValidationError, match=name):
        check_instance(TYPES["gpu-g6"]["node_config"] | {name: value})


def test_subnets_beside_network_interfaces_are_found() -> None:
    p5 = TYPES["gpu-p5-spot"]["node_config"] | {"SubnetIds": ["subnet-1"]}
    with pytest.raises(ValueError, match="NetworkInterfaces"):
        prepared(changed("available_node_types", "gpu-p5-spot", "node_config", to=p5))


def test_no_work_runs_on_the_head_and_it_is_on_demand() -> None:
    head = TYPES[AWS["head_node_type"]]
    assert head["resources"] == {"CPU": 0} and head["max_workers"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]


@pytest.mark.parametrize("name", [name for name in TYPES if name != "head"])
def test_a_type_offers_what_its_instance_has(name: str) -> None:
    node_type = TYPES[name]
    instance = node_type["node_config"]["InstanceType"]
    offered = {"CPU": VCPUS[instance]} | ({"GPU": GPUS[instance]} if instance in GPUS else {})
    assert node_type["resources"] == offered
    role = "trainer" if instance in GPUS else "reader"
    assert node_type["labels"] == {"clip-ray/role": role}
    assert node_type["max_workers"] <= AWS["max_workers"]


def test_gpu_nodes_are_spot_but_for_a_reserve() -> None:
    spot = {name for name, t in TYPES.items() if "InstanceMarketOptions" in t["node_config"]}
    assert spot == {"gpu-g6-spot", "gpu-g5-spot", "gpu-p5-spot", "readers"}


def test_every_card_of_a_p5_has_efa() -> None:
    cards = TYPES["gpu-p5-spot"]["node_config"]["NetworkInterfaces"]
    assert [card["NetworkCardIndex"] for card in cards] == list(range(32))
    assert [card["InterfaceType"] for card in cards] == ["efa"] + ["efa-only"] * 31
    assert [card["DeviceIndex"] for card in cards] == [0] + [1] * 31


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_ray_starts_with_the_token_and_the_spilling_disk(kind: str) -> None:
    (start,) = [c for c in AWS[f"{kind}_start_ray_commands"] if "ray start" in c]
    before, _, arguments = start.partition("ray start")
    assert "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token;" in before
    assert "--object-spilling-directory=/opt/dlami/nvme/spill" in arguments
    assert AWS["provider"]["region"] in before


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_ray_start_takes_the_arguments(kind: str) -> None:
    command = AWS[f"{kind}_start_ray_commands"][-1].partition("ray start")[2]
    start.make_context("ray start", shlex.split(command))


def test_the_commands_are_shell() -> None:
    lists = [AWS[name] for name in AWS if name.endswith("_commands")]
    for command in (command for commands in lists for command in commands):
        subprocess.run(["bash", "-n", "-c", command], check=True, timeout=10)
    assert AWS["setup_commands"][-1].endswith(">> ~/.bashrc")


def test_the_dashboard_listens_on_loopback() -> None:
    assert "--dashboard-host=127.0.0.1" in AWS["head_start_ray_commands"][-1]
    assert "RAY_enable_autoscaler_v2=1" in AWS["head_start_ray_commands"][-1]
    assert "0.0.0.0" not in str(AWS)


def test_the_token_comes_from_a_file_of_ones_own() -> None:
    remote = "/home/ubuntu/.ray/auth_token"
    assert AWS["file_mounts"][remote] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in AWS["setup_commands"][0]


def test_there_are_no_keys_but_roles_and_metadata_is_for_tokens() -> None:
    text = (ROOT / "raycluster" / "aws.yaml").read_text()
    assert not re.search(r"AKIA|aws_(access|secret)|KeyName|ssh_private_key|\.pem", text)
    for node_type in TYPES.values():
        assert node_type["node_config"]["IamInstanceProfile"]["Name"].startswith("clip-ray-")
        assert node_type["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        (disk,) = node_type["node_config"]["BlockDeviceMappings"]
        assert disk["Ebs"]["Encrypted"]


def test_nodes_get_the_package_and_no_data() -> None:
    mounted = {path for path in AWS["file_mounts"].values() if not path.startswith("~")}
    assert all((ROOT / path).exists() for path in mounted)
    tracked = {"clip_ray", "jobs", "raycluster", "pyproject.toml", "requirements.lock",
               "README.md", "LICENSE"}  # fmt: skip
    assert mounted == tracked
