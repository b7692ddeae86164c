"""The layers of a tower as groups, from the input to the output: what is frozen, what learns less.

As open_clip groups them: an image tower as timm does, a text tower by its Transformer's layers.
"""

from __future__ import annotations

from timm.models import group_parameters
from torch import nn

from clip_ray.config import OptimConfig, TowerOptimConfig
from clip_ray.errors import ConfigError
from clip_ray.model.clip import CLIP


def learning_rate_factors(model: CLIP, optim: OptimConfig) -> dict[str, float]:
    """Of each parameter, by name; 0 where it is frozen.

    A tower's last trained group has 1, the one before `layer_decay`, then its square, and so on;
    projections, logit_scale and logit_bias have 1. Raises ConfigError.
    """
    factors = {name: 1.0 for name, _ in model.named_parameters()}
    factors |= _of_tower("image.trunk", image_groups(model.image.trunk), optim.image, "image")
    factors |= _of_tower("text.encoder", text_groups(model.text.encoder), optim.text, "text")
    return factors


def _of_tower(
    prefix: str, groups: list[list[str]], optim: TowerOptimConfig, tower: str
) -> dict[str, float]:
    trained = len(groups) if optim.trained_groups is None else optim.trained_groups
    if trained > len(groups):
        raise ConfigError(
            f"optim.{tower}.trained_groups is {trained}: this tower has {len(groups)} groups; take "
            "at most that many, or null for all"
        )
    factors = {}
    for depth, names in enumerate(reversed(groups)):
        factor = optim.layer_decay**depth if depth < trained else 0.0
        factors |= {f"{prefix}.{name}": factor for name in names}
    return factors


def image_groups(trunk: nn.Module) -> list[list[str]]:
    """Names of a timm model's parameters: stem, then each block; norms go with the last."""
    matcher = trunk.group_matcher(coarse=False)  # type: ignore[operator]
    groups = group_parameters(trunk, matcher)
    return [groups[number] for number in sorted(groups)]


def text_groups(encoder: nn.Module) -> list[list[str]]:
    """Names of a Transformer's parameters: embeddings, then each layer; norms go with the last."""
    stacks = [
        (name, module)
        for name, module in encoder.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    layers, stack = max(stacks, key=lambda found: len(found[1]))
    groups: list[list[str]] = [[] for _ in range(len(stack) + 1)]
    place = 0
    for name, _ in encoder.named_parameters():
        if name.startswith(f"{layers}."):
            place = 1 + int(name.removeprefix(f"{layers}.").split(".")[0])
        groups[place].append(name)
    return groups
