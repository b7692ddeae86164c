"""CLIP: two towers, two projections, one learnable temperature."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_ray.config import LossConfig, ModelConfig
from clip_ray.data.tokenizer import SPECIAL_TOKENS
from clip_ray.model.towers import ImageTower, TextTower


class CLIP(nn.Module):
    """Images and texts to unit vectors of one space (Radford et al. 2021).

    `architecture` is a config that builds the same model, without weights, from nothing but itself.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, loss: LossConfig) -> None:
        super().__init__()
        self._compiled = False
        self.image = ImageTower(config.image)
        self.text = TextTower(config.text, vocab_size)
        self.architecture = config.model_copy(
            update={"image": self.image.architecture, "text": self.text.architecture}
        )
        self.image_projection = nn.Linear(self.image.width, config.embed_dim, bias=False)
        self.text_projection = nn.Linear(self.text.width, config.embed_dim, bias=False)
        for projection in (self.image_projection, self.text_projection):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        # Of shape [1]: DeepSpeed cannot shard a parameter without dimensions.
        self.logit_scale = nn.Parameter(
            torch.tensor([math.log(1 / loss.temperature)]), requires_grad=loss.learn_temperature
        )
        self.logit_bias = (
            nn.Parameter(torch.tensor([loss.bias])) if loss.kind == "sigmoid" else None
        )

    def recompute(self, towers: Iterable[str]) -> None:
        """Lets these towers (image, text) make their activations again in the backward."""
        if "image" in towers:
            self.image.trunk.set_grad_checkpointing(True)  # type: ignore[operator]
        if "text" in towers:
            self.text.encoder.gradient_checkpointing_enable({"use_reentrant": False})

    def compile_towers(self) -> None:
        """Lets torch.compile make the towers' forwards, with the random numbers of eager mode."""
        from torch._inductor import config  # slow to import, and rarely wanted

        config.fallback_random = True
        self.image.compile(dynamic=False)
        self.text.compile()
        self._compiled = True

    def forward(
        self,
        images: Tensor | None = None,
        token_ids: Tensor | None = None,
        token_lengths: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
        """Features of what is given, exp(logit_scale) and logit_bias: [B, D], [C, D], [1], [1].

        images: [B, H, W, 3] uint8; token_ids: [C, L]; token_lengths: [C]. Scale and bias are
        returned because under ZeRO-3 they can be read only inside a forward.
        """
        image_features = text_features = None
        if images is not None:
            image_features = _unit(self.image_projection(self.image(images)))
        if token_ids is not None and token_lengths is not None:
            if self._compiled:  # once for texts of any length
                torch._dynamo.maybe_mark_dynamic(token_ids, 1)
            text_features = _unit(self.text_projection(self.text(token_ids, token_lengths)))
        bias = None if self.logit_bias is None else _wide(self.logit_bias)
        return image_features, text_features, _wide(self.logit_scale).exp(), bias


def hollow_model(config: ModelConfig, vocab_size: int = len(SPECIAL_TOKENS)) -> CLIP:
    """The model without memory and without its weights. Raises ConfigError if it cannot be."""
    image = config.image.model_copy(
        update={
            "pretrained": False,
            "weights": None,
            "freeze_batch_norm": config.image.pretrained or config.image.freeze_batch_norm,
        }
    )
    text = config.text.model_copy(update={"pretrained": False})
    with torch.device("meta"):
        hollow = config.model_copy(update={"image": image, "text": text})
        return CLIP(hollow, vocab_size, LossConfig())


def _unit(features: Tensor) -> Tensor:
    return F.normalize(_wide(features), dim=-1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
