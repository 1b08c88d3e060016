"""The pipelines that most tests compare: float32 on the CPU, two workers, seed 3."""

from pathlib import Path

import torch

from fastlab.config import AugmentConfig, DataConfig
from fastlab.dataset.manifest import read_manifest
from pipelines import make_pipeline
from pipelines.base import Pipeline, PipelineSpec, Shard


def spec(
    dataset: Path,
    engine: str,
    split: str = "train",
    batch: int = 16,
    rank: int = 0,
    world: int = 1,
    augment: AugmentConfig | None = None,
) -> PipelineSpec:
    return PipelineSpec(
        DataConfig(path=str(dataset), pipeline=engine, workers=2),
        augment,
        read_manifest(dataset),
        split,
        batch_size=batch,
        device=torch.device("cpu"),
        dtype=torch.float32,
        shard=Shard(rank, world),
        seed=3,
        train=split == "train",
    )


def pipeline(*arguments, **options) -> Pipeline:
    """The pipeline of a `spec`."""
    return make_pipeline(spec(*arguments, **options))
