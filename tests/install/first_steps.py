"""A user's first steps with an installed fastlab, in a folder that is no checkout.

    python -m tests.install.first_steps ENVIRONMENT    # a virtual environment with the wheel

Each step is a command of that environment; the first that fails ends with what it printed.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TINY = ("data.path=dataset", "model.width=4", "train.compile=false", "train.epochs=1")
SETS = tuple(word for value in TINY for word in ("--set", value))
TRAINING = ("--config", "configs/demo.toml", *SETS)
STUDY = "configs/ablations/resnet-lr.toml"
SYNTH = ("--classes", "10", "--per-class", "20")
STEPS: tuple[tuple[str, ...], ...] = (
    ("fastlab", "--help"),
    ("fastlab", "configs"),
    ("fastlab", "configs", "--copy", "."),
    ("fastlab", "synth", "originals", *SYNTH),
    ("fastlab", "convert", "originals", "dataset"),
    ("fastlab", "train", *TRAINING, "--out", "run"),
    ("fastlab", "report", "run", "--out", "report.html"),
    ("fastlab", "predict", "run", "originals/val"),
    ("python", "-m", "fastlab", "inspect", "dataset", "--verify"),
    ("python", "-m", "accelerate.commands.launch", "-m", "fastlab.train", *TRAINING),
    ("fastlab", "study", STUDY, "--out", "study", "--dry-run", "--no-calibration", *SETS),
    ("python", "-m", "benchmarks.loaders", "--help"),
)
# Prints the files of the modules that training and predicting import.
PYTHON = """
import sys
from pathlib import Path

import fastlab.train

image = next(Path("originals/val").rglob("*.JPEG"))
assert fastlab.load_run("run").predict(image)
names = [name for name in sys.modules if name.split(".")[0] in ("fastlab", "pipelines")]
print(*(sys.modules[name].__file__ for name in names), sep="\\n")
"""


def run(environment: Path, folder: Path, *command: str) -> str:
    """Run a program of `environment` in `folder`, without what this process's environment says of
    Python. Returns what it printed."""
    kept = {name: os.environ[name] for name in ("HOME", "PATH", "TMPDIR") if name in os.environ}
    done = subprocess.run(
        [str(environment / "bin" / command[0]), *command[1:]],
        env={**kept, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def imported(environment: Path, folder: Path) -> list[Path]:
    """The files of fastlab and pipelines that Python in `environment` uses after the steps."""
    return [Path(line) for line in run(environment, folder, "python", "-c", PYTHON).splitlines()]


def main(environment: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for step in STEPS:
            started = time.monotonic()
            run(environment, Path(folder), *step)
            print(f"{time.monotonic() - started:5.1f} s  {' '.join(step)}", flush=True)
        foreign = [
            path for path in imported(environment, Path(folder)) if environment not in path.parents
        ]
        assert not foreign, foreign


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
