"""Floating-point operations of a training step, counted on a model without memory."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from clip_ray.config import Config
from clip_ray.model.clip import hollow_model
from clip_ray.model.groups import learning_rate_factors

# A backward computes the gradient of inputs and of weights: two products for each of the forward.
_WITH_BACKWARD = 3


class StepFlops:
    """FLOPs of the model for one global batch: forward and backward of encoders and logits.

    As model FLOPs utilisation counts them (Chowdhery et al. 2022): what is computed again is not
    counted. A tower without a trained group has no backward; one that is trained in part counts
    as a whole.
    """

    def __init__(self, config: Config, vocab_size: int) -> None:
        model = hollow_model(config.model, vocab_size)
        factors = learning_rate_factors(model, config.optim)
        self._global_batch = config.train.global_batch
        captions, size = config.data.captions_per_image, config.model.image.size
        image = torch.zeros(1, size, size, 3, dtype=torch.uint8, device="meta")
        self._of_image = _forward_flops(model.image, image) * _passes(factors, "image.")
        logits = self._global_batch * captions
        self._of_logits = 2 * logits * config.model.embed_dim * _WITH_BACKWARD
        self._encoder, self._text_passes = model.text.encoder, _passes(factors, "text.")
        self._captions = captions
        self._of_texts: dict[int, int] = {}

    def __call__(self, text_length: int) -> float:
        """With texts of so many tokens."""
        if text_length not in self._of_texts:
            # The encoder alone: the masks of real sentences look into their values.
            tokens = torch.ones(self._captions, text_length, dtype=torch.long, device="meta")
            self._of_texts[text_length] = _forward_flops(self._encoder, tokens) * self._text_passes
        of_sample = self._of_image + self._of_texts[text_length] + self._of_logits
        return self._global_batch * of_sample


def _forward_flops(module: nn.Module, inputs: torch.Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(inputs)
    return counter.get_total_flops()


def _passes(factors: dict[str, float], prefix: str) -> int:
    trained = any(factor for name, factor in factors.items() if name.startswith(prefix))
    return _WITH_BACKWARD if trained else 1
