import json

import pytest

from benchmarks import (
    tables,
)
from benchmarks.measurements import (
    Record,
    Session,
    new_session,
    save,
)
from fastlab.console import UserError


def test_a_table_states_the_numbers_of_rounds_of_its_records():
    made = new_session("x", [Record("a", "s", [1.0, 2.0]), Record("b", "s", [1.0])])
    assert tables.origin(made).endswith("over 1 or 2 rounds.")


def test_a_page_is_rewritten_from_the_records(tmp_path, monkeypatch):
    made = new_session("scaling", [Record("1 processes", "images/s", [5.0], {"processes": 1})])
    save(made, tmp_path / "benchmarks" / "results" / "here" / "scaling.json")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: here/scaling -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.update(page, write=False) and "old" in page.read_text()
    assert tables.update(page, write=True)
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert "| 1 | 5 ± 0% | 100.0% (100.0% to 100.0%) |" in lines
    assert any(json.dumps(made.machine["cpu"])[1:-1] in line for line in lines)
    assert not tables.update(page, write=True)


def test_two_records_give_the_table_of_their_agreement(tmp_path, monkeypatch):
    for name, second in (("one", 8.0), ("two", 9.0)):
        records = [
            Record(f"{n} processes", "images/s", [rate, rate], {"processes": n})
            for n, rate in ((1, 5.0), (2, second))
        ]
        save(new_session("scaling", records), tmp_path / "benchmarks" / "results" / f"{name}.json")
    page = tmp_path / "page.md"
    page.write_text("<!-- table: one two -->\n<!-- end -->\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.update(page, write=True)
    assert "| 2 processes | 1.600 ± 0% | 1.800 ± 0% | NO |" in page.read_text().splitlines()


@pytest.mark.parametrize("page", tables.PAGES)
def test_the_tables_of_the_pages_are_up_to_date(page):
    assert not tables.update(tables.ROOT / page, write=False), "run python -m benchmarks.tables"


def a_run(**rounds: list[float]) -> Session:
    records = [Record(case, "images/s", values) for case, values in rounds.items()]
    return Session("loaders", records, "", "", {}, {})


def test_runs_agree_by_the_ratios_to_their_first_cases():
    # The second machine is twice as fast; the ratios are the same except for the last case.
    first = a_run(limit=[100, 110, 90], half=[50, 55, 46], tenth=[10, 11, 9])
    second = a_run(limit=[200, 220, 180], half=[101, 110, 90], tenth=[30, 33, 27])
    half, tenth = tables.compare(first, second)
    assert half.first.median == pytest.approx(0.5)
    assert half.first.spread == pytest.approx((46 / 90 - 0.5) / 2 / 0.5)
    assert half.agrees
    assert not tenth.agrees
    rows = tables.agreement_table([half, tenth]).splitlines()[2:]
    assert [row.split("|")[-2].strip() for row in rows] == ["yes", "NO"]


def test_runs_of_different_benchmarks_are_not_compared(tmp_path, capsys):
    with pytest.raises(UserError, match="same first case"):
        tables.compare(a_run(limit=[1.0]), a_run(other=[1.0]))
    assert tables.main(["--agreement", str(tmp_path / "none"), str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_exit_status_shows_whether_runs_agree(tmp_path, capsys):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    save(a_run(limit=[100, 110], half=[50, 55]), first)
    save(a_run(limit=[100, 110], half=[70, 77]), second)
    for other, status in ((first, 0), (second, 1)):
        assert tables.main(["--agreement", str(first), str(other)]) == status
    assert "| half | 0.500 ± 0% | 0.700 ± 0% | NO |" in capsys.readouterr().out
