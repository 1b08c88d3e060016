"""Scripts of users, written for a test and looked into by the command."""

import itertools
import json
import sys
from collections.abc import Callable
from textwrap import dedent
from typing import Any

import pytest

from fastlab.cli import main

_NUMBERS = itertools.count()
HEAD = """
import time
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

ONES = TensorDataset(torch.ones(400, 3))
"""


@pytest.fixture
def script(tmp_path, monkeypatch) -> Callable[[str], str]:
    """Writes a script below `HEAD`; returns its path, whose name no other test's script has."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(source: str) -> str:
        path = tmp_path / f"script{next(_NUMBERS)}.py"
        path.write_text(HEAD + dedent(source))
        return str(path)

    return write


@pytest.fixture
def look(script, capsys) -> Callable[..., dict[str, Any]]:
    """What the command finds out about `make` and, if the script has one, `step`."""

    def look(source: str, seconds: float = 0.6) -> dict[str, Any]:
        path = script(source)
        step = ["--step", f"{path}:step"] if "def step(" in source else []
        options = ["--seconds", str(seconds), "--json"]
        status = main(["bottleneck", f"{path}:make", *step, *options])
        out, err = capsys.readouterr()
        assert status == 0, err
        return json.loads(out)

    return look


@pytest.fixture
def refusal(script, capsys) -> Callable[..., str]:
    """The line with which the command refuses a script."""

    def refusal(source: str, *options: str, name: str = "make") -> str:
        status = main(["bottleneck", f"{script(source)}:{name}", "--seconds", "0.1", *options])
        out, err = capsys.readouterr()
        assert status == 2 and not out and len(err.splitlines()) == 1, err
        return err

    return refusal
