"""The loss, the optimizer, and how training is sharded and how long it goes on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from clip_ray.config.fields import Fraction, Positive, Section, Share


class LossConfig(Section):
    """How image-caption pairs of the global batch are contrasted."""

    kind: Literal["info_nce", "sigmoid"] = Field(
        default="info_nce",
        description="Symmetric cross-entropy (CLIP), or a sigmoid for each pair, with a bias "
        "(SigLIP).",
    )
    method: Literal["auto", "gathered", "tiled", "ring"] = Field(
        default="auto",
        description="All equal; gathered holds B×G logits, tiled one tile of them and all "
        "features, ring a tile and the features of two workers; auto chooses by size.",
    )
    tile: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Rows and columns of logits that tiled and ring hold at a time; null takes "
        "512 on a CPU, 2048 on a GPU.",
    )
    positives: Literal["shared", "masked"] = Field(
        default="shared",
        description="Where data.captions_per_image is more than 1, an image's captions share its "
        "target; masked contrasts each pair alone and leaves its image's other captions out.",
    )
    label_smoothing: Share = Field(
        default=0, description="Share of InfoNCE's target that is spread over the global batch."
    )
    temperature: float = Field(
        default=0.07, gt=0, le=10, description="Initial temperature: logit_scale = ln(1 / it)."
    )
    learn_temperature: bool = Field(default=True, description="Whether logit_scale is trained.")
    max_scale: float = Field(
        default=100.0, ge=1, description="Bound on exp(logit_scale), clamped on the fp32 master."
    )
    bias: float = Field(default=-10.0, description="Initial logit_bias of the sigmoid loss.")

    @model_validator(mode="after")
    def _starts_within_the_bound(self) -> LossConfig:
        if 1 / self.temperature > self.max_scale:
            raise ValueError(
                f"temperature is {self.temperature}: 1 / temperature must be at most "
                f"max_scale ({self.max_scale})"
            )
        return self

    @model_validator(mode="after")
    def _smooths_a_target(self) -> LossConfig:
        if self.label_smoothing and (self.kind, self.positives) != ("info_nce", "shared"):
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}: only kind info_nce with shared "
                "positives has a target to smooth; set it to 0"
            )
        if self.kind == "sigmoid" and self.positives == "masked":
            raise ValueError("positives is masked: kind sigmoid has no denominator; take shared")
        return self


class TowerOptimConfig(Section):
    """How much of a tower is trained, and how fast its lower layers learn."""

    trained_groups: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="Groups of layers, from the output, that are trained; the others are frozen. "
        "0 freezes the tower (LiT), null trains all. An image tower's groups are timm's.",
    )
    layer_decay: Fraction = Field(
        default=1.0, description="Factor of the learning rate from a group to the one below it."
    )


class OptimConfig(Section):
    """AdamW with linear warm-up and a cosine to zero."""

    lr: float = Field(default=5e-4, gt=0, le=1, description="Peak learning rate.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.98), description="AdamW's decay of the two moments."
    )
    eps: float = Field(default=1e-6, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(
        default=0.2, ge=0, description="Decay of matrices; norms, biases and logit_scale have none."
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Steps of linear warm-up."
    )
    grad_clip_norm: float | None = Field(
        default=1.0, gt=0, description="Largest global gradient norm; null does not clip."
    )
    image: TowerOptimConfig = TowerOptimConfig()
    text: TowerOptimConfig = TowerOptimConfig()


class TrainConfig(Section):
    """How long, in what batches, and how the state is sharded."""

    epochs: Positive = Field(default=30, description="Passes over the train split.")
    global_batch: Annotated[int, Field(ge=2)] = Field(
        description="Image-caption pairs that are contrasted with each other in a step."
    )
    micro_batch: Positive | None = Field(
        default=None,
        description="Pairs in a forward; null takes global_batch / cluster.num_workers. A part of "
        "that is run in several forwards, each of them twice, with the whole batch's gradient.",
    )
    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(
        default=2, description="DeepSpeed ZeRO stage."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto",
        description="Of the forward and backward; the master weights are fp32. auto takes bf16 on "
        "a GPU that computes in it; fp16 scales its loss, and skips a step where it overflows.",
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        default="none",
        description="What is kept in the host's memory: the optimizer's state (ZeRO 1 to 3), or "
        "the parameters too (ZeRO 3).",
    )
    recompute: tuple[Literal["image", "text"], ...] = Field(
        default=(), description="Towers whose activations are computed again in the backward."
    )
    compile: bool = Field(
        default=False, description="Compile the towers with torch.compile (ZeRO 0 to 2)."
    )
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Decay of a moving average of the weights, which is then what is validated and "
        "saved; null keeps none.",
    )
    max_skipped_in_a_row: Annotated[int, Field(ge=0)] = Field(
        default=10,
        description="Steps with a loss that is not finite are skipped; more than so many end the "
        "run.",
    )

    @model_validator(mode="after")
    def _offloads_what_is_sharded(self) -> TrainConfig:
        least = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(
                f"offload is {self.offload}: needs zero_stage {least} or more, not "
                f"{self.zero_stage}"
            )
        return self

    @model_validator(mode="after")
    def _compiles_whole_parameters(self) -> TrainConfig:
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile is true with zero_stage 3: ZeRO-3 gathers parameters between the layers, "
                "which cannot be compiled; take zero_stage 2 or compile=false"
            )
        return self
