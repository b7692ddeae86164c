"""What one node tells of itself before a run: versions, GPUs, disks and limits. Knows no Ray."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import resource
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import clip_ray

PACKAGES = ("ray", "torch", "deepspeed", "transformers", "timm")
SHARED_MEMORY = Path("/dev/shm")
SPILL_DIR = "RAY_object_spilling_directory"
NVIDIA_TIMEOUT_S = 20


@dataclass(frozen=True)
class Gpus:
    """What torch sees; versions are None where there is none of it."""

    visible: int
    names: tuple[str, ...]
    driver: str | None
    nccl: str | None


@dataclass(frozen=True)
class MachineFacts:
    """What a node is, as a process that Ray starts there sees it."""

    versions: dict[str, str]
    gpus: Gpus
    disk_path: str
    disk_bytes: int
    disk_free_bytes: int
    shared_memory_bytes: int | None
    open_files: int
    auth_mode: str


def machine_facts(temp_dir: str) -> MachineFacts:
    """Looks at this machine; Ray spills to `temp_dir` unless the environment names another."""
    spill_dir = os.environ.get(SPILL_DIR) or temp_dir
    disk = shutil.disk_usage(spill_dir)
    has_shared_memory = SHARED_MEMORY.is_dir()
    return MachineFacts(
        versions=versions(),
        gpus=_gpus(),
        disk_path=spill_dir,
        disk_bytes=disk.total,
        disk_free_bytes=disk.free,
        shared_memory_bytes=shutil.disk_usage(SHARED_MEMORY).total if has_shared_memory else None,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        auth_mode=os.environ.get("RAY_AUTH_MODE", "disabled"),
    )


def versions() -> dict[str, str]:
    """Of Python, the frameworks and this package; of the last one the code, too, by a digest."""
    found = {"python": platform.python_version()}
    found |= {name: _version(name) for name in PACKAGES}
    return found | {"clip-ray": f"{_version('clip-ray')} {_code_digest()}"}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _code_digest() -> str:
    # A job brings its code along uninstalled: the version alone would say nothing.
    folder = Path(clip_ray.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:8]


def _gpus() -> Gpus:
    import torch
    from torch.cuda import nccl

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Gpus(
        visible=count,
        names=tuple(torch.cuda.get_device_name(index) for index in range(count)),
        driver=_driver_version(),
        nccl=".".join(map(str, nccl.version())) if count else None,
    )


def _driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        shown = subprocess.run(
            command, capture_output=True, text=True, timeout=NVIDIA_TIMEOUT_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.match(r"[\d.]+", shown)
    return found[0] if found else None
