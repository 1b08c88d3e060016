"""Triton's interpreter for the tests of the kernels."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from tests.models import triton_kernels


@pytest.fixture(scope="session")
def interpreted() -> SimpleNamespace:
    return triton_kernels.interpreted()


@pytest.fixture
def kernels(interpreted, without_coverage) -> Iterator[SimpleNamespace]:
    """The modules of the kernels; until the test ends, the operators run them in Triton's
    interpreter."""
    with triton_kernels.running(interpreted):
        yield interpreted
