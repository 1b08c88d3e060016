"""Everything worth measuring on a rented GPU, in order of value, in time-boxed, resumable slices.

    python -m benchmarks.gpu_suite --data data/tiny-imagenet --out OUT --budget 540
    python -m benchmarks.gpu_suite --data demo/dataset --out OUT --budget 600 --tiny   # any CPU

A stage is a list of steps, a step one command of this project that writes its own records. A step
that ended is never run again. One that the budget cuts off is asked to stop, and goes on from what
it has (a checkpoint, its finished cases) at its stage's next turn. The first call goes by value;
later ones begin with the stage that has had least time for steps that did not end, so that a long
one does not take all calls and each gets a whole call now and then. `OUT/suite.jsonl` logs every
step with its seconds.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fastlab.errors import UserError

_REFERENCE = ("resnet11", "resnet15", "resnet19", "cnn8", "cnn10", "cnn12")
_GRACE = 20.0  # seconds that a step has to save what it did
_LEAST = 15.0  # seconds left that are not worth starting a step


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    result: Path
    """Exists when the step ended well."""
    codes: tuple[int, ...] = (0,)
    """Exit statuses of a step that ended well."""


@dataclass(frozen=True)
class Suite:
    """Where and how large."""

    data: Path
    out: Path
    tiny: bool

    def module(self, name: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", name, *arguments]

    def measured(self, name: str, module: str, *arguments: str) -> Step:
        result = self.out / f"{name}.json"
        return Step(name, self.module(module, *arguments, "--out", str(result)), result)

    def trained(self, name: str, config: str, *overrides: str) -> Step:
        """A run in ``OUT/runs/<name>``, resumed where it was begun; over when its report exists."""
        run, report = self.out / "runs" / name, self.out / "runs" / f"{name}.html"
        script = f"{_fastlab('train')} --resume {run} || exit $?"
        if not (run / "config.toml").exists():
            sets = [f"data.path={json.dumps(str(self.data))}", *overrides]
            options = shlex.join([part for value in sets for part in ("--set", value)])
            script = f"{_fastlab('train')} --config {config} {options} --out {run} || exit $?"
        script += f"\n{_fastlab('report')} {run} --out {report}"
        return Step(name, ["bash", "-c", script], report)


def _fastlab(command: str) -> str:
    return shlex.join([sys.executable, "-m", "fastlab", command])


def environment(suite: Suite) -> list[Step]:
    return [suite.measured("ceilings", "benchmarks.ceilings")]


def correctness(suite: Suite) -> list[Step]:
    report = suite.out / "gpu-tests.xml"
    # On a CPU the same tests skip; what they are about is tested there by others.
    tests = "tests/pipelines/test_augment.py" if suite.tiny else "tests"
    options = ["-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
    return [Step("gpu-tests", suite.module("pytest", "-q", tests, *options), report)]


def loaders(suite: Suite) -> list[Step]:
    seconds, rounds = ("0.2", "1") if suite.tiny else ("3", "5")
    only = "memory gather, no augmentation;fastlab resident"
    if not suite.tiny:
        only += ";fastlab torchvision;fastlab dali;fastlab ffcv, raw"
    arguments = [str(suite.data), "--seconds", seconds, "--rounds", rounds, "--only", only]
    return [suite.measured("loaders", "benchmarks.loaders", *arguments)]


def training(suite: Suite) -> list[Step]:
    batches, seconds, rounds = ("32", "0.5", "1") if suite.tiny else ("128,512,1024,4096", "5", "3")
    names = ("demo",) if suite.tiny else _REFERENCE
    steps = []
    for name in names:
        arguments = ["--config", f"configs/{name}.toml", "--batches", batches]
        arguments += ["--set", f"data.path={json.dumps(str(suite.data))}"]
        arguments += ["--seconds", seconds, "--rounds", rounds]
        if suite.tiny:
            arguments += ["--variants", "eager fp32"]
        steps.append(suite.measured(f"training-{name}", "benchmarks.training", *arguments))
    return steps


def traces(suite: Suite) -> list[Step]:
    names = ("demo",) if suite.tiny else _REFERENCE
    return [
        suite.trained(f"trace-{n}", f"configs/{n}.toml", "profile.enabled=true", "train.epochs=1")
        for n in names
    ]


def accuracy(suite: Suite) -> list[Step]:
    if suite.tiny:
        return [suite.trained("demo", "configs/demo.toml", "train.epochs=2")]
    names = ("resnet11", "resnet11-modern", "resnet18")
    return [suite.trained(name, f"configs/{name}.toml") for name in names]


def ablations(suite: Suite) -> list[Step]:
    studies = sorted(str(path) for path in Path("configs/ablations").glob("*.toml"))
    study = suite.out / "study"
    arguments = [*studies, "--out", str(study), "--set", f"data.path={json.dumps(str(suite.data))}"]
    if suite.tiny:
        short = "configs/ablations/resnet-normalization.toml"
        arguments = [short, *arguments[len(studies) :], "--epochs", "1", "--seeds", "1"]
        arguments += ["--set", "model.width=4", "--set", "train.compile=false"]
        arguments += ["--set", 'train.precision="fp32"', "--set", "train.batch_size=32"]
    else:
        arguments += ["--jobs", "4"]
    command = suite.module("benchmarks.ablations", *arguments)
    # 1: some runs failed, which the report says.
    return [Step("study", command, study / "report.html", codes=(0, 1))]


def records(suite: Suite) -> list[Step]:
    arguments = ["--data", str(suite.data)]
    if suite.tiny:
        arguments += ["--runs", "1", "--set", "train.epochs=1", "--set", "train.batch_size=32"]
        arguments += ["--set", "model.width=4", "--set", "train.compile=false"]
        arguments += ["--set", 'train.precision="fp32"']
    return [
        suite.measured(f"record-{name}", f"benchmarks.records.{name}", *arguments)
        for name in ("reference", "sixty_six")
    ]


STAGES: dict[str, Callable[[Suite], list[Step]]] = {
    "environment": environment,
    "correctness": correctness,
    "loaders": loaders,
    "training": training,
    "traces": traces,
    "accuracy": accuracy,
    "ablations": ablations,
    "records": records,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="dataset directory")
    parser.add_argument("--out", type=Path, required=True, help="where results go, and are kept")
    parser.add_argument("--budget", type=float, required=True, help="seconds of this call")
    parser.add_argument("--only", nargs="+", default=list(STAGES), metavar="STAGE")
    parser.add_argument("--tiny", action="store_true", help="all stages on any CPU, in minutes")
    args = parser.parse_args(argv)
    try:
        return run(args)
    except UserError as error:
        print(f"gpu_suite: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    unknown = sorted(set(args.only) - set(STAGES))
    if unknown:
        raise UserError(f"--only {unknown[0]}: expected some of {', '.join(STAGES)}")
    if not (args.data / "manifest.json").is_file():
        raise UserError(f"--data {args.data}: not a dataset directory; make it by fastlab convert")
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.budget
    suite = Suite(args.data.resolve(), args.out.resolve(), args.tiny)
    status = 0
    for stage in by_turn(args.only, suite.out):
        for step in STAGES[stage](suite):
            status = max(status, attempt(step, stage, suite.out, deadline))
    return status


def by_turn(stages: list[str], out: Path) -> list[str]:
    """`stages`, those first that were given least time without an end; else in their order."""
    spent = dict.fromkeys(stages, 0.0)
    log = out / "suite.jsonl"
    for text in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        with contextlib.suppress(ValueError):  # the last line may be torn
            line = json.loads(text)
            if line["stage"] in spent and line["outcome"] != "done":
                spent[line["stage"]] += line["seconds"]
    return sorted(stages, key=spent.__getitem__)


def attempt(step: Step, stage: str, out: Path, deadline: float) -> int:
    """Run `step` unless it ended before or no time is left. 0: it has its result or will be gone
    on with; 1: it failed."""
    left = deadline - time.monotonic()
    if step.result.exists() or left < _LEAST:
        print(f"{stage}/{step.name}: {'done before' if step.result.exists() else 'no time left'}")
        return 0
    started = time.monotonic()
    with (out / f"{step.name}.log").open("a", encoding="utf-8") as log:
        code, cut = run_until(step.command, left - _GRACE / 2, log)
    done = code in step.codes and step.result.exists()
    if not done:  # pytest writes its report of failed tests too; they are in the log
        step.result.unlink(missing_ok=True)
    outcome = "done" if done else "cut off" if cut else f"failed ({code})"
    seconds = time.monotonic() - started
    print(f"{stage}/{step.name}: {outcome}, {seconds:.1f} s", flush=True)
    line = {
        "stage": stage,
        "step": step.name,
        "outcome": outcome,
        "seconds": round(seconds, 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(step.command),
    }
    with (out / "suite.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return 1 if outcome.startswith("failed") else 0


def run_until(command: list[str], seconds: float, log) -> tuple[int, bool]:
    """(exit status, whether it was cut off). At the end of its time the command and what it started
    get SIGTERM, and where that does not end them in time, SIGKILL."""
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, process_group=0
    )
    try:
        return process.wait(max(1.0, seconds)), False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
    except BaseException:  # Ctrl-C here is not theirs
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(_GRACE)
        raise
    try:
        return process.wait(_GRACE), True
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait(), True


if __name__ == "__main__":
    raise SystemExit(main())
