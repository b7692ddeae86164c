"""How a sweep searches: what for, by which search, what is stopped early, and what it may cost."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from clip_ray.config.fields import Positive, Section

Goal = Literal["max", "min"]


class TuneConfig(Section):
    """A sweep over the fields of a space file, which may lay its own `tune` over this."""

    objectives: dict[str, Goal] = Field(
        default={"image_retrieval_recall@1": "max"},
        min_length=1,
        description="Figures of an epoch's report, and which way each is better; trials are "
        "stopped early, and ranked, by the first: recalls on val, loss, images_per_s, "
        "worker_hours.",
    )
    search: Literal["optuna", "random", "grid"] = Field(
        default="optuna", description="How points are chosen; optuna is TPE."
    )
    scheduler: Literal["asha", "median", "pbt", "none"] = Field(
        default="asha", description="Which trials are stopped early, or (pbt) go on from others."
    )
    max_trials: Positive = Field(default=8, description="Points that are tried.")
    repeats: Positive = Field(default=1, description="Seeds for each point, from `seed` on.")
    concurrent: Positive | None = Field(
        default=None,
        description="Trials at a time, for which a cluster grows; null is what fits the nodes "
        "that are there at the start.",
    )
    grace_epochs: Positive = Field(
        default=1, description="Epochs before asha and median may stop a trial."
    )
    reduction_factor: Annotated[float, Field(gt=1)] = Field(
        default=2.0, description="asha lets one trial in so many go on at each rung."
    )
    perturb_epochs: Positive = Field(
        default=1, description="Epochs from one exploit of pbt to the next."
    )
    quantile: Annotated[float, Field(gt=0, le=0.5)] = Field(
        default=0.25, description="Share of the trials that pbt ends, and that it takes for them."
    )
    max_hours: float | None = Field(default=None, gt=0, description="Of the sweep, by the clock.")
    max_gpu_hours: float | None = Field(
        default=None, gt=0, description="Of all trials together, while they hold their GPUs."
    )

    @model_validator(mode="after")
    def _fits_its_scheduler(self) -> TuneConfig:
        if self.scheduler == "pbt" and self.repeats > 1:
            raise ValueError(
                f"repeats is {self.repeats}: scheduler pbt changes a trial's values on the way, "
                "so that no two are of one point; set it to 1"
            )
        if self.scheduler == "pbt" and self.search == "optuna":
            raise ValueError("search is optuna: scheduler pbt searches itself; take random or grid")
        if self.scheduler != "none" and len(self.objectives) > 1:
            raise ValueError(
                f"objectives are {', '.join(self.objectives)}: scheduler {self.scheduler} would "
                "stop trials by the first alone; take scheduler none"
            )
        return self
