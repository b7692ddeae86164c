"""The two encoders: any timm architecture for images, a Hugging Face Transformer for text."""

from __future__ import annotations

import math
from typing import Any

import timm
import torch
from timm.layers.norm_act import FrozenBatchNormAct2d, freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoConfig, AutoModel

from clip_ray.config import ImageTowerConfig, TextTowerConfig
from clip_ray.errors import ConfigError

TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
NOT_ARCHITECTURE = {"model_type", "architectures", "transformers_version", "dtype", "_name_or_path"}
# Texts are cut to a multiple of it: few shapes, whole tiles of the hardware.
TEXT_LENGTH_STEP = 8
SIZED_FAMILIES = ("vit_", "deit", "swin", "beit", "eva", "mixer")


class ImageTower(nn.Module):
    """uint8 pixels to pooled features."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ImageTowerConfig) -> None:
        super().__init__()
        self.trunk = _build_trunk(config)
        self.architecture = config.model_copy(
            update={
                "timm_name": _local_name(config.timm_name, self.trunk),
                "pretrained": False,
                "weights": None,
                "freeze_batch_norm": config.pretrained or config.freeze_batch_norm,
            }
        )
        self.width = int(self.trunk.num_features)  # type: ignore[arg-type]
        # Of a whole row of pixels: broadcast over the three channels alone is ten times slower.
        for name, values in (("mean", config.mean), ("std", config.std)):
            row = torch.tensor(values).repeat(config.size) * 255
            self.register_buffer(name, row, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, H, W, 3] uint8 -> [B, width]. Normalised here, on the device."""
        dtype = next(self.trunk.parameters()).dtype
        rows = images.flatten(2).float().sub_(self.mean.float()).div_(self.std.float())
        return self.trunk(rows.view(images.shape).permute(0, 3, 1, 2).to(dtype))


class TextTower(nn.Module):
    """Token ids to one feature per sentence."""

    def __init__(self, config: TextTowerConfig, vocab_size: int) -> None:
        super().__init__()
        self.encoder = _build_encoder(config, vocab_size)
        self.architecture = _architecture(config, self.encoder.config)
        self.width = int(getattr(self.encoder.config, "hidden_size", 0) or self.encoder.config.dim)
        self.pooling = config.pooling

    def forward(self, token_ids: Tensor, token_lengths: Tensor) -> Tensor:
        """token_ids: [B, L], padded on the right; token_lengths: [B] -> [B, width]."""
        positions = torch.arange(token_ids.shape[1], device=token_ids.device)
        mask = positions < token_lengths[:, None]
        output = self.encoder(input_ids=token_ids.long(), attention_mask=mask.long())
        hidden = output.last_hidden_state
        if self.pooling == "first":
            return hidden[:, 0]
        if self.pooling == "last":
            return hidden[torch.arange(len(hidden), device=hidden.device), token_lengths.long() - 1]
        weights = mask.to(hidden.dtype)[..., None]
        return (hidden * weights).sum(1) / weights.sum(1)


def without_padding(token_ids: Tensor, token_lengths: Tensor) -> Tensor:
    """token_ids [..., L] up to the longest of token_lengths [...], rounded up to a multiple of 8.

    Features and gradients stay the same, for no token sees what comes after its text. Best called
    before the tensors go to a GPU, which it would wait for.
    """
    longest = int(token_lengths.max())
    # Strides of its own: compiled code is made anew for those of another tensor.
    return token_ids[..., : math.ceil(longest / TEXT_LENGTH_STEP) * TEXT_LENGTH_STEP].contiguous()


def _build_trunk(config: ImageTowerConfig) -> nn.Module:
    kwargs: dict[str, Any] = dict(config.kwargs)
    if config.timm_name.startswith(SIZED_FAMILIES):
        kwargs["img_size"] = config.size
    if config.weights is not None:
        kwargs["pretrained_cfg_overlay"] = {"file": config.weights}
    try:
        trunk = timm.create_model(
            config.timm_name, pretrained=config.pretrained, num_classes=0, **kwargs
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"model.image.timm_name is {config.timm_name!r} with kwargs {kwargs}: timm cannot "
            f"build it: {error}"
        ) from None
    if config.pretrained or config.freeze_batch_norm:
        trunk = freeze_batch_norm_2d(trunk)
    _refuse_batch_statistics(trunk, config.timm_name)
    return trunk  # type: ignore[return-value]


def _refuse_batch_statistics(trunk: Any, name: str) -> None:
    for module in trunk.modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, FrozenBatchNormAct2d):
            raise ConfigError(
                f"model.image.timm_name is {name!r}: its BatchNorm makes the gradient depend on "
                "the micro batch; take a model with GroupNorm or LayerNorm (resnet50_gn), or "
                "model.image.pretrained=true or freeze_batch_norm=true, which freeze it"
            )


def _local_name(name: str, trunk: nn.Module) -> str:
    """The architecture behind a name that timm looks up elsewhere (hf-hub:, local-dir:)."""
    description = getattr(trunk, "pretrained_cfg", None) or {}
    return description.get("architecture") or name if ":" in name else name


def _build_encoder(config: TextTowerConfig, vocab_size: int) -> Any:
    kwargs = {"vocab_size": vocab_size, **config.kwargs}
    try:
        if config.pretrained and config.name is not None:
            encoder: Any = AutoModel.from_pretrained(config.name, dtype=torch.float32)
        elif config.name is not None:
            encoder = AutoModel.from_config(AutoConfig.from_pretrained(config.name, **kwargs))
        else:
            # The ids of the tokenizer that is trained here.
            defaults = {"max_position_embeddings": config.context_length, **TOKEN_IDS}
            architecture = AutoConfig.for_model(config.model_type, **(defaults | kwargs))
            encoder = AutoModel.from_config(architecture)
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise ConfigError(
            f"model.text ({config.name or config.model_type!r}) cannot be built by transformers: "
            f"{str(error).splitlines()[0]}"
        ) from None
    _check_lengths(config, encoder.config, vocab_size)
    return encoder


def _check_lengths(config: TextTowerConfig, built: Any, vocab_size: int) -> None:
    positions = getattr(built, "max_position_embeddings", config.context_length)
    if positions < config.context_length:
        raise ConfigError(
            f"model.text.context_length is {config.context_length}: the text tower has only "
            f"{positions} positions; take at most that many"
        )
    if built.vocab_size < vocab_size:
        raise ConfigError(
            f"model.text.tokenizer has {vocab_size} tokens: the text tower has only "
            f"{built.vocab_size} embeddings; name the tokenizer that it was made with"
        )


def _architecture(config: TextTowerConfig, built: Any) -> TextTowerConfig:
    """What builds the same encoder again, without the hub or the folder that it came from."""
    fields = built.to_diff_dict()
    kwargs = {k: v for k, v in fields.items() if k not in NOT_ARCHITECTURE}
    resolved = {"model_type": built.model_type, "name": None, "pretrained": False}
    return config.model_copy(
        update={**resolved, "kwargs": {**kwargs, "vocab_size": built.vocab_size}}
    )
