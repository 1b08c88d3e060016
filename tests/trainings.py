"""Small trainings in processes of their own, and what they leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

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


def command(dataset: Path, out: Path, *overrides: str) -> list[str]:
    sets = [f"data.path={dataset}", *TINY, *overrides]
    return ["--config", str(ROOT / "configs" / "demo.toml"), "--out", str(out)] + [
        part for value in sets for part in ("--set", value)
    ]


def launch(
    arguments: list[str],
    processes: int = 1,
    script: Path = ROOT / "fastlab" / "train.py",
    device: str = "cpu",
    **kwargs,
) -> subprocess.Popen:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": str(device == "cpu").lower(),
        "OMP_NUM_THREADS": "1",
        # Where fastlab is not installed: a script's own folder is all that Python looks in.
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    return subprocess.Popen(
        [*start, str(script), *arguments],
        env=environment,
        cwd=ROOT,
        text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **kwargs},
    )


def train(arguments: list[str], processes: int = 1, device: str = "cpu") -> None:
    process = launch(arguments, processes, device=device)
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, errors


def metrics(run: Path) -> list[dict]:
    """All but times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "wall_seconds", "images_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(max((run / "checkpoints").glob("step-*")) / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
