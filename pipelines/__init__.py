"""How images reach the device: one file an engine, one contract, one augmentation module."""

import importlib
from typing import Any

from fastlab.config import DataConfig
from pipelines.base import Pipeline
from pipelines.engine import EnginePipeline
from pipelines.resident import ResidentPipeline

# Modules with an `open_engine`, imported when asked for: each needs packages that may be missing.
ENGINES = {
    "dali": "pipelines.dali",
    "ffcv": "pipelines.ffcv",
    "torchvision": "pipelines.torchvision",
}


FORMATS = {"resident": "array", "ffcv": "ffcv", "dali": "tar", "torchvision": "tar"}
"""The format of a dataset that each engine reads."""


def make_pipeline(config: DataConfig, *args: Any, **kwargs: Any) -> Pipeline:
    """The pipeline that `config` names; the arguments are those of every pipeline's constructor."""
    if config.pipeline == "resident":
        return ResidentPipeline(config, *args, **kwargs)
    engine = importlib.import_module(ENGINES[config.pipeline])
    return EnginePipeline(engine.open_engine, config, *args, **kwargs)
