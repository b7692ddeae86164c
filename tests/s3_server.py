"""The S3 server that tests talk to: the embedded one, or Ceph where CLIP_RAY_TEST_S3=ceph."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path

from ceph import ceph_s3

from clip_ray.embedded_s3 import embedded_s3

IS_CEPH = os.environ.get("CLIP_RAY_TEST_S3") == "ceph"


def s3_server(folder: Path) -> AbstractContextManager[dict[str, str]]:
    """Runs while the block does; yields the environment that its clients need."""
    return ceph_s3(folder) if IS_CEPH else embedded_s3(folder)
