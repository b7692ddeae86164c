"""All of a run: its sections, and the rules that hold between them."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from clip_ray.config.data import DataConfig, StorageConfig
from clip_ray.config.fields import Name, Positive, Section
from clip_ray.config.model import ModelConfig
from clip_ray.config.training import LossConfig, OptimConfig, TrainConfig
from clip_ray.config.tuning import TuneConfig


class StartConfig(Section):
    """What a new run begins with. A run that has checkpoints goes on from them."""

    weights: str | None = Field(
        default=None,
        description="Weights folder, local or s3://…, of a run to fine-tune; its tokenizer is "
        "taken too. `clip-ray train --from` sets it.",
    )
    fork: str | None = Field(
        default=None,
        pattern=r"^[^@]+(@\d+)?$",
        description="NAME or s3://…/runs/NAME, and @STEP, of a run whose whole state is taken; "
        "without a step its newest. `clip-ray train --fork` sets it.",
    )

    @model_validator(mode="after")
    def _begins_with_one(self) -> StartConfig:
        if self.weights is not None and self.fork is not None:
            raise ValueError("weights and fork are both set: a run begins with one of them")
        return self


class CheckpointConfig(Section):
    """When a checkpoint is taken, and which are kept. A signal and the last step take one too."""

    every_epochs: Positive | None = Field(
        default=1, description="Epochs from one checkpoint to the next."
    )
    every_steps: Positive | None = Field(
        default=None, description="Steps from one checkpoint to the next."
    )
    every_minutes: float | None = Field(
        default=15, gt=0, description="Longest time from one checkpoint to the next."
    )
    keep_last: Positive = Field(default=2, description="Newest checkpoints that are kept.")
    keep_best: Annotated[int, Field(ge=0)] = Field(
        default=1, description="Checkpoints with the best val R@1 that are kept."
    )
    keep_every: Positive | None = Field(
        default=None, description="Checkpoints of each so many steps are kept for ever."
    )


class ClusterConfig(Section):
    """The Ray cluster and the workers' share of it."""

    address: str | None = Field(
        default=None, description="Ray address; null takes RAY_ADDRESS, or starts a local Ray."
    )
    num_workers: Positive = Field(default=1, description="Training processes (world size).")
    min_workers: Positive | None = Field(
        default=None,
        description="Fewest training processes that a run goes on with where nodes are lost; it "
        "grows again with the cluster. null needs num_workers always.",
    )
    cpus_per_worker: float = Field(default=1, gt=0, description="CPUs that a worker reserves.")
    readers_per_worker: Positive = Field(
        default=2,
        description="Processes that read and decode for a worker, anywhere in the cluster.",
    )
    gpus_per_worker: float = Field(default=0, ge=0, description="GPUs that a worker reserves.")
    placement: Literal["pack", "spread"] = Field(
        default="pack",
        description="Workers on as few nodes as hold them, or on as many as there are. Ranks go "
        "node by node either way.",
    )
    reader_labels: dict[str, str] = Field(
        default={},
        description="Labels of the nodes that readers run on, e.g. {role: reader} for nodes "
        "without GPUs; none is any node.",
    )
    max_failures: int = Field(
        default=3, ge=-1, description="Restarts after a worker dies; -1 is without end."
    )
    start_timeout_s: float = Field(
        default=600,
        gt=0,
        description="A run whose workers find no nodes for so long ends; an autoscaler takes "
        "minutes to start one with GPUs.",
    )
    hang_timeout_s: float = Field(
        default=300,
        gt=0,
        description="A worker that is silent so long is replaced; one that lets the others wait "
        "twice as long, too.",
    )
    insecure: bool = Field(
        default=False,
        description="Use a cluster that lets in everybody who reaches it, too. `clip-ray submit "
        "--insecure` sets it.",
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
    start: StartConfig = StartConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    cluster: ClusterConfig = ClusterConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    tune: TuneConfig = TuneConfig()

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

    def at_world_size(self, world_size: int) -> Config:
        """The config of an elastic run while it has so many workers.

        Where its local batch is no multiple of the micro batch, that is the next smaller divisor.
        """
        if world_size == self.cluster.num_workers:
            return self
        local_batch = self.train.global_batch // world_size
        micro_batch = next(m for m in range(self.micro_batch, 0, -1) if local_batch % m == 0)
        cluster = self.cluster.model_copy(update={"num_workers": world_size, "min_workers": None})
        train = self.train.model_copy(update={"micro_batch": micro_batch})
        return self.model_copy(update={"cluster": cluster, "train": train})

    @model_validator(mode="after")
    def _workers_divide_the_batch(self) -> Config:
        global_batch, most = self.train.global_batch, self.cluster.num_workers
        fewest = self.cluster.min_workers or most
        if fewest > most:
            raise ValueError(
                f"cluster.min_workers is {fewest}: must be at most cluster.num_workers ({most})"
            )
        common = math.lcm(*range(fewest, most + 1))
        if global_batch % common:
            lower = global_batch - global_batch % common
            fix = f"{lower} or {lower + common}" if lower else str(common)
            workers = f"({most})" if fewest == most else f"and all from {fewest} to {most}"
            raise ValueError(
                f"train.global_batch is {global_batch}: cluster.num_workers {workers} must "
                f"divide it; take {fix}"
            )
        if self.local_batch % self.micro_batch:
            raise ValueError(
                f"train.micro_batch is {self.micro_batch}: must divide train.global_batch / "
                f"cluster.num_workers = {self.local_batch}; change one of the three"
            )
        return self
