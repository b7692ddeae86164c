"""The one typed configuration object: every section, field, bound and cross-field rule."""

from clip_ray.config.data import DataConfig, Layout, StorageConfig
from clip_ray.config.model import ImageTowerConfig, ModelConfig, TextTowerConfig
from clip_ray.config.run import (
    CheckpointConfig,
    ClusterConfig,
    Config,
    EvaluationConfig,
    LoggingConfig,
    StartConfig,
)
from clip_ray.config.training import LossConfig, OptimConfig, TowerOptimConfig, TrainConfig
from clip_ray.config.tuning import Goal, TuneConfig

__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "Goal",
    "ImageTowerConfig",
    "Layout",
    "LoggingConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "StartConfig",
    "StorageConfig",
    "TextTowerConfig",
    "TowerOptimConfig",
    "TrainConfig",
    "TuneConfig",
]
