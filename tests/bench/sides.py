"""What benches with several sides share: photographs in S3, sides in processes, medians."""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from photos import caption, write_raw_set

from clip_ray.config_file import load_config, shipped
from clip_ray.embedded_s3 import storage_session
from clip_ray.storage import Storage

TAR_IMAGES = 500
SIDE_TIMEOUT_S = 1800
Figures = dict[str, float]


@contextlib.contextmanager
def stored_photos(images: int) -> Iterator[tuple[list[bytes], list[str]]]:
    """The JPEGs, in a raw folder and as webdataset's tars in S3; and the options that say where."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"storage.embedded_dir={folder}/s3", "storage.root=s3://clip-ray-bench/x"]
        config = load_config(shipped("jobs/configs/shapes.yaml"), overrides)
        with storage_session(config.storage) as storage:
            jpegs = write_raw_set(Path(folder) / "raw", images)
            _write_tars(storage, jpegs)
            yield jpegs, ["--root", storage.root, "--raw", f"{folder}/raw"]


def _write_tars(storage: Storage, jpegs: Sequence[bytes]) -> None:
    for start in range(0, len(jpegs), TAR_IMAGES):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for number, jpeg in enumerate(jpegs[start : start + TAR_IMAGES], start):
                for suffix, data in (("jpg", jpeg), ("txt", caption(number).encode())):
                    entry = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
        storage.write_bytes(f"tars/{start // TAR_IMAGES:05d}.tar", buffer.getvalue())


def run_side(script: str, arguments: Sequence[str], **environment: str) -> dict[str, Any]:
    """The JSON object on the last line of a script beside this one, run by itself."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), *arguments],
        stdout=subprocess.PIPE, text=True, check=True, timeout=SIDE_TIMEOUT_S,
        env=os.environ | environment,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def medians(rounds: Sequence[dict[str, Figures]]) -> dict[str, Figures]:
    """Of each figure of each side, over the rounds."""
    return {
        side: {field: statistics.median(one[side][field] for one in rounds) for field in figures}
        for side, figures in rounds[0].items()
    }
