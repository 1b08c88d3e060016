"""The steps of each stage of `benchmarks.gpu_suite`: commands of this project, and their limits."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from fastlab.console import UserError

LEASE = Path("lease")
SITE, LOGS, RESULTS, RUNS = (LEASE / name for name in ("site", "logs", "results", "runs"))
CACHE, ORIGINALS, BESIDE = (LEASE / name for name in ("inductor", "originals", "beside"))
SYNTHETIC, FIRST, DATASET = (LEASE / name for name in ("synthetic", "first", "dataset"))
CEILINGS = RESULTS / "ceilings.json"

_GPU_TESTS = ("tests/models", "tests/test_tracing.py", "tests/test_gpu.py")  # the slowest last


@dataclass(frozen=True)
class Step:
    """One command of this project, which writes its own records."""

    name: str
    command: list[str]
    seconds: float
    """Time limit. At its end the command and what it started get SIGINT."""
    beside: bool = False
    """It runs beside later steps, which measure nothing, of this stage and the next; the stages
    `smoke` and `ready` wait for it."""


@dataclass(frozen=True)
class Sizes:
    """How much each command does on a GPU; `ON_CPU` has the sizes for a rehearsal without one."""

    batches: str = "128,1024"
    variants: str = ""
    savings_batches: tuple[int, ...] = (1024, 128)
    rounds: int = 3
    loader_batches: str = "256,4096,65536"
    classes: int = 200
    savings: tuple[str, ...] = ("--savings",)
    """The option that chooses the variants of the stage `savings`."""
    other_models: tuple[str, ...] = ("resnet15", "resnet19", "cnn8", "resnet18")
    """The models of the stage `more`."""
    test_processes: tuple[int, int] = (6, 12)
    """In the stages `smoke` and `tests`; 0: the stage does nothing."""
    search: str = "reference"
    """The file of the stage `search`, under benchmarks/searches/."""
    study: int = 590
    """The seconds of the stage `study`."""
    overrides: tuple[str, ...] = ()
    """Settings for every training."""
    patience: float = 1.0
    """A factor of all time limits."""

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
    other_models=("cnn8",),
    test_processes=(1, 0),  # all tests are skipped, which `smoke` shows
    search="rehearsal",
    study=40,
    patience=10.0,
    overrides=(
        "train.epochs=2",
        "model.width=4",
        "train.batch_size=16",
        "train.precision=fp32",
        "train.compile=false",
    ),
)


def smoke(sizes: Sizes, _: Path | None) -> list[Step]:
    """Check that everything works on the machine, and fill the compiler's cache."""
    originals, data = SYNTHETIC / "originals", SYNTHETIC / "dataset"
    images = ("--classes", sizes.classes, "--per-class", 20)
    synth = _python("fastlab", "synth", originals, *images, "--force")
    first_steps = ("--rounds", 1, "--epochs", 1, "--traces", RESULTS / "smoke-traces")
    training = _training(sizes, data, "smoke-training", "resnet11", *first_steps)
    loaders = _loaders(data, "smoke-loaders", "--batches", sizes.loader_batches, "--rounds", 1)
    race = _race(sizes, "reference", "smoke-race", data, "--runs", 1, "--set", "train.epochs=2")
    return [
        Step("synth", synth, 30),
        Step("convert-synthetic", _convert(originals, data), 30),
        Step(
            "smoke-gpu-tests",
            _gpu_tests("smoke-gpu-tests", sizes.test_processes[0]),
            90,
            beside=True,
        ),
        Step("smoke-training", training, 80, beside=True),
        Step("smoke-loaders", loaders, 80, beside=True),
        Step("smoke-race", race, 80),
    ]


def data(sizes: Sizes, piece: Path | None) -> list[Step]:
    """Unpack a piece of the original images (--piece). The first is a whole, smaller dataset: its
    arrival starts every step that needs no other piece."""
    if piece is None or not piece.is_file():
        raise UserError(f"--piece {piece}: no such file; name a piece of the dataset")
    unpack = ["tar", "-xf", str(piece), "-C", str(ORIGINALS), "--strip-components=1"]
    unpacking = Step(f"unpack-{piece.name}", unpack, 15)
    if FIRST.exists():
        return [unpacking]
    race = _race(sizes, "reference", "warm-race", FIRST, "--runs", 1, "--set", "train.epochs=1")
    return [
        unpacking,
        Step("convert-first", _convert(ORIGINALS, FIRST), 15),
        Step("warm-race", race, 90, beside=True),
        _warm(sizes, "resnet11", 90),
        *(
            _warm(sizes, f"savings-{batch}", 150, *_savings_options(sizes, batch))
            for batch in sizes.savings_batches
        ),
    ]


def ready(sizes: Sizes, _: Path | None) -> list[Step]:
    """Convert all images, and wait for the steps beside."""
    return [Step("convert", _convert(ORIGINALS, DATASET), 40)]


def measure(sizes: Sizes, _: Path | None) -> list[Step]:
    """Measure what bounds a training step, and the step."""
    rounds = ("--rounds", sizes.rounds, "--epochs", 1)
    records = ("--ceilings", CEILINGS, "--traces", RESULTS / "traces")
    training = _training(sizes, DATASET, "training", "resnet11", *rounds, *records)
    return [*_ceilings(), Step("training", training, 150)]


def savings(sizes: Sizes, _: Path | None) -> list[Step]:
    """Measure the step with each of its savings undone, first at the largest batch, which is bound
    by bytes."""

    def step(name: str, *options: object) -> Step:
        return Step(name, _training(sizes, DATASET, name, "resnet11", *options), 60)

    return [
        step(f"savings-{batch}", *_savings_options(sizes, batch)) for batch in sizes.savings_batches
    ]


def reference(sizes: Sizes, _: Path | None) -> list[Step]:
    """Train the reference's ResNet-11 for all its epochs, with the first seed that no earlier
    rental finished."""
    return [_whole_run(sizes, "resnet11", 270)]


def recipe(sizes: Sizes, _: Path | None) -> list[Step]:
    """In a rental of its own: train the recipe of ResNet-18 for all its epochs, with the first seed
    that no earlier rental finished."""
    return [_whole_run(sizes, "resnet18", 600)]


def study(sizes: Sizes, _: Path | None) -> list[Step]:
    """In a rental of its own: train the report's distinct runs that no earlier rental finished, as
    many as there is time for."""
    sets = sizes.sets(f"data.path={DATASET}", "schedule.floor_patience=10")
    options = ("--out", RUNS / "study", "--limit", sizes.study, *sets)
    return [Step("study", _python("benchmarks.report_runs", *options), 610)]


def _whole_run(sizes: Sizes, name: str, seconds: float) -> Step:
    seed = next_seed(name, Path("benchmarks/results"))
    run = RUNS / f"{name}-seed{seed}"
    # Not asked of `RunDir`: this process runs without the packages that fastlab.runs needs.
    if (run / "config.toml").exists():
        return Step(f"whole-{name}", _python("fastlab", "train", "--resume", run), seconds)
    sets = sizes.sets(f"data.path={DATASET}", f"train.seed={seed}")
    config = ("--config", f"configs/{name}.toml", *sets)
    return Step(f"whole-{name}", _python("fastlab", "train", *config, "--out", run), seconds)


def tests(sizes: Sizes, _: Path | None) -> list[Step]:
    """If time is left: run the tests marked `gpu`, whose compilations take all cores."""
    processes = sizes.test_processes[1]
    return [Step("gpu-tests", _gpu_tests("gpu-tests", processes), 150)] if processes else []


def loaders(sizes: Sizes, _: Path | None) -> list[Step]:
    """If time is left: measure the input path beside a copy of as many bytes, and nvJPEG."""
    rounds = ("--batches", sizes.loader_batches, "--rounds", sizes.rounds)
    return [Step("loaders", _loaders(DATASET, "loaders", *rounds), 60)]


def race(sizes: Sizes, _: Path | None) -> list[Step]:
    """Measure the seconds to the reference's 46.04 %, five times."""
    limit = ("--runs", 5, "--limit", 140)
    return [Step("race", _race(sizes, "reference", "race-reference", DATASET, *limit), 160)]


def search(sizes: Sizes, _: Path | None) -> list[Step]:
    """If time is left: try variants of the record's recipe, thirty in a rental of their own."""
    spec = f"benchmarks/searches/{sizes.search}.toml"
    options = ("--data", DATASET, "--out", RESULTS / "search.json", "--limit", 270)
    return [Step("search", _python("benchmarks.search", spec, *options, *sizes.sets()), 290)]


def more(sizes: Sizes, _: Path | None) -> list[Step]:
    """If time is left: measure the other models, then the seconds to 46.04 % by speed8, five times;
    then attempt 60 % and 66 % once."""
    options = ("--ceilings", CEILINGS, "--rounds", 1, "--steps", 100)
    names = {f"training-{model}": model for model in sizes.other_models}
    five_times, once = ("--runs", 5, "--limit", 60), ("--runs", 1, "--limit")
    return [
        *_ceilings(),
        *(
            Step(name, _training(sizes, DATASET, name, model, *options), 40)
            for name, model in names.items()
        ),
        Step("speed8", _race(sizes, "speed8", "race-speed8", DATASET, *five_times), 75),
        Step("sixty", _race(sizes, "sixty", "race-sixty", DATASET, *once, 50), 65),
        Step("sixty-six", _race(sizes, "sixty_six", "race-sixty-six", DATASET, *once, 90), 110),
    ]


def next_seed(name: str, results: Path) -> int:
    """The first seed without a finished run under `results`: those of earlier rentals add up."""
    finished = {
        int(path.parent.name.rpartition("seed")[2])
        for path in results.glob(f"*/runs/{name}-seed*/summary.json")
        if json.loads(path.read_text(encoding="utf-8"))["status"] == "finished"
    }
    return min(set(range(len(finished) + 1)) - finished)


def _python(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def _training(sizes: Sizes, data: Path, name: str, config: str, *options: object) -> list[str]:
    variants = ("--variants", sizes.variants) if sizes.variants else ()
    return _python(
        "benchmarks.training",
        *("--config", f"configs/{config}.toml", *sizes.sets(f"data.path={data}")),
        *("--batches", sizes.batches, "--out", RESULTS / f"{name}.json", *variants, *options),
    )


def _savings_options(sizes: Sizes, batch: int) -> tuple[object, ...]:
    """Options of `_training` for short rounds of the variants without savings."""
    rounds = ("--rounds", 2, "--steps", 100)
    return (*sizes.savings, "--batches", batch, *rounds, "--ceilings", CEILINGS)


def _warm(sizes: Sizes, name: str, seconds: float, *options: object) -> Step:
    """Compile what later stages measure, beside steps that measure nothing and get the cores
    first."""
    command = _training(sizes, FIRST, f"warm-{name}", "resnet11", "--compile-only", *options)
    return Step(f"warm-{name}", ["nice", "-n", "10", *command], seconds, beside=True)


def _ceilings() -> list[Step]:
    """The ceilings, which are measured once in a rental."""
    command = _python("benchmarks.ceilings", "--out", CEILINGS)
    return [] if CEILINGS.exists() else [Step("ceilings", command, 25)]


def _convert(originals: Path, dataset: Path) -> list[str]:
    return _python("fastlab", "convert", originals, dataset, "--formats", "array,tar")


def _gpu_tests(name: str, processes: int) -> list[str]:
    """With a line for each test that ended, so that a step that is cut off shows what passed."""
    # pytest-benchmark, which is installed there, warns of xdist, and warnings are errors here.
    plugins = ("-p", "no:cacheprovider", "-p", "no:benchmark")
    options = ("-m", "gpu", "-v", *plugins, "--durations", 15, "-n", processes)
    return _python("pytest", *_GPU_TESTS, *options, f"--junitxml={RESULTS / name}.xml")


def _loaders(dataset: Path, name: str, *options: object) -> list[str]:
    out = ("--out", RESULTS / f"{name}.json")
    return _python("benchmarks.device_loaders", dataset, *options, *out)


def _race(sizes: Sizes, record: str, name: str, dataset: Path, *options: object) -> list[str]:
    arguments = ("--data", dataset, "--out", RESULTS / f"{name}.json", *options)
    return _python(f"benchmarks.records.{record}", *arguments, *sizes.sets())
