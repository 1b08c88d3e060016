"""How images reach the device: one contract, one augmentation, one file for each engine."""

import importlib

from fastlab.console import UserError
from fastlab.dataset.manifest import read_manifest
from fastlab.dataset.remote import is_remote
from fastlab.processes import report_bus_errors
from pipelines.base import Pipeline, PipelineSpec
from pipelines.engine import EnginePipeline
from pipelines.resident import ResidentPipeline

FORMATS = {
    "resident": "array",
    "ffcv": "ffcv",
    "dali": "tar",
    "torchvision": "tar",
    "stream": "tar",
}
"""Each value of `data.pipeline` and the format of a dataset that it reads. All but "resident" are
engines, each the `open_engine` of a module of its name."""


def make_pipeline(spec: PipelineSpec) -> Pipeline:
    """The pipeline that `spec.data.pipeline` names.

    Raises `UserError` where the dataset lacks the split or the format, the split has no full
    training batch, its batches cannot be mixed in pairs, the engine is not installed, or another
    dataset than that of `spec.manifest` has taken its place. What a pipeline has opened stays that
    dataset's, whatever replaces it later.
    """
    report_bus_errors(
        "fastlab: a data file became shorter while it was read, or its disk failed (bus error); "
        "check it with: fastlab inspect DATASET --verify"
    )
    if is_remote(spec.data.path) and spec.data.pipeline != "stream":
        raise UserError(
            f'data.path = "{spec.data.path}": only data.pipeline = "stream" reads from a URL'
        )
    if spec.data.pipeline == "resident":
        pipeline = ResidentPipeline(spec)
    else:
        # Imported only now: an engine needs packages that may be missing.
        engine = importlib.import_module(f"pipelines.{spec.data.pipeline}")
        pipeline = EnginePipeline(spec, engine.open_engine)
    _refuse_replaced(spec)  # after its files were opened
    return pipeline


def _refuse_replaced(spec: PipelineSpec) -> None:
    form, before = FORMATS[spec.data.pipeline], spec.manifest
    now = read_manifest(spec.data.path)
    # Another format may have been added, which changes no file of this one.
    if (now.classes, now.formats.get(form)) != (before.classes, before.formats[form]):
        raise UserError(f"{spec.data.path}: was replaced by another dataset while it was in use")
