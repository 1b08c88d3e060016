"""Which optional packages are here."""

import importlib.util
import sys

import pytest


def has(package: str) -> bool:
    """Also of a part of one: torch brings ``nvidia`` without ``nvidia.dali``."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # what it would be a part of
        return False


def forget(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the next import of `package` begin anew; what it imports is forgotten with the test."""
    monkeypatch.setitem(sys.modules, package, None)
    del sys.modules[package]
