"""`fastlab export`: a trained run as a file that programs without fastlab load.

`graphs` turns the model into ONNX or a torch.export program, `check` compares that with the model
image by image. `card` and `push` make the same model a repository of the Hugging Face Hub.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastlab.console import UserError, printable
from fastlab.export import graphs
from fastlab.export.check import Agreement, Batches, compare
from fastlab.export.facts import Facts, facts_of, weights_file
from fastlab.export.graphs import Input
from fastlab.files import write_atomically
from fastlab.predict import Predictor, evaluate_run, open_run
from fastlab.runs import RunDir
from fastlab.training.review import batches

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}
"""What a run can be exported to, and how the name of its file ends."""
_GENERATED = 64  # images of noise, where the dataset is not at hand


class Exported(NamedTuple):
    """The file that `export` wrote."""

    path: Path
    takes: str
    """The input of the graph, or of the model that takes the weights."""
    agreement: Agreement | None
    """How the graph compares with the model; None for weights alone."""
    evaluated: str
    """What `fastlab evaluate` counts on the same images; empty where these are generated."""

    def __str__(self) -> str:
        """What the command prints."""
        size = self.path.stat().st_size / 1e6
        lines = [f"{printable(str(self.path))}: {size:.2f} MB, takes {self.takes}"]
        if (found := self.agreement) and self.evaluated:
            counts = f"{found.correct} by the file, {found.expected} by the model in fp32"
            lines += [f"{found.images} validation images, top-1: {counts}, {self.evaluated}"]
        elif found:
            lines += [f"compared on {found.images} generated images: the dataset is not at hand"]
        if found:
            lines += [
                f"images with another best class: {found.others}; largest difference of logits: "
                f"{found.difference:.1e} (largest logit: {found.largest:.3g})"
            ]
        return "\n".join(lines)


def export(
    run: Path | str,
    to: str,
    out: Path | str | None = None,
    *,
    which: str = "best",
    dynamic_batch: bool = False,
    normalise: bool = False,
    data: Path | str | None = None,
    force: bool = False,
) -> Exported:
    """Write the model of a run in fp32 as `to` ("onnx", "torch" or "safetensors") to `out`, by
    default a file in the working directory that has the name of the run.

    A graph takes one normalised image, fp32 [1, 3, S, S], or with `normalise` its pixels, uint8
    [1, S, S, 3], and returns logits, fp32 [1, classes]; with `dynamic_batch` it takes any number of
    images. It is compared with the model on the validation images of the dataset at `data` or at
    `data.path` of the run, and on generated images where neither exists.

    Raises `UserError` where `out` exists and is not to be replaced by `force`, where the run cannot
    be read or its model not be exported, and where the graph computes other logits.
    """
    source, takes = RunDir(run), Input(normalise, dynamic_batch)
    out = _target(source, to, out, takes, force)
    predictor = Predictor(source, which, data)
    facts = facts_of(predictor, which, takes.text(predictor.spec.image_size))
    agreement, evaluated = None, ""
    if to == "safetensors":
        content = weights_file(predictor.model, facts)
    else:
        content, call = _graph(predictor, facts, to, takes)
        images = _images(source, predictor, data)
        agreement = compare(call, takes, predictor.model, predictor.spec, images)
        if agreement.correct is not None:
            evaluated = _evaluated(source, which, data)
    _write(out, content)
    return Exported(out, facts["input"], agreement, evaluated)


def _target(run: RunDir, to: str, out: Path | str | None, takes: Input, force: bool) -> Path:
    """Where to write. Raises `UserError` where this cannot be done, before anything takes time."""
    if to not in SUFFIXES:
        raise UserError(f"{to}: expected one of {', '.join(SUFFIXES)}")
    if to == "safetensors" and any(takes):
        raise UserError(
            "--to safetensors: holds weights alone; --normalise and --dynamic-batch are for graphs"
        )
    if to == "onnx":
        graphs.check_onnx_installed()
    out = Path(out or run.path.resolve().name + SUFFIXES[to])
    if out.is_dir() or (os.path.lexists(out) and not force):
        raise UserError(f"{out}: exists; choose another --out, or replace a file with --force")
    return out


def _write(out: Path, content: bytes) -> None:
    try:
        write_atomically(out, content)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None


def _graph(predictor: Predictor, facts: Facts, to: str, takes: Input) -> tuple[bytes, graphs.Call]:
    """The content of the file, and what runs it."""
    model = predictor.model.cpu().float().requires_grad_(False)
    net = graphs.Normalising(model, predictor.spec).eval() if takes.normalise else model
    program = graphs.capture(net, takes, predictor.spec.image_size)
    if to == "onnx":
        content = graphs.as_onnx(program, facts, takes)
        return content, graphs.run_onnx(content)
    content = graphs.as_torch(program, facts)
    return content, graphs.run_torch(content)


def _images(run: RunDir, predictor: Predictor, data: Path | str | None) -> Batches:
    """The validation images, or generated ones without labels where the dataset is not at hand."""
    path = predictor.cfg.data.path
    if data is not None or "://" in path or os.path.exists(path):
        return batches(*open_run(run, data), torch.device("cpu"))
    side = predictor.spec.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (_GENERATED, side, side, 3), np.uint8)
    return [(predictor.normalise(pixels).cpu(), None)]


def _evaluated(run: RunDir, which: str, data: Path | str | None) -> str:
    """The count of `fastlab evaluate` without flips, in the precision of the training."""
    correct = evaluate_run(run.path, "val", which, data, "none").correct
    precision = run.load_config().train.precision
    return f"{correct} by fastlab evaluate in {precision}"
