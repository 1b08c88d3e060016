"""The cache of torch.compile: private to its user, of whole files, and not needed to train."""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fastlab.compiling import _wrapped, cache_folder
from fastlab.console import UserError
from tests.trainings import ROOT, command


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The folder for temporary files; no cache is chosen."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def compiler(folder: Path, *then: str) -> Path:
    """A compiler in `folder` that writes half of its output, and then does `then`."""
    folder.mkdir()
    lines = ('while [ "$1" != -o ]; do shift; done', 'printf half > "$2"', *then)
    path = folder / "g++"
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def test_a_compiler_that_is_killed_leaves_no_half_of_its_output(tmp_path):
    killed = _wrapped(str(compiler(tmp_path / "bin", "kill -9 $$")), tmp_path)
    out = tmp_path / "kernel.so"
    done = subprocess.run([killed, "kernel.cpp", "-shared", "-o", out, "-lm"])
    assert done.returncode == 128 + signal.SIGKILL and not out.exists()


def test_a_complete_output_gets_its_name(tmp_path):
    words = shlex.join(["env", "A=b c", str(compiler(tmp_path / "bin", 'printf whole >> "$2"'))])
    out = tmp_path / "with a space.so"
    subprocess.run([_wrapped(words, tmp_path), "a.cpp", "-o", out, "-lm"], check=True)
    assert out.read_text() == "halfwhole" and not list(tmp_path.glob("*.partial"))


def test_the_cache_is_a_folder_of_this_user_alone(temporary, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(temporary / "torchinductor_someone"))
    folder = cache_folder()  # not what torch sets by itself
    assert folder == temporary / f"fastlab-{os.getuid()}" and folder.stat().st_mode & 0o777 == 0o700
    assert cache_folder() == folder


def test_a_folder_that_another_user_prepared_is_refused(temporary, monkeypatch):
    cache_folder()
    other = os.getuid() + 1
    (temporary / f"fastlab-{os.getuid()}").rename(temporary / f"fastlab-{other}")
    monkeypatch.setattr(os, "getuid", lambda: other)
    with pytest.raises(UserError, match="others can write there"):
        cache_folder()


def test_a_link_in_place_of_the_folder_is_refused(temporary):
    (temporary / "elsewhere").mkdir()
    (temporary / f"fastlab-{os.getuid()}").symlink_to(temporary / "elsewhere")
    with pytest.raises(UserError, match="others can write there"):
        cache_folder()


def test_a_chosen_folder_is_used_unless_everybody_can_write_there(temporary, monkeypatch):
    chosen = temporary / "chosen" / "folder"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(chosen))
    assert cache_folder() == chosen and chosen.is_dir()
    chosen.chmod(0o777)
    with pytest.raises(UserError, match="others can write there"):
        cache_folder()


def test_without_a_compiler_a_training_is_eager_and_says_so(synth_dataset, tmp_path):
    sets = ("train.compile=true", "train.epochs=1")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "fastlab",
            "train",
            *command(synth_dataset, tmp_path / "run", *sets),
        ],
        env={**os.environ, "PATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        "fastlab: train.compile = true needs a C++ compiler; install g++ to use it; continuing "
        "without compiling"
    ]
