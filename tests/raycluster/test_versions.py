"""One version of Ray, of Python and of clip-ray, wherever one is written."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from manifests import containers, manifests
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()
DOCKERFILE = (ROOT / "raycluster" / "Dockerfile").read_text()
pytestmark = pytest.mark.timeout(60)


def locked(package: str) -> str:
    return re.findall(rf"^{package}==(\S+)$", LOCK, re.MULTILINE | re.IGNORECASE)[0]


def tag() -> str:
    """That of the image: clip-ray's version and Ray's."""
    return f"{PROJECT['version']}-ray{locked('ray')}"


def wrong_versions(text: str) -> list[str]:
    """The versions of Ray, and the image tags, in a text that are not those of the lock."""
    rays = re.findall(r"rayVersion: (\S+)|ray\.__version__ == '([^']+)'|\bray==(\S+)", text)
    tags = re.findall(r"\bclip-ray:(\S+)|image\.version=\"([^\"]+)\"", text)
    return [
        *(found for group in rays for found in group if found and found != locked("ray")),
        *(found for group in tags for found in group if found and found != tag()),
    ]


def files() -> list[Path]:
    folder = ROOT / "raycluster"
    return [folder / "Dockerfile", *folder.rglob("*.yaml")]


def test_the_lock_holds_what_the_project_asks_for() -> None:
    for requirement in map(Requirement, PROJECT["dependencies"]):
        assert requirement.specifier.contains(locked(requirement.name))


@pytest.mark.parametrize("path", files(), ids=lambda path: path.name)
def test_every_version_is_the_locks(path: Path) -> None:
    assert not wrong_versions(path.read_text())


def test_versions_are_written_where_they_must_be() -> None:
    assert f'image.version="{tag()}"' in DOCKERFILE
    assert f"ray.__version__ == '{locked('ray')}'" in DOCKERFILE
    assert f"--tag clip-ray:{tag()}" in DOCKERFILE
    (cluster,) = [m["spec"] for m in manifests("cluster") if m["kind"] == "RayCluster"]
    assert cluster["rayVersion"] == locked("ray")


@pytest.mark.parametrize("folder", ["cluster", "job"])
def test_all_pods_but_redis_run_our_image(folder: str) -> None:
    images = {c["image"] for manifest in manifests(folder) for c in containers(manifest)}
    ours = {image for image in images if not image.startswith("redis:")}
    assert len(ours) == 1 and ours.pop().endswith(f"/clip-ray:{tag()}")


@pytest.mark.parametrize(
    "text",
    [
        "rayVersion: 2.59.0",
        "image: &image clip-ray:0.1.0-ray2.59.0",
        "image: clip-ray:0.2.0-ray2.60.0",
        "image: clip-ray:latest",
        "RUN pip install ray==2.61.0",
        'LABEL org.opencontainers.image.version="0.1.0"',
    ],
)
def test_another_version_is_found(text: str) -> None:
    assert len(wrong_versions(text)) == 1


def test_python_is_the_one_that_the_lock_is_for() -> None:
    (python,) = re.findall(r"^# .* Python (\d+\.\d+):", LOCK, re.MULTILINE)
    assert re.search(rf"^FROM python:{re.escape(python)}\.\d+-slim", DOCKERFILE, re.MULTILINE)
    commands = yaml.safe_load((ROOT / "raycluster" / "aws.yaml").read_text())["setup_commands"]
    assert any(f"--python {python} " in command for command in commands)
    assert SpecifierSet(PROJECT["requires-python"]).contains(Version(python))


def test_the_image_and_the_nodes_install_the_lock_and_then_the_package() -> None:
    commands = yaml.safe_load((ROOT / "raycluster" / "aws.yaml").read_text())["setup_commands"]
    for text in (DOCKERFILE, "\n".join(commands)):
        assert text.index("requirements.lock") < text.index("--no-deps")


def test_the_image_is_made_of_files_that_are_there_and_does_not_run_as_root() -> None:
    copied = [line.split()[1:-1] for line in DOCKERFILE.splitlines() if line.startswith("COPY")]
    ignored = (ROOT / "raycluster" / "Dockerfile.dockerignore").read_text().splitlines()
    for name in (name for names in copied for name in names):
        assert (ROOT / name).exists() and f"!{name}" in ignored
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE)[-1] == "1000:1000"
