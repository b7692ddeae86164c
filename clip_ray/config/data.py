"""Where data lives, and how it is sharded, cropped and read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from clip_ray.config.fields import Fraction, Jitter, Name, Positive, Probability, Section, Share

Layout = Literal[
    "auto", "original", "huggingface", "kaggle", "karpathy", "csv", "jsonl", "webdataset"
]


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
