"""Fixtures of the benchmarks' tests: a generated dataset of 320 training images."""

import pytest
from accelerate.state import AcceleratorState

from fastlab.dataset.convert import Options
from fastlab.dataset.convert import convert as convert_dataset
from fastlab.dataset.synth import synthesise


@pytest.fixture(autouse=True)
def accelerate_is_reset():
    """Accelerate keeps the precision of a process's first `Accelerator`, also for later tests."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "synth"
    synthesise(path, classes=4, per_class=80)
    return path


@pytest.fixture(scope="session")
def dataset(originals, tmp_path_factory):
    path = tmp_path_factory.mktemp("dataset") / "synth"
    convert_dataset(originals, path, Options(formats=("array", "tar")))
    return path
