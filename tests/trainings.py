"""Small trainings in processes of their own, and comparisons of what they wrote."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
TINY = (
    "model.width=4",
    "train.batch_size=16",
    "train.eval_batch_size=7",
    "train.epochs=3",
    "train.checkpoint_every=2",
    "train.checkpoint_seconds=0",
    "model.dropout_conv=0.1",
    "train.ema=0.9",
)


def command(dataset: Path | str, out: Path, *overrides: str) -> list[str]:
    """The arguments of a training of configs/demo.toml with `TINY` and `overrides`."""
    sets = [f"data.path={dataset}", *TINY, *overrides]
    return ["--config", str(ROOT / "configs" / "demo.toml"), "--out", str(out)] + [
        part for value in sets for part in ("--set", value)
    ]


def launch(
    arguments: list[str],
    processes: int = 1,
    script: Path = ROOT / "fastlab" / "train.py",
    device: str = "cpu",
    **settings: Any,
) -> subprocess.Popen[str]:
    """Start a training, under torchrun where it has several processes. `settings` are Popen's."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": str(device == "cpu").lower(),
        "OMP_NUM_THREADS": "1",
        # Where fastlab is not installed, Python looks in nothing but the script's own folder.
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
    return subprocess.Popen(
        [*start, str(script), *arguments], env=environment, cwd=ROOT, text=True, **settings
    )


def train(arguments: list[str], processes: int = 1, device: str = "cpu") -> None:
    """Run a training to its end, which must be a success."""
    process = launch(arguments, processes, device=device)
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, errors


def wait_until(
    happened: Callable[[], object], process: subprocess.Popen[str], seconds: float = 120
) -> bool:
    """Wait until `happened` returns something true, or `process` ends. False: the time ran out."""
    deadline = time.monotonic() + seconds
    while not happened() and process.poll() is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def metrics(run: Path) -> list[dict]:
    """The record of each epoch, without times, which differ between equal runs."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "wall_seconds", "images_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights in the newest checkpoint of a run."""
    return load_file(checkpoints(run)[-1] / "model.safetensors")


def same_weights(run: Path, other: Path) -> bool:
    """Whether the newest checkpoints of two runs hold equal weights, bit for bit."""
    first, second = weights(run), weights(other)
    return first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first)


def assert_same_run(run: Path, other: Path) -> None:
    """Two runs have the same metrics in each epoch, and the same weights at their end."""
    assert metrics(run) == metrics(other)
    assert same_weights(run, other)
