"""The reference pages are made from the code: nothing is missing, nothing is written by hand."""

import dataclasses
import re
import subprocess
import sys

import pytest

import fastlab
from docs import reference
from fastlab import cli, config
from fastlab.models import MODELS


def keys() -> set[str]:
    sections = dataclasses.asdict(config.Config())
    return {f"{section}.{key}" for section, values in sections.items() for key in values}


def test_every_setting_stands_once_in_the_reference():
    headings = re.findall(r"^### `([\w.]+)`", reference.configuration(), re.MULTILINE)
    assert sorted(headings) == sorted(keys())


@pytest.mark.parametrize(
    ("key", "values", "description"),
    [
        ("train.epochs", "a whole number at least 1; default: `100`", ""),
        ("optim.eps", "a number above 0; default: `1e-08`", ""),
        ("augment.flip", "true or false; default: `false`", "Flip horizontally with"),
        ("data.path", 'a string; default: `"data/tiny-imagenet"`', "Dataset directory that"),
        ("evaluate.tta", 'one of "none", "flip"; default: `"none"`', "Test-time augmentation"),
        ("train.image_size", "pairs [share of the epochs, side]", "Progressive resizing"),
    ],
)
def test_a_setting_has_its_values_default_and_description(key, values, description):
    entry = reference.configuration().partition(f"### `{key}`")[2].partition("\n#")[0]
    assert values in entry and description in entry
    if not description:
        assert len(entry.split("\n\n")) == 2 or not entry.split("\n\n")[2].strip()


def test_the_help_of_every_command_is_its_reference():
    page = reference.commands()
    assert re.findall(r"^## fastlab (\S+)", page, re.MULTILINE) == list(cli.COMMANDS)
    done = subprocess.run(
        [sys.executable, "-m", "fastlab", "predict", "--help"], capture_output=True, text=True
    )
    options = re.findall(r"^  (-.*?)(?:  |$)", done.stdout, re.MULTILINE)
    entry = page.partition("## fastlab predict")[2].partition("\n##")[0]
    assert len(options) > 5 and all(option in entry for option in options)


class Example:
    """An object, ``documented``."""

    size: int

    @property
    def area(self) -> float:
        """In pixels."""
        return 1.0

    def scaled(self, by: int = 2, fit: str = "crop") -> "Example":
        """Larger."""
        return self

    def _hidden(self) -> None:
        """No part of the interface."""


def test_public_functions_and_classes_stand_in_the_reference(monkeypatch):
    monkeypatch.setattr(fastlab, "__all__", ["Example", "UserError", "__version__"], raising=False)
    monkeypatch.setattr(fastlab, "Example", Example, raising=False)
    monkeypatch.setattr(fastlab, "UserError", config.UserError, raising=False)
    page = reference.python()
    assert "Example.area: float" in page and "In pixels." in page
    assert "Example.scaled(self, by: int = 2, fit: str = 'crop') -> Example" in page
    assert "An object, `documented`." in page and "## `UserError`" in page
    assert "hidden" not in page and "__version__" not in page


def test_built_in_models_are_named_in_the_reference():
    entry = reference.configuration().partition("### `model.name`")[2].partition("\n#")[0]
    assert all(name in entry for name in MODELS)
