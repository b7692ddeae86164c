"""The one typed configuration object: every section, field, bound and cross-field rule."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Jitter = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]


Layout = Literal[
    "auto", "original", "huggingface", "kaggle", "karpathy", "csv", "jsonl", "webdataset"
]


class Section(BaseModel):
    """A frozen group of fields in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class StorageConfig(Section):
    """Where prepared data, checkpoints, weights and results live."""

    root: str = Field(
        pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^/]+)*$",
        description="The s3://bucket[/prefix] under which everything is kept.",
    )
    embedded_dir: str | None = Field(
        default=None,
        description="Folder of the embedded S3 server's data. The server is started when a command "
        "needs it and AWS_ENDPOINT_URL is not set; null means that S3 is somewhere else.",
    )


class DataConfig(Section):
    """The data set: its raw source and how it is sharded, cropped and read."""

    name: Name = Field(description="Name of the prepared data set under storage.root/data.")
    source: str | None = Field(
        default=None,
        description="Raw data: a folder, .zip, .tar or .tar.gz, local or s3://, with images and "
        "annotations in it; archives within a folder are opened too.",
    )
    layout: Layout = Field(
        default="auto", description="How the annotations are laid out; auto looks what is there."
    )
    val_share: Share = Field(
        default=0.03, description="Share of val where neither layout nor Karpathy's JSON splits."
    )
    test_share: Share = Field(default=0.03, description="The same for test.")
    split_seed: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Seed of that split: a pure function of it and the file's name."
    )
    shorter_side: Positive | None = Field(
        default=256,
        description="Larger train images are shrunk to this shorter side; null keeps them. Val and "
        "test images keep their bytes.",
    )
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = Field(
        default=95, description="Of train images that are encoded again."
    )
    max_pixels: Positive = Field(
        default=2**26, description="Images with more pixels are quarantined, not decoded."
    )
    max_quarantined_share: Share = Field(
        default=0.01, description="Above this share of unusable records prepare fails."
    )
    zero_shot_source: str | None = Field(
        default=None,
        description="Folder with one folder of images per class, for zero-shot classification.",
    )
    shard_size_mib: float = Field(default=64, gt=0, description="Target size of a Parquet shard.")
    row_group_rows: Positive = Field(default=16, description="Rows read together.")
    crop_scale: tuple[Fraction, Fraction] = Field(
        default=(0.9, 1.0), description="Share of the image's area that a training crop covers."
    )
    crop_ratio: tuple[float, float] = Field(
        default=(0.75, 4 / 3), description="Range of a training crop's width / height."
    )
    flip_prob: Probability = Field(
        default=0, description="Of mirroring a training image; captions say left and right."
    )
    color_jitter: tuple[Jitter, Jitter, Jitter, Annotated[float, Field(ge=0, le=0.5)]] = Field(
        default=(0.32, 0.32, 0.32, 0.08),
        description="Strength of the changes of brightness, contrast, saturation and hue.",
    )
    color_jitter_prob: Probability = Field(default=0, description="Of that change of colours.")
    grey_prob: Probability = Field(default=0, description="Of making a training image grey.")
    shuffle_window_rows: Positive = Field(
        default=2048,
        description="Samples shuffled among each other; row groups are shuffled among all.",
    )
    cache_dir: str | None = Field(
        default=None,
        description="Folder on each node for row groups that were read; null: one in its temporary "
        "folder.",
    )
    cache_mib: float = Field(
        default=4096, gt=0, description="Size of that cache; two shuffle windows is the least."
    )

    captions_per_image: Positive = Field(
        default=1, description="Captions drawn for an image and step; more are all its positives."
    )

    @model_validator(mode="after")
    def _ranges_ascend(self) -> DataConfig:
        for field in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, field)
            if not 0 < low <= high:
                raise ValueError(f"{field} is [{low}, {high}]: needs 0 < low <= high")
        return self


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
    tile: Annotated[int, Field(ge=1)] = Field(
        default=512, description="Rows and columns of logits that tiled and ring hold at a time."
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


class CheckpointConfig(Section):
    """What is kept. A checkpoint is written at the end of an epoch."""

    every_epochs: Positive = Field(default=1, description="Epochs from one checkpoint to the next.")
    keep_last: Positive = Field(default=1, description="Newest checkpoints that are kept.")


class ClusterConfig(Section):
    """The Ray cluster and the workers' share of it."""

    address: str | None = Field(
        default=None, description="Ray address; null takes RAY_ADDRESS, or starts a local Ray."
    )
    num_workers: Positive = Field(default=1, description="Training processes (world size).")
    cpus_per_worker: float = Field(default=1, gt=0, description="CPUs that a worker reserves.")
    readers_per_worker: Positive = Field(
        default=2,
        description="Processes that read and decode for a worker, anywhere in the cluster.",
    )
    gpus_per_worker: float = Field(default=0, ge=0, description="GPUs that a worker reserves.")
    max_failures: int = Field(
        default=0, ge=-1, description="Restarts after a worker dies; -1 is without end."
    )


class EvaluationConfig(Section):
    """Retrieval and zero-shot classification."""

    split: Literal["val", "test"] = Field(default="test", description="Split that is evaluated.")
    batch: Positive = Field(default=256, description="Images or captions encoded at a time.")
    recall_at: tuple[Positive, ...] = Field(default=(1, 5, 10), description="The k of R@k.")
    templates: tuple[str, ...] = Field(
        default=("a photo of a {}.",), description="Zero-shot prompts; {} is the class name."
    )

    @model_validator(mode="after")
    def _templates_name_the_class(self) -> EvaluationConfig:
        for template in self.templates:
            if "{}" not in template:
                raise ValueError(f"templates holds {template!r}: each needs {{}} for the class")
        return self


class LoggingConfig(Section):
    """What is written while training runs."""

    every_steps: Positive = Field(default=10, description="Steps from one logged step to the next.")
    progress_interval_s: float = Field(
        default=15, gt=0, description="Seconds between progress lines where there is no terminal."
    )
    tensorboard: bool = Field(
        default=True, description="Write TensorBoard's events to the run's folder too."
    )
    mlflow_uri: str | None = Field(
        default=None, description="MLflow tracking server (http://…, file:…) to log to as well."
    )
    wandb_project: str | None = Field(
        default=None, description="Weights & Biases project to log to as well."
    )


class Config(Section):
    """All of a run."""

    name: Name = Field(description="Run name: the same name and storage resume the same run.")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(default=0, description="Seeds everything.")
    storage: StorageConfig
    data: DataConfig
    model: ModelConfig
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    cluster: ClusterConfig = ClusterConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def local_batch(self) -> int:
        """Images per worker and step."""
        return self.train.global_batch // self.cluster.num_workers

    @property
    def micro_batch(self) -> int:
        """Images in a forward."""
        return self.train.micro_batch or self.local_batch

    @property
    def run_root(self) -> str:
        """The s3:// folder of this run."""
        return f"{self.storage.root}/runs/{self.name}"

    @property
    def data_root(self) -> str:
        """The s3:// folder of the prepared data set."""
        return f"{self.storage.root}/data/{self.data.name}"

    @model_validator(mode="after")
    def _workers_divide_the_batch(self) -> Config:
        global_batch, workers = self.train.global_batch, self.cluster.num_workers
        if global_batch % workers:
            lower = global_batch - global_batch % workers
            fix = f"{lower} or {lower + workers}" if lower else str(workers)
            raise ValueError(
                f"train.global_batch is {global_batch}: cluster.num_workers ({workers}) must "
                f"divide it; take {fix}"
            )
        if self.local_batch % self.micro_batch:
            raise ValueError(
                f"train.micro_batch is {self.micro_batch}: must divide train.global_batch / "
                f"cluster.num_workers = {self.local_batch}; change one of the three"
            )
        return self
