"""Weights on disk or in S3: safetensors, config and tokenizer in one folder, loaded in one call."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from clip_ray.config import LossConfig, ModelConfig
from clip_ray.data.tokenizer import CaptionTokenizer
from clip_ray.data.transforms import center_crop
from clip_ray.errors import RunError
from clip_ray.model.clip import CLIP
from clip_ray.model.towers import without_padding
from clip_ray.model.weights_folder import CONFIG, FILES, TOKENIZER, WEIGHTS, read_file
from clip_ray.storage import Storage


class PretrainedCLIP:
    """A trained CLIP that takes what people have: PIL images and sentences."""

    def __init__(self, model: CLIP, tokenizer: CaptionTokenizer, config: ModelConfig) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.image = config.image
        self.metadata: dict[str, str] = {}

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.logit_scale.device

    @torch.inference_mode()
    def encode_image(self, images: Sequence[Image.Image] | Tensor | np.ndarray) -> Tensor:
        """PIL images, or a uint8 batch [B, H, W, 3] -> unit vectors [B, D] float32."""
        if isinstance(images, np.ndarray):
            images = torch.from_numpy(images)
        if not isinstance(images, Tensor):
            crops = [
                center_crop(image.convert("RGB"), self.image.size, self.image.center_crop)
                for image in images
            ]
            images = torch.from_numpy(np.stack(crops))
        features, *_ = self.model(images=images.to(self.device))
        return features

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Sentences -> unit vectors [B, D] float32."""
        token_ids, token_lengths = map(torch.from_numpy, self.tokenizer(texts))
        _, features, *_ = self.model(
            token_ids=without_padding(token_ids, token_lengths).to(self.device),
            token_lengths=token_lengths.to(self.device),
        )
        return features


def pack_weights(
    tensors: Mapping[str, Tensor],
    architecture: ModelConfig,
    tokenizer: CaptionTokenizer,
    about: Any,
) -> dict[str, bytes]:
    """The files of a weights folder; `about` (step, metrics) is kept in the weights' header.

    `architecture` is `CLIP.architecture`.
    """
    header = {"tokenizer_sha256": tokenizer.sha256, "about": json.dumps(about)}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    description = {
        "model": architecture.model_dump(mode="json"),
        "context_length": tokenizer.context_length,
        "vocab_size": tokenizer.vocab_size,
    }
    return {
        CONFIG: json.dumps(description, indent=2).encode(),
        TOKENIZER: tokenizer.json_text.encode(),
        WEIGHTS: save(contiguous, metadata=header),
    }


def load_weights(model: CLIP, path: str | Path) -> None:
    """Gives a model what a weights folder holds. Raises RunError where it does not fit."""
    try:
        tensors = load(read_file(path, WEIGHTS))
    except SafetensorError as error:
        raise RunError(f"{path}/{WEIGHTS}: is no safetensors file: {error}") from None
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    theirs = {name: tensor.shape for name, tensor in tensors.items()}
    differing = [n for n in sorted(own.keys() | theirs.keys()) if own.get(n) != theirs.get(n)]
    if differing:
        first = differing[0]
        raise RunError(
            f"{path}: does not fit the config's model: {len(differing)} tensors differ, {first} is "
            f"{theirs.get(first)} there, {own.get(first)} here; take the model of its config.json"
        )
    model.load_state_dict(tensors)


def load_model(path: str | Path, device: str | torch.device | None = None) -> PretrainedCLIP:
    """The model in a local folder or at an s3:// address, on `device` (a GPU where there is one).

    Raises RunError where the files are missing or do not belong together.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not str(path).startswith("s3://"):
        return _load_folder(Path(path), device)
    with tempfile.TemporaryDirectory() as folder:
        for name in FILES:
            Storage(str(path)).download(name, Path(folder) / name)
        return _load_folder(Path(folder), device)


def _load_folder(folder: Path, device: str | torch.device) -> PretrainedCLIP:
    try:
        description = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tokenizer_json = (folder / TOKENIZER).read_text(encoding="utf-8")
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise RunError(f"{folder}: holds no weights: {error}") from None
    tokenizer = CaptionTokenizer(tokenizer_json, description["context_length"])
    if metadata.get("tokenizer_sha256") != tokenizer.sha256:
        raise RunError(
            f"{folder}: {WEIGHTS} was trained with tokenizer {metadata.get('tokenizer_sha256')}, "
            f"{TOKENIZER} is {tokenizer.sha256}"
        )
    config = ModelConfig.model_validate(description["model"])
    loss = LossConfig(kind="sigmoid") if "logit_bias" in tensors else LossConfig()
    model = CLIP(config, description["vocab_size"], loss)
    model.load_state_dict(tensors)
    loaded = PretrainedCLIP(model.to(device), tokenizer, config)
    loaded.metadata = metadata
    return loaded
