"""The files of a weights folder, on disk or in S3; read without what models are made of."""

from __future__ import annotations

from pathlib import Path

from clip_ray.errors import RunError
from clip_ray.storage import Storage

WEIGHTS, CONFIG, TOKENIZER = FILES = ("model.safetensors", "config.json", "tokenizer.json")


def read_file(path: str | Path, name: str) -> bytes:
    """One file of a weights folder, local or at an s3:// address. Raises RunError."""
    if str(path).startswith("s3://"):
        return Storage(str(path)).read_bytes(name)
    try:
        return (Path(path) / name).read_bytes()
    except OSError as error:
        raise RunError(f"{path}: holds no weights: {error}") from None
