"""Training steps of configurations: eager, compiled, captured; and what the input path costs.

    python -m benchmarks.training --config configs/resnet{11,18}.toml --batches 128,1024 --out FILE
    python -m benchmarks.training --config configs/demo.toml --batches 64 --steps 5    # any CPU

A round of a variant trains whole epochs (``--epochs``; ``--steps`` takes the first steps of each):
it begins with the epoch's order and ends when the device has done the last step. Validation and
checkpoints are not in it. "held" repeats the step on one batch that stays on the device, for a
quarter of the round's steps, right after: what an infinitely fast input path would give. The stall
is the share of a step's time between the two. FLOP are counted by torch, not assumed, 2 for a
multiply-add.

One process for each configuration and batch size holds all variants, which take turns round by
round. A variant whose loss or weights are no longer finite is skipped and reported.
"""

import argparse
import itertools
import multiprocessing
import statistics
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import ceilings, savings
from benchmarks.measurements import (
    Results,
    Round,
    Session,
    check_dataset,
    chosen,
    command_line,
    device_of,
    interleave,
    load,
    receive,
    report_skipped,
)
from benchmarks.timing import default_device
from fastlab import config as configs
from fastlab.console import UserError, positive_int, positive_ints, run_command


@dataclass(frozen=True)
class Variant:
    """How a configuration is trained."""

    precision: str
    compile: bool = False
    step: str = "eager"
    channels_last: bool = True
    change: str | None = None
    """A key of `savings.CHANGES`."""

    def overrides(self) -> list[str]:
        return [
            f"train.precision={self.precision}",
            f"train.channels_last={str(self.channels_last).lower()}",
            f"train.compile={str(self.compile).lower()}",
            f"train.step={self.step}",
        ]


Request = Literal["measure", "compile", "trace"]

_CAPTURED = Variant("bf16", compile=True, step="captured")
VARIANTS = {
    "eager fp32, channels first": Variant("fp32", channels_last=False),
    "eager fp32": Variant("fp32"),
    "eager bf16": Variant("bf16"),
    "compiled fp32": Variant("fp32", compile=True),
    "compiled bf16": Variant("bf16", compile=True),
    "captured bf16": _CAPTURED,
    **{f"captured bf16, {name}": replace(_CAPTURED, change=name) for name in savings.CHANGES},
}
_SAVINGS = [name for name in VARIANTS if name.startswith(("compiled bf16", "captured bf16"))]
_GPU_DEFAULT = ["eager bf16", "compiled bf16", "captured bf16"]


@dataclass(frozen=True)
class Case:
    config: Path
    variant: str
    batch: int

    @property
    def name(self) -> str:
        return f"{self.config.stem}, {self.variant}, batch {self.batch}"

    @property
    def folder(self) -> str:
        return self.name.replace(", ", "-").replace(" ", "-")


def main(argv: list[str] | None = None) -> int:
    parser = command_line(__doc__, rounds=3, overrides=True)
    parser.add_argument("--config", type=Path, nargs="+", required=True)
    parser.add_argument("--batches", type=positive_ints, default=[128], help="such as 128,1024")
    parser.add_argument("--variants", default="", help="names, separated by semicolons")
    parser.add_argument(
        "--savings", action="store_true", help="the captured step, each of its savings undone"
    )
    parser.add_argument("--epochs", type=positive_int, default=1, help="epochs of a round")
    parser.add_argument("--steps", type=positive_int, help="steps of each epoch; default: all")
    parser.add_argument("--ceilings", type=Path, help="a record of benchmarks.ceilings")
    parser.add_argument("--traces", type=Path, help="a trace of each case, for fastlab trace")
    parser.add_argument(
        "--compile-only", action="store_true", help="only fill the caches of torch.compile"
    )
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    names = variants(";".join(_SAVINGS) if args.savings else args.variants)
    for path in args.config:
        check_dataset(configs.load(path, args.overrides).data.path)
    groups = [
        [Case(config, name, batch) for name in names]
        for config, batch in itertools.product(args.config, args.batches)
    ]
    if args.compile_only:
        report_skipped(compile_all(args, groups))
        return
    results = Results("training", args.out)
    results.report(table, measure_all(args, groups, results))


def variants(names: str) -> list[str]:
    """The names that `names` lists; "" stands for this machine's default. Raises `UserError` for a
    variant that is unknown, or that this machine cannot run."""
    gpu = default_device().type == "cuda"
    known = [name for name, variant in VARIANTS.items() if gpu or variant.step == "eager"]
    return chosen(names or (";".join(_GPU_DEFAULT) if gpu else ""), known, "--variants")


def measure_all(
    args: argparse.Namespace, groups: list[list[Case]], results: Results
) -> dict[str, str]:
    """Measure every round that `results` lacks. Returns the reasons of cases that failed, by
    name."""
    limits = limits_of(args.ceilings, results.session)
    problems: dict[str, str] = {}

    def measure(process: Process, case: Case) -> Round:
        answer = process.ask("measure", case)
        return Round(answer["rate"], answer["each"], {**answer["once"], "limits": limits})

    for cases in groups:
        with Process(args, cases[0]) as process:
            measuring = {case.name: partial(measure, process, case) for case in cases}
            problems |= interleave(measuring, args.rounds, results)
            for case in cases if args.traces else ():
                if case.name not in problems and not (args.traces / case.folder).exists():
                    attempt(process, "trace", case, problems)
    return problems


def limits_of(path: Path | None, session: Session) -> dict[str, float]:
    """FLOP/s and bytes/s by the ceiling's name: those of `session`, of the record at `path`, or
    measured now. Raises `UserError` where the record is of another device."""
    if session.records:
        return session.records[0].details["limits"]
    if not path:
        limits = ceilings.measure(default_device())
        torch.cuda.empty_cache()  # this process keeps no memory that the trainings may need
        return limits
    record = load(path, "--ceilings")
    if device_of(record.machine) != device_of(session.machine):
        raise UserError(f"--ceilings {path}: measured on {', '.join(device_of(record.machine))}")
    return {ceiling.case: ceiling.median for ceiling in record.records}


def compile_all(args: argparse.Namespace, groups: list[list[Case]]) -> dict[str, str]:
    """Do a few steps of each case. Returns the reasons of cases that failed, by name."""
    problems: dict[str, str] = {}
    for cases in groups:
        with Process(args, cases[0]) as process:
            for case in cases:
                if answer := attempt(process, "compile", case, problems):
                    print(f"{case.name}: compiled in {answer['seconds']:.0f} s", flush=True)
    return problems


def attempt(
    process: "Process", what: Request, case: Case, problems: dict[str, str]
) -> dict[str, Any]:
    """The answer to a request; where it fails, the reason is added to `problems`."""
    try:
        return process.ask(what, case)
    except RuntimeError as error:
        problems[case.name] = str(error)
        return {}


class Process:
    """`benchmarks.training_process`, which holds the variants of one configuration at one batch
    size.

    The first request starts the process. A failed request may have damaged its state, so the next
    one starts a new process. The end of the context ends it.
    """

    def __init__(self, args: argparse.Namespace, case: Case) -> None:
        self._arguments = (args, case.config, case.batch)
        self._child: BaseProcess | None = None

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind and self._child:
            self._child.kill()  # an interruption leaves it in the middle of a request
        self._end()

    def ask(self, what: Request, case: Case) -> dict[str, Any]:
        """The answer to a request. Raises `RuntimeError` with the reason where there is none."""
        self._child = self._child or self._start()
        answer = self._exchange(self._child, (what, case.variant, case.folder))
        if "problem" in answer:
            self._end()
            raise RuntimeError(answer["problem"])
        return answer

    def _start(self) -> BaseProcess:
        from benchmarks.training_process import serve  # which imports this module

        spawn = multiprocessing.get_context("spawn")
        self._pipe, childs = spawn.Pipe()
        child = spawn.Process(target=serve, args=(childs, *self._arguments))
        child.start()
        childs.close()  # so that the end of the process ends `recv`
        return child

    def _exchange(self, child: BaseProcess, request: tuple[str, str, str]) -> dict[str, Any]:
        with suppress(OSError):  # of a process that has ended, which `receive` reports
            self._pipe.send(request)
        try:
            return receive(self._pipe, child)
        except RuntimeError as error:
            return {"problem": str(error)}

    def _end(self) -> None:
        if self._child:
            self._pipe.close()
            self._child.join()
            self._child = None


def table(session: Session) -> str:
    """In Markdown: a row for each case."""
    lines = [
        "| case | images/s | held batch | stall | FLOP/s | of matrix rate | memory | compile |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in session.records:
        details = record.details
        flops = record.median * details["flop"]
        limit = details["limits"]["matmul_bf16" if "bf16" in record.case else "matmul_fp32"]
        memory = f"{details['memory'] / 1e9:.2f} GB" if details["memory"] else "not measured"
        lines.append(
            f"| {record.case} | {record.cell()} | {statistics.median(details['held']):,.0f} "
            f"| {statistics.median(details['stall']):.1%} | {flops / 1e12:.3g} T "
            f"| {flops / limit:.1%} | {memory} | {details['compile']:.0f} s |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
