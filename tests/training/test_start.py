"""Mistakes in a configuration are reported before torch is imported, which takes seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = [sys.executable, str(ROOT / "fastlab/train.py")]
COMMANDS = {"script": SCRIPT, "fastlab train": [sys.executable, "-m", "fastlab", "train"]}


@pytest.fixture
def without_torch(tmp_path):
    """An environment in which an import of torch fails."""
    for name in ("torch", "accelerate", "numba"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('was imported')")
    return {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}


def run(command, environment):
    """Returns the exit status and what was written to standard error."""
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert not done.stdout
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "configs/demo.toml", "--set", "epochs=2"], "nearest valid key: train.epochs"),
        (["--config", "nowhere.toml"], "nowhere.toml: cannot be read"),
        (["--resume", "nowhere"], "nowhere: not a run directory"),
        ([], "--config FILE is missing"),
    ],
)
def test_a_mistake_in_the_configuration_is_reported_without_torch(
    command, options, message, without_torch
):
    status, errors = run([*COMMANDS[command], *options], without_torch)
    assert status == 2
    assert errors.startswith("fastlab: ") and len(errors.splitlines()) == 1
    assert message in errors


@pytest.mark.parametrize("command", COMMANDS)
def test_without_a_mistake_torch_is_imported(command, without_torch):
    _, errors = run([*COMMANDS[command], "--config", "configs/demo.toml"], without_torch)
    assert errors == "was imported\n"


def test_a_module_of_fastlab_hides_no_package_of_its_name(without_torch, tmp_path):
    """Python puts the folder of a script, fastlab's own, before all others."""
    say = "import importlib.util as u; raise SystemExit(str(u.find_spec('run_records')))"
    (tmp_path / "torch" / "__init__.py").write_text(say)
    _, errors = run([*SCRIPT, "--config", "configs/demo.toml"], without_torch)
    assert errors == "None\n"


def test_of_several_processes_only_the_first_reports_a_mistake(without_torch):
    command = [*SCRIPT, "--config", "nowhere.toml"]
    assert run(command, {**without_torch, "RANK": "0"})[0] == 2
    assert run(command, {**without_torch, "RANK": "1"}) == (1, "was imported\n")
