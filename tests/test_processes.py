"""How the threads of a training wait, as OpenMP itself reports it."""

import os
import subprocess
import sys

import pytest

from tests.trainings import ROOT, command


@pytest.mark.slow
@pytest.mark.parametrize("start", [["-m", "fastlab", "train"], ["fastlab/train.py"]])
@pytest.mark.parametrize(
    ("chosen", "expected", "reported"),
    [
        ({}, "PASSIVE", "2 threads, which wait without spinning"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE", "2 threads, which wait by spinning"),
    ],
)
def test_threads_sleep_while_they_wait_unless_the_environment_says_otherwise(
    start, chosen, expected, reported, synth_dataset, tmp_path
):
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY",)}
    environment |= {"OMP_DISPLAY_ENV": "true", "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *start, *command(synth_dataset, tmp_path / "run", "train.epochs=1")],
        env={**environment, "PYTHONPATH": str(ROOT), **chosen},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert f"OMP_WAIT_POLICY = '{expected}'" in done.stderr
    assert f"computing with {reported}" in done.stdout
