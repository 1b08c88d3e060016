"""Kernels and bytes of a training step's forward and backward, counted without a GPU.

    python -m benchmarks.kernel_counts --config configs/resnet11.toml --batch 128 --out FILE.json
    python -m benchmarks.kernel_counts --table BEFORE.json AFTER.json

The model is compiled for a faked H100 as the trainer compiles it: training, bf16 autocast,
channels-last (`benchmarks.faked_gpu`). Bytes are those of the arguments of every generated kernel
and of the project's own, each once for being read and once for being written. Calls of libraries
(convolutions, matrix products, seeds of dropout) are counted, their kernels and bytes are not; nor
are the loss, the optimizer and the input path.
"""

import argparse
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import faked_gpu, savings
from benchmarks.faked_gpu import Call, CountError, Generated
from benchmarks.measurements import (
    Record,
    Session,
    public_config,
    read_record,
    save,
    session,
)
from fastlab import config as configs
from fastlab import models
from fastlab.config import Config
from fastlab.console import positive_int, run_command
from fastlab.models import norm_pool, norm_relu
from fastlab.models.dropout import DropoutKeys

_SIDE, _CLASSES = 64, 200  # of Tiny ImageNet
_SMALL = 1_000_000  # bytes: a kernel that moves fewer takes about as long as its launch


class Traffic(NamedTuple):
    """What a call of one of the project's operators launches."""

    kernels: int
    bytes: int  # of all of them


def _pool_forward(x, bias, weight, shift, key, p, eps, size) -> Traffic:
    moved, _, kernels, _ = norm_pool.traffic(
        x.shape, x.element_size(), size, size - 2, bias is not None
    )
    return Traffic(kernels, moved)


def _pool_backward(gy, x, bias, weight, key, mean, var, codes, peaks, p, eps, size) -> Traffic:
    _, moved, _, kernels = norm_pool.traffic(
        x.shape, x.element_size(), size, size - 2, bias is not None
    )
    return Traffic(kernels, moved)


def _relu_forward(
    x, bias, weight, shift, key, p, eps, drop_after, x2, weight2, shift2, residual
) -> Traffic:
    moved, _, kernels, _ = _relu_traffic(x, x2, residual)
    return Traffic(kernels, moved)


def _relu_backward(
    gy, x, bias, weight, shift, key, x2, weight2, shift2, residual, *others
) -> Traffic:
    _, moved, _, kernels = _relu_traffic(x, x2, residual)
    return Traffic(kernels, moved)


def _relu_traffic(x, x2, residual) -> tuple[int, int, int, int]:
    other, residual = x2 is not None, residual is not None
    return norm_relu.traffic(x.shape, x.element_size(), other=other, residual=residual)


OPERATORS: dict[str, Callable[..., Traffic]] = {
    "fastlab::norm_pool": _pool_forward,
    "fastlab::norm_pool_backward": _pool_backward,
    "fastlab::norm_relu": _relu_forward,
    "fastlab::norm_relu_backward": _relu_backward,
}
"""The project's operator, such as "fastlab::norm_pool" -> its traffic. The function takes what the
operator takes; the tensors have shapes and types, and no data."""


class Kernel(NamedTuple):
    """One launch, or what one call of a project's operator launches."""

    name: str
    kernels: int
    bytes: int
    generated: bool


class Pass(NamedTuple):
    """A forward or a backward pass."""

    kernels: list[Kernel]
    library: Counter[str]
    """Calls of each operator that is not the project's."""

    def launches(self, generated: bool) -> int:
        return sum(k.kernels for k in self.kernels if k.generated == generated)

    def bytes(self) -> int:
        return sum(k.bytes for k in self.kernels)

    def small(self) -> int:
        return sum(k.kernels for k in self.kernels if k.bytes / k.kernels < _SMALL)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, nargs="+", help="the models to count")
    what.add_argument("--table", type=Path, nargs="+", help="print the table of these records")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--batch", type=positive_int, default=128, help="images a step")
    parser.add_argument(
        "--savings", action="store_true", help="also with each saving of the step undone"
    )
    parser.add_argument("--largest", type=positive_int, default=0, help="name so many kernels")
    parser.add_argument("--write", type=Path, help="write the generated code to this directory")
    parser.add_argument("--out", type=Path, help="write the records to this JSON file")
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    if args.table:
        print(table(*(read_record(path, "--table") for path in args.table)))
        return
    changes = [None, *savings.CHANGES] if args.savings else [None]
    cases = itertools.product(args.config, changes)
    made = session("kernel_counts", [_count(path, change, args) for path, change in cases])
    print(table(made))
    if args.out:
        save(made, args.out)


def _count(path: Path, change: str | None, args: argparse.Namespace) -> Record:
    """change: one of `savings.CHANGES`."""
    cfg = configs.load(path, args.overrides)
    name = f"{path.stem}, {change}" if change else path.stem
    with faked_gpu.faked_gpu(), savings.changed(change):
        graphs = generated_step(cfg, args.batch)
        if args.write:
            _write(graphs, args.write, name)
        passes = [count_pass(graph) for graph in graphs]
    for kernel in largest(passes, args.largest):
        print(f"{name}: {kernel.bytes / 1e6:6.0f} MB  {kernel.name}")
    return _record(name, cfg, args.batch, passes)


def generated_step(cfg: Config, batch: int) -> list[Generated]:
    """The generated code of the model's forward and backward. To be called on a faked GPU."""
    model = models.build(cfg.model, _CLASSES).train()
    models.set_memory_format(model, cfg.train.channels_last)
    DropoutKeys(model, cfg.train.seed, rank=0, device=torch.device("cpu"))
    images = torch.empty(batch, 3, _SIDE, _SIDE, dtype=torch.bfloat16)
    images = images.to(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16):
        return faked_gpu.generate(model, images)


def count_pass(graph: Generated) -> Pass:
    """To be called on a faked GPU. Raises `CountError` where a kernel's bytes are not known."""
    launches, calls = faked_gpu.run(graph)
    kernels = [Kernel(launch.kernel, 1, launch.bytes, True) for launch in launches]
    kernels += [_own_kernels(call) for call in calls if _is_own(call)]
    return Pass(kernels, Counter(call.operator for call in calls if not _is_own(call)))


def _is_own(call: Call) -> bool:
    return call.operator.startswith("fastlab::")


def _own_kernels(call: Call) -> Kernel:
    if call.operator not in OPERATORS:
        raise CountError(f"{call.operator}: its traffic is not in OPERATORS")
    traffic = OPERATORS[call.operator](*call.args, **call.kwargs)
    return Kernel(call.operator, traffic.kernels, traffic.bytes, False)


def largest(passes: list[Pass], number: int) -> list[Kernel]:
    every = [kernel for one in passes for kernel in one.kernels]
    return sorted(every, key=lambda kernel: kernel.bytes, reverse=True)[:number]


def _write(graphs: list[Generated], directory: Path, name: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for which, graph in zip(("forward", "backward"), graphs, strict=True):
        (directory / f"{name}-{which}.py").write_text(graph.code, encoding="utf-8")


def _record(name: str, cfg: Config, batch: int, passes: list[Pass]) -> Record:
    """Its figure is exact, so there is one round."""
    forward, backward = map(_details, passes)
    moved = sum(one.bytes() for one in passes) / batch
    details = {"batch": batch, "forward": forward, "backward": backward}
    return Record(name, "bytes/image", [moved], {**details, "config": public_config(cfg)})


def _details(one: Pass) -> dict[str, Any]:
    return {
        "generated": one.launches(generated=True),
        "custom": one.launches(generated=False),
        "library": dict(one.library),
        "small": one.small(),
        "bytes": one.bytes(),
    }


def table(*found: Session) -> str:
    """Markdown: a row a model of the first, its figures in each of the records in turn."""
    lines = [
        "| model | batch | generated kernels, forward + backward | custom kernels | library calls "
        "| kernels under 1 MB | MB an image |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in found[0].records:
        figures = zip(*(_figures(one[record.case]) for one in found), strict=True)
        cells = (" → ".join(cell) for cell in figures)
        lines.append(f"| {record.case} | {record.details['batch']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _figures(record: Record) -> tuple[str, ...]:
    passes = record.details["forward"], record.details["backward"]
    forward, backward = (one["generated"] for one in passes)
    custom, small = (sum(one[name] for one in passes) for name in ("custom", "small"))
    library = sum(sum(one["library"].values()) for one in passes)
    generated = f"{forward} + {backward} = {forward + backward}"
    return generated, str(custom), str(library), str(small), f"{record.median / 1e6:.1f}"


if __name__ == "__main__":
    raise SystemExit(main())
