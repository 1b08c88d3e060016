"""Shared fixtures: small generated originals with the dataset that they are converted to, and the
command."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from coverage import Coverage

from fastlab.cli import main
from fastlab.dataset.convert import Options, convert
from fastlab.dataset.synth import synthesise
from tests.s3 import s3  # noqa: F401  (a fixture)

# Under nohup, or in the background of a shell, the commands that tests start would inherit that
# these are ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def without_coverage(monkeypatch) -> Iterator[None]:
    """Measure no coverage in a test and in the commands that it starts. It takes a fifth of the
    time of a command, and half of that of a kernel in Triton's interpreter; a command that is
    killed, or whose disk is full, cannot record it."""
    for name in [name for name in os.environ if name.startswith("COVERAGE_PROCESS")]:
        monkeypatch.delenv(name)
    measuring = Coverage.current()
    if measuring:
        measuring.stop()
    yield
    if measuring:
        measuring.start()


@pytest.fixture
def fastlab(capsys):
    """Run a command: (exit status, standard output, lines of standard error)."""

    def call(*arguments: object) -> tuple[int, str, list[str]]:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return status, out, err.splitlines()

    return call


@pytest.fixture(scope="session")
def synth_source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "synth"
    synthesise(path, classes=4, per_class=20)
    return path


@pytest.fixture(scope="session")
def synth_dataset(synth_source, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dataset") / "synth"
    convert(synth_source, path, Options())
    return path
