"""Named models: what `model.preset` stands for. Dropout is 0 in all of them."""

from __future__ import annotations

from typing import Any

_CLIP_TEXT: dict[str, Any] = {
    "model_type": "clip_text_model",
    "kwargs": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
    },
    "pooling": "last",
    "context_length": 77,
    "vocab_size": 49408,
}

_DISTILBERT: dict[str, Any] = {
    "model_type": "distilbert",
    "kwargs": {
        "dim": 768,
        "hidden_dim": 3072,
        "n_layers": 6,
        "n_heads": 12,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "pooling": "first",
    "context_length": 64,
    "vocab_size": 30522,
}

MODEL_PRESETS: dict[str, dict[str, Any]] = {
    "shapes-tiny": {
        "embed_dim": 128,
        "image": {
            "timm_name": "vit_tiny_patch16_224",
            "size": 64,
            "kwargs": {"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4},
        },
        "text": {
            "model_type": "clip_text_model",
            "kwargs": {
                "hidden_size": 128,
                "intermediate_size": 512,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
            },
            "pooling": "last",
            "context_length": 40,
            "vocab_size": 1024,
        },
    },
    "resnet50-distilbert": {
        "embed_dim": 512,
        "image": {"timm_name": "resnet50_gn", "size": 224},
        "text": _DISTILBERT,
    },
    "vit-b-16": {
        "embed_dim": 512,
        "image": {"timm_name": "vit_base_patch16_224", "size": 224},
        "text": _CLIP_TEXT,
    },
    "vit-b-32": {
        "embed_dim": 512,
        "image": {"timm_name": "vit_base_patch32_224", "size": 224},
        "text": _CLIP_TEXT,
    },
}
