"""Fifteen minutes on a rented GPU, in stages that are commands of their own.

    python3 -m benchmarks.gpu_suite smoke --pack OUT                    # needs no data
    python3 -m benchmarks.gpu_suite data --piece .lease/piece-1.tar.xz  # then 2 and 3
    python3 -m benchmarks.gpu_suite ready --pack OUT                    # then the others, in turn

The machine is bare: nothing is installed but PyTorch and what usually comes with it, there is no
network, and a command brings at most a checkout and some files. So a stage takes the missing
packages from ``wheels/`` (`make wheels`), keeps everything under ``lease/``, and packs its results
into a few small files when it ends. Each step has a time limit; one that fails is reported with its
last line and the next one begins. While the pieces of the dataset arrive, tests and compilations
run in the background; from the stage `measure` on, each step has the machine for itself.
`--rehearse` runs these very commands on a CPU, where the same steps take small sizes
(`benchmarks.rehearsal` says how).
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import rehearsal
from fastlab.console import UserError, tell

LEASE = Path("lease")
SITE, LOGS, RESULTS, RUNS = (LEASE / name for name in ("site", "logs", "results", "runs"))
CACHE, ORIGINALS, BESIDE = (LEASE / name for name in ("inductor", "originals", "beside"))
SYNTHETIC, FIRST, DATASET = (LEASE / name for name in ("synthetic", "first", "dataset"))
WHEELS, CEILINGS = Path("wheels"), RESULTS / "ceilings.json"

_GRACE = 10.0  # seconds that a step has to save what it did
_PART = 15 << 20  # bytes of a file of the packed cache
_SHOWN = 12  # last lines of each step's log that a stage prints
_GPU_TESTS = ("tests/test_gpu.py", "tests/test_tracing.py", "tests/models")
_OTHERS = ("resnet15", "resnet19", "cnn8", "resnet18")


@dataclass(frozen=True)
class Step:
    """One command of this project, which writes its own records."""

    name: str
    command: list[str]
    seconds: float
    """Time limit. At its end the command and what it started get SIGINT."""
    beside: bool = False
    """It runs beside the steps that follow, in this stage and the next, which measure nothing; the
    stages `smoke` and `ready` wait for it."""


@dataclass(frozen=True)
class Stage:
    seconds: float
    """Time limit of all steps together."""
    steps: Callable[["Sizes", argparse.Namespace], list[Step]]
    about: str
    compiles: bool = False
    """Its packed results include the compiler's cache."""


@dataclass(frozen=True)
class Sizes:
    """How much each command does: on a GPU, or where there is none and it is only rehearsed."""

    batches: str = "128,1024"
    variants: str = ""
    savings_batches: tuple[int, ...] = (1024, 128, 256)
    rounds: int = 3
    loader_batches: str = "256,4096,65536"
    classes: int = 200
    savings: tuple[str, ...] = ("--savings",)
    """Variants of the stage `savings`."""
    overrides: tuple[str, ...] = ()
    """Makes the models small."""
    patience: float = 1.0
    """Time limits are multiplied by it."""

    def each_batch(self) -> list[tuple[int, tuple[str, ...]]]:
        """Batch sizes of the stage `savings`, and a command's options for each: short rounds."""
        options = ("--rounds", "2", "--steps", "100", "--ceilings", str(CEILINGS))
        return [(batch, ("--batches", str(batch), *options)) for batch in self.savings_batches]

    def sets(self, *overrides: str) -> list[str]:
        return [part for value in (*overrides, *self.overrides) for part in ("--set", value)]


ON_CPU = Sizes(
    batches="16",
    variants="eager fp32",
    savings_batches=(16,),
    rounds=1,
    loader_batches="8",
    classes=4,
    savings=(),
    patience=10.0,
    overrides=(
        "train.epochs=2",
        "model.width=4",
        "train.batch_size=16",
        "train.precision=fp32",
        "train.compile=false",
    ),
)


def python(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def training(sizes: Sizes, data: Path, name: str, configs: list[str], *more: object) -> list[str]:
    return python(
        "benchmarks.training",
        *("--config", *(f"configs/{config}.toml" for config in configs)),
        *sizes.sets(f"data.path={data}"),
        *("--batches", sizes.batches, "--out", RESULTS / f"{name}.json"),
        *(("--variants", sizes.variants) if sizes.variants else ()),
        *more,
    )


def smoke(sizes: Sizes, _: argparse.Namespace) -> list[Step]:
    """Whether everything works there at all; it also fills the compiler's cache."""
    data = SYNTHETIC / "dataset"
    loaders = ("--batches", sizes.loader_batches, "--rounds", 1)
    first_steps = ("--rounds", 1, "--epochs", 1, "--traces", RESULTS / "smoke-traces")
    short = ("--runs", 1, "--set", "train.epochs=2")
    return [
        Step("synth", _synth(sizes), 30),
        Step("convert-synthetic", _convert(SYNTHETIC / "originals", data), 30),
        Step("smoke-gpu-tests", _gpu_tests("smoke-gpu-tests"), 90, beside=True),
        Step(
            "smoke-training",
            training(sizes, data, "smoke-training", ["resnet11"], *first_steps),
            80,
            beside=True,
        ),
        Step(
            "smoke-loaders",
            _loaders(data, "smoke-loaders", *loaders),
            80,
            beside=True,
        ),
        Step("smoke-race", _race(sizes, "reference", "smoke-race", data, *short), 80),
    ]


def data(sizes: Sizes, args: argparse.Namespace) -> list[Step]:
    """Unpack one piece of the original images. With the first, which is a whole, smaller dataset,
    begins what needs no more."""
    if args.piece is None or not args.piece.is_file():
        raise UserError(f"--piece {args.piece}: no such file; a piece of the dataset is needed")
    unpack = ["tar", "-xf", str(args.piece), "-C", str(ORIGINALS), "--strip-components=1"]
    steps = [Step(f"unpack-{args.piece.name}", unpack, 15)]
    short = ("--runs", 1, "--set", "train.epochs=1")
    if FIRST.exists():
        return steps
    return [
        Step("gpu-tests", _gpu_tests("gpu-tests"), 100, beside=True),
        *steps,
        Step("convert-first", _convert(ORIGINALS, FIRST), 15),
        Step("warm-race", _race(sizes, "reference", "warm-race", FIRST, *short), 90, beside=True),
        warm(sizes, FIRST, "resnet11", "resnet11", 90),
        *(
            warm(sizes, FIRST, f"savings-{batch}", "resnet11", 150, *sizes.savings, *only)
            for batch, only in sizes.each_batch()
        ),
    ]


def ready(sizes: Sizes, _: argparse.Namespace) -> list[Step]:
    """Convert all images, and wait for what runs beside."""
    return [Step("convert", _convert(ORIGINALS, DATASET), 40)]


def measure(sizes: Sizes, _: argparse.Namespace) -> list[Step]:
    """What bounds a training step, and the step."""
    rounds = ("--rounds", sizes.rounds, "--epochs", 1)
    records = ("--ceilings", CEILINGS, "--traces", RESULTS / "traces")
    return [
        *_ceilings(),
        Step(
            "training",
            training(sizes, DATASET, "training", ["resnet11"], *rounds, *records),
            150,
        ),
    ]


def savings(sizes: Sizes, _: argparse.Namespace) -> list[Step]:
    """The step with each of its savings undone; the largest batch, bound by bytes, first."""
    return [
        Step(
            f"savings-{batch}",
            training(sizes, DATASET, f"savings-{batch}", ["resnet11"], *sizes.savings, *only),
            60,
        )
        for batch, only in sizes.each_batch()
    ]


def reference(sizes: Sizes, _: argparse.Namespace) -> list[Step]:
    """The reference's ResNet-11 for all of its epochs, by the seed that no earlier rental took."""
    seed = next_seed("resnet11", Path("benchmarks/results"))
    run = RUNS / f"resnet11-seed{seed}"
    sets = sizes.sets(f"data.path={DATASET}", f"train.seed={seed}")
    return [Step("reference", _train(run, "resnet11", sets), 270)]


def loaders(sizes: Sizes, _: argparse.Namespace) -> list[Step]:
    """The input path beside a copy of as many bytes, and nvJPEG."""
    rounds = ("--batches", sizes.loader_batches, "--rounds", sizes.rounds)
    return [Step("loaders", _loaders(DATASET, "loaders", *rounds), 60)]


def race(sizes: Sizes, _: argparse.Namespace) -> list[Step]:
    """Seconds to the reference's 46.04 %."""
    limit = ("--runs", 5, "--limit", 140)
    return [Step("race", _race(sizes, "reference", "race-reference", DATASET, *limit), 160)]


def more(sizes: Sizes, _: argparse.Namespace) -> list[Step]:
    """The other models, then one attempt at 66 % in the time that is left."""
    options = ("--ceilings", CEILINGS, "--rounds", 1, "--steps", 100)
    limit = ("--runs", 1, "--limit", 90)
    return [
        *_ceilings(),
        *(
            Step(
                f"training-{name}",
                training(sizes, DATASET, f"training-{name}", [name], *options),
                40,
            )
            for name in _OTHERS
        ),
        Step("sixty-six", _race(sizes, "sixty_six", "race-sixty-six", DATASET, *limit), 110),
    ]


# What each stage took on an H200, with some to spare; `savings`, `reference`, which has not run to
# its end there, `loaders` and `more` are estimates from the rates measured there.
STAGES = {
    "smoke": Stage(90, smoke, "the tests marked gpu, a few steps of every variant", True),
    "data": Stage(20, data, "unpack a piece of the dataset (--piece)"),
    "ready": Stage(60, ready, "convert all images, wait for tests and compilations", True),
    "measure": Stage(140, measure, "roofs, training steps of ResNet-11"),
    "savings": Stage(110, savings, "the step of ResNet-11 with each of its savings undone"),
    "reference": Stage(225, reference, "the reference's ResNet-11 for its 100 epochs"),
    "race": Stage(95, race, "seconds to 46.04 %, five times"),
    "loaders": Stage(
        65, loaders, "in time that is left: the input path beside a copy of as many bytes, nvJPEG"
    ),
    "more": Stage(120, more, "in time that is left: the other models, one attempt at 66 %"),
}
_WAITING = ("smoke", "ready")


def _ceilings() -> list[Step]:
    """Once in a rental."""
    command = python("benchmarks.ceilings", "--out", CEILINGS)
    return [] if CEILINGS.exists() else [Step("ceilings", command, 25)]


def _synth(sizes: Sizes) -> list[str]:
    arguments = ("synth", SYNTHETIC / "originals", "--classes", sizes.classes, "--per-class", 20)
    return python("fastlab", *arguments, "--force")


def _convert(originals: Path, dataset: Path) -> list[str]:
    return python("fastlab", "convert", originals, dataset, "--formats", "array,tar")


def _gpu_tests(name: str) -> list[str]:
    # pytest-benchmark, which is installed there, warns of xdist, and warnings are errors here.
    plugins = ("-p", "no:cacheprovider", "-p", "no:benchmark")
    options = ("-m", "gpu", "-q", *plugins, "--durations", 15, "-n", 6)
    return python("pytest", *_GPU_TESTS, *options, f"--junitxml={RESULTS / name}.xml")


def _train(run: Path, config: str, sets: list[str]) -> list[str]:
    if (run / "config.toml").exists():
        return python("fastlab", "train", "--resume", run)
    return python("fastlab", "train", "--config", f"configs/{config}.toml", *sets, "--out", run)


def _loaders(dataset: Path, name: str, *options: object) -> list[str]:
    return python("benchmarks.device_loaders", dataset, *options, "--out", RESULTS / f"{name}.json")


def _race(sizes: Sizes, record: str, name: str, dataset: Path, *options: object) -> list[str]:
    arguments = ("--data", dataset, "--out", RESULTS / f"{name}.json", *options)
    return python(f"benchmarks.records.{record}", *arguments, *sizes.sets())


def warm(
    sizes: Sizes, dataset: Path, name: str, config: str, seconds: float, *options: str
) -> Step:
    """Compile what later stages measure, beside what measures nothing and has the cores first."""
    command = training(sizes, dataset, f"warm-{name}", [config], "--compile-only", *options)
    return Step(f"warm-{name}", ["nice", "-n", "10", *command], seconds, beside=True)


def next_seed(name: str, results: Path) -> int:
    """The first seed without a finished run under `results`: those of earlier rentals add up."""
    finished = {
        int(path.parent.name.rpartition("seed")[2])
        for path in results.glob(f"*/runs/{name}-seed*/summary.json")
        if json.loads(path.read_text(encoding="utf-8"))["status"] == "finished"
    }
    return min(set(range(len(finished) + 1)) - finished)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--rehearse"]:
        return rehearsal.main(argv[1:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    about = "; ".join(
        f"{name} ({stage.seconds:.0f} s): {stage.about}" for name, stage in STAGES.items()
    )
    parser.add_argument("stage", choices=STAGES, help=about)
    parser.add_argument("--piece", type=Path, help="for data: a .tar.xz of original images")
    parser.add_argument("--cache", type=Path, help="a folder with a packed compiler cache")
    parser.add_argument("--pack", type=Path, help="where packed results go")
    parser.add_argument("--set", action="append", default=[], help="for every training")
    parser.add_argument("--seconds", type=float, help="another time limit of the stage")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps of the stage alone")
    args = parser.parse_args(argv)
    try:
        return run(args)
    except UserError as error:
        tell(error)
        return 2
    except KeyboardInterrupt:
        tell("interrupted")
        return 130


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, or 1 where a step failed."""
    stage = STAGES[args.stage]
    started = time.monotonic()
    for folder in (LOGS, RESULTS, RUNS, CACHE, ORIGINALS):
        folder.mkdir(parents=True, exist_ok=True)
    install_wheels()
    if args.cache:
        unpack_cache(args.cache)
    device = identify()
    sizes = Sizes() if device["machine"]["gpus"] else ON_CPU
    sizes = replace(sizes, overrides=(*sizes.overrides, *args.set))
    deadline = started + sizes.patience * (args.seconds or stage.seconds)
    steps = [
        replace(step, seconds=sizes.patience * step.seconds)
        for step in stage.steps(sizes, args)
        if not args.only or step.name in args.only
    ]
    outcomes = attempt(steps, deadline, args.stage)
    if args.pack:
        pack(args.pack, args.stage)
    print(f"{args.stage}: {time.monotonic() - started:.1f} s in all", flush=True)
    return int(any(outcome.startswith("failed") for outcome in outcomes))


def install_wheels() -> None:
    """Into a folder of its own, once; what runs from here finds it and this checkout."""
    wheels = sorted(map(str, WHEELS.glob("*.whl")))
    if wheels and not SITE.exists():
        options = ("--quiet", "--no-index", "--no-deps", "--no-compile", "--target", SITE)
        subprocess.run(python("pip", "install", *options, *wheels), check=True)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(SITE.resolve()), str(Path.cwd())])
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(CACHE.resolve())
    os.environ["PYTHONUNBUFFERED"] = "1"


def identify() -> dict:
    """The machine and the versions, by a process of its own: this one imports no torch."""
    record = RESULTS / "environment.json"
    if record.exists():
        return json.loads(record.read_text())
    code = "import json; from fastlab.machine import environment; print(json.dumps(environment(1)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"fastlab does not start here: {done.stderr.strip().splitlines()[-1]}")
    record.write_text(done.stdout)
    return json.loads(done.stdout)


def attempt(steps: list[Step], deadline: float, stage: str) -> list[str]:
    """Run `steps` until `deadline` (of the monotonic clock), and in some stages wait for what runs
    beside. Returns the outcomes of what ended."""
    outcomes = []
    for step in steps:
        running = Running.start(step)
        if not step.beside:
            outcomes.append(running.finish(stage, deadline))
    if stage in _WAITING:
        outcomes += [running.finish(stage, deadline) for running in Running.all_beside()]
    return outcomes


@dataclass(frozen=True)
class Running:
    """A step under way, in a session of its own: it outlives the command of its stage."""

    name: str
    process: int
    """The number of the shell that writes the exit status, and of its process group."""
    started: float
    seconds: float

    @classmethod
    def start(cls, step: Step) -> "Running":
        status, number = (LOGS / f"{step.name}.{kind}" for kind in ("status", "number"))
        for path in (status, number):
            path.unlink(missing_ok=True)
        script = f"""
            echo $$ >{shlex.quote(str(number))}
            trap : INT
            {shlex.join(step.command)}
            echo $? >{shlex.quote(str(status))}"""
        with (LOGS / f"{step.name}.log").open("w", encoding="utf-8") as log:
            subprocess.run(
                # A shell starts what it puts in the background with SIGINT ignored.
                ["setsid", "--fork", "env", "--default-signal=INT", "bash", "-c", script],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                check=True,
            )
        while not (number.exists() and number.read_text().endswith("\n")):
            time.sleep(0.01)
        running = cls(step.name, int(number.read_text()), time.monotonic(), step.seconds)
        if step.beside:
            BESIDE.mkdir(exist_ok=True)
            (BESIDE / f"{step.name}.json").write_text(json.dumps(asdict(running)))
        return running

    @classmethod
    def all_beside(cls) -> list["Running"]:
        found = []
        for path in sorted(BESIDE.glob("*.json")):
            found.append(cls(**json.loads(path.read_text())))
            path.unlink()
        return found

    def finish(self, stage: str, deadline: float) -> str:
        """Wait for it, report it in the log and on the console; returns how it ended."""
        try:
            cut = not self._ended_by(min(deadline, self.started + self.seconds))
        except KeyboardInterrupt:  # which does not reach the step's own session
            self._stop()
            raise
        if cut:
            self._stop()
        status = self._status()
        outcome = "cut off" if cut else "done" if status == 0 else f"failed ({status})"
        seconds = time.monotonic() - self.started
        lines = (LOGS / f"{self.name}.log").read_text("utf-8", errors="replace").splitlines()
        print(f"== {stage}/{self.name}: {outcome}, {seconds:.1f} s")
        print("\n".join(lines[-_SHOWN:] if outcome == "done" else lines[-3 * _SHOWN :]), flush=True)
        record = {
            "stage": stage,
            "step": self.name,
            "outcome": outcome,
            "seconds": round(seconds, 1),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "last_line": lines[-1] if lines and outcome != "done" else "",
        }
        with (RESULTS / "suite.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        return outcome

    def _status(self) -> int | None:
        path = LOGS / f"{self.name}.status"
        text = path.read_text() if path.exists() else ""
        return int(text) if text.endswith("\n") else None

    def _ended_by(self, deadline: float) -> bool:
        while self._status() is None:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def _stop(self) -> None:
        """SIGINT, as Ctrl-C is: trainings save a checkpoint, pytest reports what it has."""
        with suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGINT)
        if not self._ended_by(time.monotonic() + _GRACE):
            with suppress(ProcessLookupError):
                os.killpg(self.process, signal.SIGKILL)


def pack(out: Path, stage: str) -> None:
    """Results and logs without checkpoints, and the compiler's cache, as a few small files."""
    out.mkdir(parents=True, exist_ok=True)
    for run in RUNS.iterdir():
        ignore = shutil.ignore_patterns("checkpoints", "lock", "*.partial")
        shutil.copytree(run, RESULTS / "runs" / run.name, ignore=ignore, dirs_exist_ok=True)
    _compress(out / f"{stage}.tar.xz", RESULTS, LOGS)
    if STAGES[stage].compiles:
        packed_cache = LEASE / "inductor.tar.xz"
        # Inductor's own entries hold the kernels that Triton keeps beside them.
        _compress(packed_cache, CACHE, options=("--exclude=inductor/triton",))
        with packed_cache.open("rb") as file:
            for number, part in enumerate(iter(lambda: file.read(_PART), b"")):
                (out / f"{packed_cache.name}.{number}").write_bytes(part)


def _compress(archive: Path, *folders: Path, options: tuple[str, ...] = ()) -> None:
    # With all cores, and in two seconds, to a fifth of what gzip leaves of a compiler's cache.
    command = ["tar", "--use-compress-program=xz -3 -T0", "-cf", str(archive), "-C", str(LEASE)]
    subprocess.run([*command, *options, *(folder.name for folder in folders)], check=True)


def unpack_cache(folder: Path) -> None:
    """What `pack` packed, in this rental or one before."""
    parts = sorted(folder.glob("inductor.tar.xz.*"))
    if not parts:
        raise UserError(f"--cache {folder}: holds no inductor.tar.xz.0; drop the option")
    whole = b"".join(part.read_bytes() for part in parts)
    subprocess.run(["tar", "-xJf", "-", "-C", str(LEASE)], input=whole, check=True)


if __name__ == "__main__":
    raise SystemExit(main())
