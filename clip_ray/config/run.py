"""All of a run: its sections, and the rules that hold between them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from clip_ray.config.data import DataConfig, StorageConfig
from clip_ray.config.fields import Name, Positive, Section
from clip_ray.config.model import ModelConfig
from clip_ray.config.training import LossConfig, OptimConfig, TrainConfig


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
