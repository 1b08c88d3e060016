"""Trained runs to export, and the blocks of Python that tell how to load what comes of them."""

import re
import shutil
from pathlib import Path

import pytest

from fastlab.cli import main
from tests.trainings import ROOT, command

RUNS = {"resnet": (), "cnn": ("model.name=cnn8",)}


@pytest.fixture(scope="package")
def trained(synth_dataset, tmp_path_factory) -> Path:
    """A folder in which trainings in fp32 were started, on its dataset ``data``: the
    runs of `RUNS`, and ``seed1``, whose figures are those of another seed."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "data").symlink_to(synth_dataset)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, overrides in RUNS.items():
            sets = ("train.epochs=6", "model.width=8", "train.ema=0.2", *overrides)
            assert main(["train", *command(Path("data"), Path(name), *sets)]) == 0
    seed1 = shutil.copytree(folder / "resnet", folder / "seed1")
    for name, old, new in (("config.toml", "seed = 0", "seed = 1"), ("metrics.jsonl", "0.", "0.0")):
        (seed1 / name).write_text((seed1 / name).read_text().replace(old, new))
    return folder


@pytest.fixture
def folder(trained, monkeypatch) -> Path:
    """The folder of `trained`, as the working directory."""
    monkeypatch.chdir(trained)
    return trained


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def documented(what: str) -> str:
    """The one block of docs/export.md that contains `what`."""
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    (block,) = (each for each in python_blocks(text) if what in each)
    return block
