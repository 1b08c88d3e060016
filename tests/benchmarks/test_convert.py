import sys

import pytest

from benchmarks import (
    convert,
)
from benchmarks.measurements import (
    load,
)


@pytest.mark.multiprocess
def test_conversion_is_measured(originals, tmp_path, monkeypatch, capsys):
    out = tmp_path / "convert.json"
    arguments = [str(originals), "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["x", *arguments, "--scratch", str(tmp_path / "scratch")])
    convert.main()
    loaded = load(out)
    assert loaded["decode"].details["images"] == 4 * 80 + 4 * 16  # a fifth as many for val
    assert all(rate > 0 for record in loaded.records for rate in record.rounds)
    assert "| convert directory |" in convert.table(loaded)
    assert not (tmp_path / "scratch").exists()
