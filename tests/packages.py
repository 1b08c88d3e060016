"""Optional packages: whether one is installed, and how to import it anew."""

import importlib.util
import sys

import pytest


def has(package: str) -> bool:
    """Whether `package` is installed, which may be a subpackage: torch installs ``nvidia`` without
    ``nvidia.dali``."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package around a subpackage
        return False


def forget(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the next import of `package` run it anew; the end of the test forgets the result."""
    monkeypatch.setitem(sys.modules, package, None)
    del sys.modules[package]
