"""Which optional packages are here."""

import importlib.util


def has(package: str) -> bool:
    """Also of a part of one: torch brings ``nvidia`` without ``nvidia.dali``."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # what it would be a part of
        return False
