"""The table of covered modules, and the complaints about it."""

import pytest

from tests.covered import ENOUGH, review

SHARES = {"a.py": 100.0, "b/c.py": ENOUGH - 1.0}


def test_every_module_is_in_the_table_with_its_reason():
    table, complaints = review(SHARES, {"b/c.py": "needs a GPU"})
    assert table.splitlines()[1:] == ["a.py       100%", f"b/c.py      {ENOUGH - 1}%  needs a GPU"]
    assert not complaints


@pytest.mark.parametrize("reasons", [{}, {"b/c.py": "needs a GPU", "gone.py": "deleted"}])
def test_a_missing_reason_and_a_reason_for_no_module_are_complaints(reasons):
    _, complaints = review(SHARES, reasons)
    assert len(complaints) == 1
