"""The two towers and their space."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from clip_ray.config.fields import Positive, Section


class ImageTowerConfig(Section):
    """The image encoder, by its timm name."""

    timm_name: str = Field(description="A timm architecture: resnet50_gn, vit_base_patch16_224, …")
    size: Positive = Field(default=224, description="Height and width of the input, in pixels.")
    kwargs: dict[str, Any] = Field(default={}, description="Further arguments of timm's factory.")
    pretrained: bool = Field(
        default=False, description="Start from weights: timm's of that name, or those in `weights`."
    )
    weights: str | None = Field(default=None, description="Local weights file for `pretrained`.")
    center_crop: Literal["open_clip", "hf"] = Field(
        default="open_clip",
        description="Crop of val, test and search images: as open_clip cuts, or as Hugging Face's "
        "CLIP does, one pixel apart where the remainder is odd. Kept with the weights.",
    )
    freeze_batch_norm: bool = Field(
        default=False,
        description="Freeze BatchNorm, whose batch statistics would make the gradient depend on "
        "the micro batch; `pretrained` does so too.",
    )
    mean: tuple[float, float, float] = Field(
        default=(0.48145466, 0.4578275, 0.40821073), description="RGB mean of inputs in [0, 1]."
    )
    std: tuple[float, float, float] = Field(
        default=(0.26862954, 0.26130258, 0.27577711), description="RGB deviation of the inputs."
    )


class TextTowerConfig(Section):
    """The text encoder, a Hugging Face Transformer, and its tokenizer."""

    model_type: str = Field(
        default="clip_text_model",
        description="transformers model type that is built from `kwargs` where `name` is null.",
    )
    name: str | None = Field(
        default=None, description="Hugging Face name or local folder of the architecture."
    )
    kwargs: dict[str, Any] = Field(default={}, description="Fields of the transformers config.")
    pretrained: bool = Field(default=False, description="Load the weights of `name`.")
    pooling: Literal["first", "last", "mean"] = Field(
        default="last", description="Token that stands for the sentence: [CLS], end, or the mean."
    )
    context_length: Annotated[int, Field(ge=4, le=4096)] = Field(
        default=77, description="Tokens per caption, begin and end included; longer ones are cut."
    )
    tokenizer: str | None = Field(
        default=None,
        description="Hugging Face name or local folder; null trains one on the train captions.",
    )
    vocab_size: Annotated[int, Field(ge=8)] = Field(
        default=49408, description="Largest vocabulary of a tokenizer trained here."
    )

    @model_validator(mode="after")
    def _pretrained_has_a_name(self) -> TextTowerConfig:
        if self.pretrained and self.name is None:
            raise ValueError("pretrained is true, so name must say whose weights to load")
        if self.pretrained and self.tokenizer is None:
            raise ValueError("pretrained is true, so tokenizer must name the one it was made with")
        return self


class ModelConfig(Section):
    """Two towers, projected into one space."""

    preset: str | None = Field(
        default=None, description="Named model that the other fields refine: see `clip-ray config`."
    )
    embed_dim: Positive = Field(default=512, description="Dimension D of the shared space.")
    image: ImageTowerConfig
    text: TextTowerConfig
