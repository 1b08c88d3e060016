"""How images reach the device: one file an engine, one contract, one augmentation module."""

from typing import Any

from fastlab.config import DataConfig
from pipelines.base import Pipeline
from pipelines.resident import ResidentPipeline

PIPELINES = {"resident": ResidentPipeline}


def make_pipeline(config: DataConfig, *args: Any, **kwargs: Any) -> Pipeline:
    """The pipeline that `config` names; the arguments are those of every pipeline's constructor."""
    return PIPELINES[config.pipeline](config, *args, **kwargs)
