"""Kernels and bytes of a training step's forward and backward, counted without a GPU.

    python -m benchmarks.kernel_counts --config configs/resnet11.toml --batch 128 --out FILE.json

The model is compiled for a faked H100 as the trainer compiles it: training, bf16 autocast,
channels-last (`benchmarks.faked_gpu`). Bytes are the sizes of the arguments of every generated
kernel and of the project's custom kernels, each once for being read and once for being written.
Calls of libraries (convolutions, matrix products, seeds of dropout) are counted, but not their
kernels and bytes; nor are the loss, the optimizer and the input path.
"""

import argparse
import itertools
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import faked_gpu, savings
from benchmarks.faked_gpu import CountError, Generated
from benchmarks.measurements import Record, Session, command_line, new_session, public_config, save
from fastlab import config as configs
from fastlab import models
from fastlab.config import Config
from fastlab.console import positive_int, run_command
from fastlab.models import norm_pool, norm_relu
from fastlab.models.dropout import DropoutKeys

_SIDE, _CLASSES = 64, 200  # of Tiny ImageNet
_OWN = "fastlab::"  # prefix of the names of the project's operators
_SMALL = 1_000_000  # bytes: a kernel that moves fewer takes about as long as its launch


class Traffic(NamedTuple):
    """What a call of one of the project's operators launches."""

    kernels: int
    bytes: int
    """Bytes of all these kernels together."""


def _pool(direction: int, x: Any, bias: Any, size: int, **_: Any) -> Traffic:
    figures = norm_pool.traffic(x.shape, x.element_size(), size, size - 2, bias is not None)
    return Traffic(kernels=figures[2 + direction], bytes=figures[direction])


def _relu(direction: int, x: Any, x2: Any, residual: Any, **_: Any) -> Traffic:
    added = {"other": x2 is not None, "residual": residual is not None}
    figures = norm_relu.traffic(x.shape, x.element_size(), **added)
    return Traffic(kernels=figures[2 + direction], bytes=figures[direction])


_FORWARD, _BACKWARD = 0, 1
OPERATORS: dict[str, Callable[..., Traffic]] = {
    "fastlab::norm_pool": partial(_pool, _FORWARD),
    "fastlab::norm_pool_backward": partial(_pool, _BACKWARD),
    "fastlab::norm_relu": partial(_relu, _FORWARD),
    "fastlab::norm_relu_backward": partial(_relu, _BACKWARD),
}
"""The traffic of each of the project's operators, such as "fastlab::norm_pool". The function takes
what the operator takes, by name; the tensors have shapes and types, and no data."""


class Kernel(NamedTuple):
    """One launch of a generated kernel, or all that a call of a project's operator launches."""

    name: str
    kernels: int
    bytes: int


class Pass(NamedTuple):
    """A forward or a backward pass."""

    kernels: list[Kernel]
    library: Counter[str]
    """Number of calls of each operator that is not the project's."""


def main(argv: list[str] | None = None) -> int:
    parser = command_line(__doc__, overrides=True)
    parser.add_argument("--config", type=Path, nargs="+", required=True, help="models to count")
    parser.add_argument("--batch", type=positive_int, default=128, help="images a step")
    parser.add_argument(
        "--savings", action="store_true", help="also with each saving of the step undone"
    )
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    changes = [None, *savings.CHANGES] if args.savings else [None]
    cases = itertools.product(args.config, changes)
    records = [_count(path, change, args) for path, change in cases]
    session = new_session("kernel_counts", records)
    print(table(session))
    if args.out:
        save(session, args.out)


def _count(path: Path, change: str | None, args: argparse.Namespace) -> Record:
    """`change` is a key of `savings.CHANGES`, or None."""
    cfg = configs.load(path, args.overrides)
    name = f"{path.stem}, {change}" if change else path.stem
    with faked_gpu.faked_gpu(), savings.changed(change):
        forward, backward = (
            _details(count_pass(graph)) for graph in generated_step(cfg, args.batch)
        )
    details = {"batch": args.batch, "forward": forward, "backward": backward}
    moved = (forward["bytes"] + backward["bytes"]) / args.batch
    # The figure is exact, so there is one round.
    return Record(name, "bytes/image", [moved], {**details, "config": public_config(cfg)})


def generated_step(cfg: Config, batch: int) -> list[Generated]:
    """The generated code of the model's forward and backward. Call it within `faked_gpu`."""
    model = models.build(cfg.model, _CLASSES).train()
    models.set_memory_format(model, cfg.train.channels_last)
    DropoutKeys(model, cfg.train.seed, rank=0, device=torch.device("cpu"))
    images = torch.empty(batch, 3, _SIDE, _SIDE, dtype=torch.bfloat16)
    images = images.to(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16):
        return faked_gpu.generate(model, images)


def count_pass(graph: Generated) -> Pass:
    """Call it within `faked_gpu`. Raises `CountError` where a kernel's bytes are not known."""
    launches, calls = faked_gpu.run(graph)
    counted = Pass([Kernel(name, 1, moved) for name, moved in launches], Counter())
    for operator, arguments in calls:
        if not operator.startswith(_OWN):
            counted.library[operator] += 1
        elif operator in OPERATORS:
            counted.kernels.append(Kernel(operator, *OPERATORS[operator](**arguments)))
        else:
            raise CountError(f"{operator}: its traffic is not in OPERATORS")
    return counted


def _details(counted: Pass) -> dict[str, Any]:
    kernels = counted.kernels
    custom = sum(k.kernels for k in kernels if k.name.startswith(_OWN))
    return {
        "generated": sum(k.kernels for k in kernels) - custom,
        "custom": custom,
        "library": dict(counted.library),
        "small": sum(k.kernels for k in kernels if k.bytes / k.kernels < _SMALL),
        "bytes": sum(k.bytes for k in kernels),
    }


def table(*sessions: Session) -> str:
    """In Markdown: a row for each model of the first session, its figures in each session in
    turn."""
    lines = [
        "| model | batch | generated kernels, forward + backward | custom kernels | library calls "
        "| kernels under 1 MB | MB an image |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in sessions[0].records:
        figures = zip(*(_figures(session[record.case]) for session in sessions), strict=True)
        cells = (" → ".join(cell) for cell in figures)
        lines.append(f"| {record.case} | {record.details['batch']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _figures(record: Record) -> tuple[str, ...]:
    passes = record.details["forward"], record.details["backward"]
    forward, backward = (details["generated"] for details in passes)
    custom, small = (sum(details[name] for details in passes) for name in ("custom", "small"))
    library = sum(sum(details["library"].values()) for details in passes)
    generated = f"{forward} + {backward} = {forward + backward}"
    return generated, str(custom), str(library), str(small), f"{record.median / 1e6:.1f}"


if __name__ == "__main__":
    raise SystemExit(main())
