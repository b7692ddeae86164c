"""CLIP on Flickr30k at scale: Ray streams, DeepSpeed trains, S3 keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clip_ray.model.pretrained import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> object:
    # Lazy, so that `import clip_ray` (the CLI's --help, the config) does not wait for torch.
    if name == "load_model":
        from clip_ray.model.pretrained import load_model

        return load_model
    raise AttributeError(f"module 'clip_ray' has no attribute {name!r}")
