"""Weights are saved and loaded with one call, and need nothing beside their folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHAPES_YAML
from PIL import Image

from clip_ray import load_model
from clip_ray.config import LossConfig, ModelConfig
from clip_ray.config_file import load_config
from clip_ray.data.tokenizer import CaptionTokenizer, make_tokenizer
from clip_ray.errors import RunError
from clip_ray.model.clip import CLIP
from clip_ray.model.pretrained import pack_weights
from clip_ray.model.towers import without_padding
from clip_ray.storage import Storage

CAPTIONS = ["a large red star at the top left", "a small blue ring"]


def packed(config: ModelConfig) -> tuple[CLIP, CaptionTokenizer, dict[str, bytes]]:
    torch.manual_seed(3)
    tokenizer = make_tokenizer(config.text, CAPTIONS)
    model = CLIP(config, tokenizer.vocab_size, LossConfig()).eval()
    files = pack_weights(model.state_dict(), model.architecture, tokenizer, {"step": 7})
    return model, tokenizer, files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_pictures_arrays_and_sentences_are_encoded_as_in_training(tmp_path: Path) -> None:
    model, tokenizer, files = packed(load_config(SHAPES_YAML).model)
    loaded = load_model(write(tmp_path, files), device="cpu")
    assert loaded.metadata["about"] == '{"step": 7}'
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    ids, lengths = map(torch.from_numpy, tokenizer(CAPTIONS))
    with torch.no_grad():
        images, texts, *_ = model(torch.from_numpy(pixels), without_padding(ids, lengths), lengths)
    assert torch.equal(loaded.encode_image(pixels), images)
    assert torch.equal(loaded.encode_image([Image.fromarray(p) for p in pixels]), images)
    assert torch.equal(loaded.encode_text(CAPTIONS), texts)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(2))


@pytest.mark.s3
def test_weights_in_storage_load_by_their_address(storage: Storage) -> None:
    model, _, files = packed(load_config(SHAPES_YAML).model)
    for name, data in files.items():
        storage.write_bytes(f"weights/{name}", data)
    loaded = load_model(storage.uri("weights"), device="cpu")
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in loaded.model.state_dict().items())


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    _, _, files = packed(load_config(SHAPES_YAML).model)
    other = make_tokenizer(load_config(SHAPES_YAML).model.text, ["quite other words"])
    files["tokenizer.json"] = other.json_text.encode()
    with pytest.raises(RunError, match=r"was trained with tokenizer .*, tokenizer.json is"):
        load_model(write(tmp_path, files))
    with pytest.raises(RunError, match="holds no weights"):
        load_model(tmp_path / "nothing")
