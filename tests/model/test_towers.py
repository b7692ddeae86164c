"""Towers by name: every preset, towers that start from weights, and those that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from test_pretrained import packed, write
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import DistilBertConfig, DistilBertModel, PreTrainedTokenizerFast

from clip_ray import load_model
from clip_ray.config import LossConfig, ModelConfig, TextTowerConfig
from clip_ray.config_file import merge
from clip_ray.errors import ConfigError
from clip_ray.model.clip import CLIP
from clip_ray.model.towers import TextTower, without_padding
from clip_ray.presets import MODEL_PRESETS

CAPTIONS = ["red star", "blue ring"]


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("shapes-tiny", 1), ("resnet50-distilbert", 91), ("vit-b-16", 150), ("vit-b-32", 151)],
)
def test_presets_build_at_their_size_and_without_dropout(preset: str, millions: int) -> None:
    config = ModelConfig.model_validate(MODEL_PRESETS[preset])
    with torch.device("meta"):
        model = CLIP(config, config.text.vocab_size, LossConfig())
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(count) == millions
    dropouts = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert set(dropouts) <= {0.0}
    assert model.text.encoder.config.to_dict().get("attention_dropout", 0.0) == 0.0


def test_towers_start_from_local_weights_and_load_without_them(tmp_path: Path) -> None:
    config = ModelConfig.model_validate(
        {
            "embed_dim": 16,
            "image": {"timm_name": "resnet10t", "size": 64, "pretrained": True,
                      "weights": str(timm_weights(tmp_path / "resnet.pth"))},
            "text": {"name": str(distilbert(tmp_path / "bert")), "pretrained": True,
                     "tokenizer": str(tmp_path / "bert"), "pooling": "first",
                     "context_length": 16},
        }
    )  # fmt: skip
    model, tokenizer, files = packed(config)
    stored = torch.load(tmp_path / "resnet.pth")
    assert torch.equal(model.image.trunk.state_dict()["layer1.0.conv1.weight"],
                       stored["layer1.0.conv1.weight"])  # fmt: skip
    assert any(type(m).__name__ == "FrozenBatchNorm2d" for m in model.image.modules())
    bert = DistilBertModel.from_pretrained(tmp_path / "bert")
    assert all(
        torch.equal(tensor, model.text.encoder.state_dict()[name])
        for name, tensor in bert.state_dict().items()
    )
    folder = tmp_path / "weights"
    folder.mkdir()
    write(folder, files)
    for origin in (*(tmp_path / "bert").iterdir(), tmp_path / "resnet.pth"):
        origin.unlink()
    loaded = load_model(folder, device="cpu")
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    ids, lengths = map(torch.from_numpy, tokenizer(CAPTIONS))
    with torch.no_grad():
        expected_images, expected_texts, *_ = model(images, without_padding(ids, lengths), lengths)
    assert torch.equal(loaded.encode_image(images), expected_images)
    assert torch.equal(loaded.encode_text(CAPTIONS), expected_texts)


TEXT_TOWERS: list[dict[str, Any]] = [
    {"model_type": "clip_text_model", "pooling": "last"},
    {"model_type": "bert", "pooling": "mean"},
    {"model_type": "roberta", "pooling": "mean",
     "kwargs": {"max_position_embeddings": 42, "pad_token_id": 0}},
    {"model_type": "distilbert", "pooling": "first",
     "kwargs": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2}},
]  # fmt: skip


@pytest.mark.parametrize("text", TEXT_TOWERS, ids=lambda text: text["model_type"])
def test_padding_that_is_cut_off_changes_no_feature_and_no_gradient(text: dict[str, Any]) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2}  # fmt: skip
    kwargs = sizes | text.get("kwargs", {})
    config = TextTowerConfig.model_validate(text | {"kwargs": kwargs, "context_length": 40})
    tower = TextTower(config, vocab_size=300).double().eval()
    generator = torch.Generator().manual_seed(0)
    token_lengths = torch.tensor([3, 17, 9, 1])
    token_ids = torch.randint(4, 300, (4, 40), generator=generator)
    token_ids[torch.arange(40) >= token_lengths[:, None]] = 0
    short = without_padding(token_ids, token_lengths)
    assert short.shape == (4, 24)
    weights = torch.randn(4, 32, dtype=torch.float64, generator=generator)
    outcomes = []
    for ids in (token_ids, short):
        tower.zero_grad()
        features = tower(ids, token_lengths)
        (features * weights).sum().backward()
        gradients = [p.grad for p in tower.parameters() if p.grad is not None]
        outcomes.append([features.detach(), *(gradient.clone() for gradient in gradients)])
    torch.testing.assert_close(*outcomes, rtol=1e-12, atol=1e-12)


def test_the_longest_text_is_never_cut() -> None:
    token_ids = torch.arange(2 * 77).view(2, 77)
    for longest, width in ((1, 8), (8, 8), (9, 16), (73, 77), (77, 77)):
        short = without_padding(token_ids[:, None], torch.tensor([[1], [longest]]))
        assert torch.equal(short, token_ids[:, None, :width])


def timm_weights(path: Path) -> Path:
    torch.manual_seed(1)
    torch.save(timm.create_model("resnet10t").state_dict(), path)
    return path


def distilbert(folder: Path) -> Path:
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "red", "star", "blue", "ring"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(folder)
    config = DistilBertConfig(
        vocab_size=len(words), dim=32, hidden_dim=64, n_layers=1, n_heads=2,
        max_position_embeddings=16, dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    DistilBertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"image": {"timm_name": "resnet50", "kwargs": {}}}, "BatchNorm makes the gradient depend"),
        ({"image": {"timm_name": "resnet5O_gn", "kwargs": {}}}, "timm cannot build it"),
        ({"text": {"model_type": "no_such_model"}}, "cannot be built by transformers"),
        ({"text": {"kwargs": {"max_position_embeddings": 8}}}, "has only 8 positions"),
        ({"text": {"kwargs": {"vocab_size": 100}}}, "has only 100 embeddings"),
    ],
)
def test_what_cannot_be_built_is_said_with_field_and_fix(over: Any, said: str) -> None:
    tree = merge(MODEL_PRESETS["shapes-tiny"], over)
    if "image" in over:
        tree["image"]["kwargs"] = {}
    with pytest.raises(ConfigError, match=said):
        CLIP(ModelConfig.model_validate(tree), 300, LossConfig())
