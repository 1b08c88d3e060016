"""A model as a graph that runs without its Python code: ONNX, and torch.export's programs."""

import importlib
import io
import json
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from fastlab.console import UserError, first_line
from fastlab.dataset.manifest import ImageSpec
from fastlab.export.facts import Facts, as_metadata
from fastlab.machine import installing
from pipelines.augment import make_augmenter

FACTS = "fastlab.json"
"""The extra file of a torch.export program that holds the facts."""

Call = Callable[[np.ndarray], np.ndarray]
"""Runs a graph: its input in, logits out, fp32 [b, classes]."""


class Input(NamedTuple):
    """What a graph takes."""

    normalise: bool
    """Pixels, uint8 [b, S, S, 3], which the graph normalises; else images, fp32 [b, 3, S, S]."""
    dynamic_batch: bool
    """Any number of images, else one."""

    @property
    def name(self) -> str:
        return "pixels" if self.normalise else "images"

    def example(self, side: int) -> torch.Tensor:
        count = 2 if self.dynamic_batch else 1  # torch.export takes an example of 1 for a constant
        if self.normalise:
            return torch.zeros(count, side, side, 3, dtype=torch.uint8)
        return torch.zeros(count, 3, side, side)

    def text(self, side: int) -> str:
        count = "batch" if self.dynamic_batch else "1"
        if self.normalise:
            return f"pixels: uint8 [{count}, {side}, {side}, 3], RGB"
        return f"images: fp32 [{count}, 3, {side}, {side}], RGB, (level / 255 - mean) / std"


class Normalising(nn.Module):
    """`model` behind the normalisation of the pipelines: takes pixels, uint8 [b, S, S, 3].

    The values come from the pipelines' own table, so that they are equal to the bit.
    """

    table: torch.Tensor
    channels: torch.Tensor

    def __init__(self, model: nn.Module, spec: ImageSpec) -> None:
        super().__init__()
        self.model = model
        mean, std = spec.mean, spec.std
        table = make_augmenter(None, spec.image_size, mean, std, torch.float32).table
        self.register_buffer("table", table.reshape(-1, 1))  # [256 * 3, 1]
        self.register_buffer("channels", torch.arange(3))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        values = F.embedding(3 * pixels.long() + self.channels, self.table)[..., 0]
        return self.model(values.permute(0, 3, 1, 2))


def check_onnx_installed() -> None:
    """Raises `UserError` where a package is missing that writes or runs ONNX."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            raise UserError(
                f"--to onnx: {name} is not installed here; {installing('export')}"
            ) from None


def capture(model: nn.Module, takes: Input, side: int) -> ExportedProgram:
    """The graph of `model`, which lies on the CPU in evaluation mode. Raises `UserError` where it
    has none, as when Python decides by the values of a tensor."""
    batch = ({0: Dim("batch", min=1)},) if takes.dynamic_batch else None
    with _exporting():
        program = torch.export.export(model, (takes.example(side),), dynamic_shapes=batch)
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # paths of this machine's source files
    return program


@contextmanager
def _exporting() -> Generator[None]:
    """Keep the exporters' warnings, which concern their authors, away from the console."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Exception as error:  # anything may stop the exporters in a model that they run
            reason = first_line(error)
            raise UserError(f"export: this model cannot be exported ({reason})") from error


def as_torch(program: ExportedProgram, facts: Facts) -> bytes:
    """The content of a .pt2 file, which `torch.export.load` reads."""
    stream = io.BytesIO()
    torch.export.save(program, stream, extra_files={FACTS: json.dumps(facts)})
    return stream.getvalue()


def as_onnx(program: ExportedProgram, facts: Facts, takes: Input) -> bytes:
    """The content of an .onnx file, weights included. Raises `UserError` where ONNX lacks what the
    model computes."""
    with _exporting():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=[takes.name],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},) if takes.dynamic_batch else None,
        )
        assert exported is not None
        exported.model.metadata_props.update(as_metadata(facts))
        return exported.model_proto.SerializeToString()


def run_torch(content: bytes) -> Call:
    """Runs what `as_torch` wrote."""
    graph = torch.export.load(io.BytesIO(content)).module()
    return lambda values: graph(torch.from_numpy(values)).numpy()


def run_onnx(content: bytes) -> Call:
    """Runs what `as_onnx` wrote by ONNX Runtime on the CPU."""
    import onnxruntime

    with _exporting():  # the runtime may lack what a graph computes
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (name,) = (each.name for each in session.get_inputs())
    return lambda values: session.run(None, {name: values})[0]
