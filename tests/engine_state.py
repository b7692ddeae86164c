"""An engine's whole state on each rank, from the fragments of all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from clip_ray.collectives import all_gather_objects
from clip_ray.training.checkpoint import merge_fragments

if TYPE_CHECKING:
    from clip_ray.training.engine import Engine


def whole_state(engine: Engine) -> dict[str, Tensor]:
    """By name, each tensor in its parameter's shape. Every rank must call it."""
    shapes = {n: getattr(p, "ds_shape", p.shape) for n, p in engine.module.named_parameters()}
    found = merge_fragments(all_gather_objects(engine.masters.fragments()))
    return {
        key: tensor.reshape(shapes.get(key.partition("/")[2], tensor.shape))
        for key, tensor in found.items()
    }
