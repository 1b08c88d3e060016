"""How images reach the device: one contract, one augmentation, one file for each engine."""

import importlib

from fastlab.processes import report_bus_errors
from pipelines.base import Pipeline, PipelineSpec
from pipelines.engine import EnginePipeline
from pipelines.resident import ResidentPipeline

FORMATS = {"resident": "array", "ffcv": "ffcv", "dali": "tar", "torchvision": "tar"}
"""Each value of `data.pipeline` and the format of a dataset that it reads. All but "resident" are
engines, each the `open_engine` of a module of its name."""


def make_pipeline(spec: PipelineSpec) -> Pipeline:
    """The pipeline that `spec.data.pipeline` names.

    Raises `UserError` where the dataset lacks the split or the format, the split has no full
    training batch, or the engine is not installed.
    """
    report_bus_errors(
        "fastlab: a data file became shorter while it was read, or its disk failed (bus error); "
        "check it with: fastlab inspect DATASET --verify"
    )
    if spec.data.pipeline == "resident":
        return ResidentPipeline(spec)
    # Imported only now: an engine needs packages that may be missing.
    engine = importlib.import_module(f"pipelines.{spec.data.pipeline}")
    return EnginePipeline(spec, engine.open_engine)
