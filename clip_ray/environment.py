"""Variables of the environment: which go to other nodes, and those for a while."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

# What workers on other nodes need to reach S3. Keys are never among them: nodes have their own.
FORWARDED = (
    "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_REGION",
    "AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION", "DS_ACCELERATOR",
)  # fmt: skip


@contextlib.contextmanager
def temporary_environment(values: dict[str, str]) -> Iterator[None]:
    """Within the block, this process, and what it starts, has these in its environment."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
