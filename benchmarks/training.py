"""Training steps of configurations: eager, compiled, captured; and what the input path costs.

    python -m benchmarks.training --config configs/resnet{11,18}.toml --batches 128,1024 --out FILE
    python -m benchmarks.training --config configs/demo.toml --batches 64 --steps 5    # any CPU

A round of a variant trains whole epochs (``--epochs``; ``--steps`` takes the first steps of each):
it begins with the epoch's order and ends when the device has done the last step. Validation and
checkpoints are not in it. "held" repeats the step on one batch that stays on the device, for a
quarter of the round's steps, right after: what an infinitely fast input path would give. The stall
is the share of a step's time between the two. FLOP are counted by torch, not assumed, 2 a
multiply-add.

One process for each configuration and batch size holds all variants, which take turns round by
round: the images are uploaded once, and each variant is compiled once. A variant whose loss or
weights are no longer finite is left out: such numbers change the power that a device draws, and
with it the clock.

With ``--out``, every round is saved at once, and the same command goes on where it was cut off.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import ceilings, savings
from benchmarks.measurements import (
    Results,
    Session,
    check_dataset,
    check_measured,
    check_names,
    device_of,
    read_record,
    tell_round,
)
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
    """One of `savings.CHANGES`."""

    def overrides(self) -> list[str]:
        return [
            f"train.precision={self.precision}",
            f"train.channels_last={str(self.channels_last).lower()}",
            f"train.compile={str(self.compile).lower()}",
            f"train.step={self.step}",
        ]


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


class Failed(Exception):
    """A case that could not be measured, and why."""

    def __init__(self, case: Case, reason: str) -> None:
        super().__init__(reason)
        self.case = case


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, nargs="+", required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--batches", type=positive_ints, default=[128], help="such as 128,1024")
    parser.add_argument("--variants", default="", help="names, separated by semicolons")
    parser.add_argument(
        "--savings", action="store_true", help="the captured step, each of its savings undone"
    )
    parser.add_argument("--rounds", type=positive_int, default=3)
    parser.add_argument("--epochs", type=positive_int, default=1, help="of a round")
    parser.add_argument("--steps", type=positive_int, help="of each epoch; default: all")
    parser.add_argument("--ceilings", type=Path, help="a record of benchmarks.ceilings")
    parser.add_argument("--traces", type=Path, help="a trace of each case, for fastlab trace")
    parser.add_argument("--out", type=Path, help="write the records to this JSON file")
    parser.add_argument(
        "--compile-only", action="store_true", help="fill the caches of torch.compile, and end"
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
        tell(compile_all(args, groups))
        return
    results = Results("training", args.out)
    problems = measure_all(args, groups, results)
    check_measured(results.session.records, problems)
    print(table(results.session))


def variants(names: str) -> list[str]:
    """Raises `UserError` for one that is unknown, or that this machine cannot run."""
    gpu = ceilings.default_device().type == "cuda"
    known = [name for name, variant in VARIANTS.items() if gpu or variant.step == "eager"]
    found = names.split(";") if names else _GPU_DEFAULT if gpu else known
    check_names(found, known, "--variants")
    return found


def measure_all(
    args: argparse.Namespace, groups: list[list[Case]], results: Results
) -> dict[str, str]:
    """Every round that `results` lacks. Returns the reasons of cases that failed, by name."""
    limits = limits_of(args.ceilings, results.session)
    problems: dict[str, str] = {}

    def left(case: Case) -> bool:
        return results.rounds(case.name) < args.rounds or untraced(args, case)

    def work(process: "Process", cases: list[Case]) -> None:
        take_turns(process, cases, args.rounds, results, limits)
        for case in cases:
            if untraced(args, case):
                process.ask("trace", case)

    for cases in groups:
        problems |= in_processes(args, cases, left, work)
    return problems


def limits_of(path: Path | None, found: Session) -> dict[str, float]:
    """FLOP/s and bytes/s by the ceiling's name: those of `found`, of the record at `path`, or
    measured now. Raises `UserError` where the record is of another device."""
    if found.records:
        return found.records[0].details["limits"]
    if not path:
        limits = ceilings.measure(ceilings.default_device())
        torch.cuda.empty_cache()  # this process keeps nothing that the trainings may need
        return limits
    record = read_record(path, "--ceilings")
    if device_of(record.machine) != device_of(found.machine):
        raise UserError(f"--ceilings {path}: measured on {', '.join(device_of(record.machine))}")
    return {ceiling.case: ceiling.median for ceiling in record.records}


def untraced(args: argparse.Namespace, case: Case) -> bool:
    return bool(args.traces) and not (args.traces / case.folder).exists()


def take_turns(
    process: "Process", cases: list[Case], rounds: int, results: Results, limits: dict[str, float]
) -> None:
    for turn in range(rounds):
        for case in cases:
            if results.rounds(case.name) <= turn:
                found = measure(process, case, results)
                once = {**found["once"], "limits": limits}
                results.add(case.name, "images/s", found["rate"], found["each"], once)
                tell_round(turn + 1, case.name, found["rate"])


def measure(process: "Process", case: Case, results: Results) -> dict[str, Any]:
    try:
        return process.ask("measure", case)
    except Failed:
        results.drop(case.name)
        raise


def compile_all(args: argparse.Namespace, groups: list[list[Case]]) -> dict[str, str]:
    """A few steps of each case. Returns the reasons of cases that failed, by name."""
    done: list[Case] = []
    problems: dict[str, str] = {}

    def work(process: "Process", cases: list[Case]) -> None:
        for case in cases:
            seconds = process.ask("compile", case)["seconds"]
            done.append(case)
            print(f"{case.name}: compiled in {seconds:.0f} s", flush=True)

    for cases in groups:
        problems |= in_processes(args, cases, lambda case: case not in done, work)
    return problems


def tell(problems: dict[str, str]) -> None:
    for name, problem in problems.items():
        print(f"left out: {name}: {problem}", file=sys.stderr)


def in_processes(
    args: argparse.Namespace,
    cases: list[Case],
    left: Callable[[Case], bool],
    work: Callable[["Process", list[Case]], None],
) -> dict[str, str]:
    """`work` on those of `cases` that are `left`, which share configuration and batch size, in a
    process. A case that fails may have spoilt it: the others go on in a new one. Returns the
    reasons by the case's name."""
    problems: dict[str, str] = {}
    while rest := [case for case in cases if case.name not in problems and left(case)]:
        try:
            with Process(args, rest[0]) as process:
                work(process, rest)
        except Failed as failure:
            problems[failure.case.name] = str(failure)
    return problems


class Process:
    """`benchmarks.training_process`, which holds the variants of one configuration at one batch
    size; a context that ends it."""

    def __init__(self, args: argparse.Namespace, case: Case) -> None:
        command = [sys.executable, "-m", "benchmarks.training_process"]
        command += ["--config", str(case.config), "--batch", str(case.batch)]
        command += ["--epochs", str(args.epochs)]
        command += ["--steps", str(args.steps)] if args.steps else []
        command += ["--traces", str(args.traces)] if args.traces else []
        command += [part for override in args.overrides for part in ("--set", override)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if kind:
            self._process.kill()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def ask(self, what: str, case: Case) -> dict[str, Any]:
        """The answer to a request, "measure", "compile" or "trace". Raises `Failed`."""
        with suppress(BrokenPipeError):  # it ended: so does its output, below
            request = {"what": what, "variant": case.variant, "folder": case.folder}
            print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise Failed(case, f"its process ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "problem" in answer:
            raise Failed(case, answer["problem"])
        return answer


def table(found: Session) -> str:
    """Markdown: a row a case."""
    lines = [
        "| case | images/s | held batch | stall | FLOP/s | of matrix rate | memory | compile |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in found.records:
        more = record.details
        flops = record.median * more["flop"]
        limit = more["limits"]["matmul_bf16" if "bf16" in record.case else "matmul_fp32"]
        memory = f"{more['memory'] / 1e9:.2f} GB" if more["memory"] else "not measured"
        lines.append(
            f"| {record.case} | {record.median:,.0f} ± {record.spread:.0%} "
            f"| {statistics.median(more['held']):,.0f} | {statistics.median(more['stall']):.1%} "
            f"| {flops / 1e12:.3g} T | {flops / limit:.1%} | {memory} "
            f"| {more['compile']:.0f} s |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
