import multiprocessing
import os
import shlex
import sys

import pytest
import torch

from benchmarks import (
    measurements,
)
from benchmarks.measurements import (
    Record,
    Results,
    Round,
    child_result,
    interleave,
    load,
    new_session,
    receive,
    save,
)
from fastlab.console import UserError


def test_median_and_spread():
    record = Record("case", "images/s", [90.0, 100.0, 120.0])
    assert record.median == 100 and record.spread == pytest.approx(0.15)


def test_a_session_carries_what_made_it_and_survives_saving(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--rounds", "3"])
    made = new_session("loaders", [Record("case, 1", "images/s", [1.0], {"cores": 1})])
    save(made, tmp_path / "new" / "records.json")
    assert load(tmp_path / "new" / "records.json") == made
    assert made.command == "python -m benchmarks.loaders --rounds 3"
    assert made.versions["torch"] == torch.__version__.partition("+")[0]
    assert made.machine["cores"] >= 1 and made.date.startswith("20")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["records.json"]


def test_a_saved_record_names_no_place_outside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    details = {
        "config": f'path = "{tmp_path}/data/tiny"\n# after a line: \n/some/where/else',
        "files": [{"/some/where/trace.json": "at /some/where/train.py:7"}],
        "rate": 2.5,
    }
    made = new_session("loaders", [Record("read /some/where/data", "images/s", [1.0], details)])
    save(made, tmp_path / "records.json")
    (record,) = load(tmp_path / "records.json").records
    assert record.case == "read data" and record.rounds == [1.0]
    assert record.details == {
        "config": 'path = "data/tiny"\n# after a line: \nelse',
        "files": [{"trace.json": "at train.py:7"}],
        "rate": 2.5,
    }


def test_rounds_are_interleaved_and_warm_up_is_not_kept():
    calls = []

    def case(name):
        calls.append(name)
        return Round(float(len(calls)), {"each": name}, {"once": len(calls)})

    results = Results("x", None)
    cases = {"a": lambda: case("a"), "b": lambda: case("b")}
    assert interleave(cases, 2, results, warmup=1) == {}
    assert calls == ["a", "b"] * 3
    details = {"call": [1, 1]}
    assert results.session.records == [
        Record("a", "images/s", [3.0, 5.0], {"each": ["a", "a"], "once": 5, **details}),
        Record("b", "images/s", [4.0, 6.0], {"each": ["b", "b"], "once": 6, **details}),
    ]
    interleave(cases, 3, results)
    assert calls == ["a", "b"] * 4


def test_a_case_that_fails_loses_its_rounds_and_the_others_continue():
    calls = []

    def fails():
        calls.append("a")
        if len(calls) == 2:
            raise RuntimeError("no memory\nat all")
        return Round(1.0, {}, {})

    results = Results("x", None)
    cases = {"a": fails, "b": lambda: Round(2.0, {}, {})}
    assert interleave(cases, 3, results) == {"a": "no memory"}
    assert calls == ["a", "a"]
    assert [(r.case, r.rounds) for r in results.session.records] == [("b", [2.0] * 3)]


def test_a_failed_process_is_reported_with_its_last_line(capsys):
    with pytest.raises(RuntimeError, match="no_such_module"):
        child_result("no_such_module", [])
    assert "no_such_module" in capsys.readouterr().err


def test_a_failed_process_is_reported_with_its_user_error():
    with pytest.raises(RuntimeError, match=r"^nope: "):
        child_result("benchmarks.loaders", ["nope"])


KEPT = ("place", "memory", "cores", "limit")


@pytest.mark.parametrize("changed", ["argv", "versions", "device", *KEPT])
def test_results_continue_only_with_the_same_origin(changed, tmp_path, monkeypatch):
    """A record names neither its place nor the memory of a rented machine, which grows."""
    out = tmp_path / "x.json"
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(out)])
    Results("x", out).add("case", "s", 1.0, {}, {"limit": 1})
    made = measurements.environment(1)
    monkeypatch.setattr(measurements, "environment", lambda processes: made)
    if changed == "argv":
        monkeypatch.setattr(sys, "argv", ["x", "--seconds", "9", "--out", str(out)])
    if changed == "limit":
        monkeypatch.setattr(sys, "argv", ["x", "--limit", "9", "--out", str(out)])
    if changed == "versions":
        made["versions"]["torch"] = "9"
    if changed == "device":
        made["machine"]["gpus"] = ["another"]
    if changed == "memory":
        made["machine"]["memory_gib"] = 1.0
    if changed == "cores":
        made["machine"]["cores"] += 1
    if changed == "place":
        out = tmp_path / "moved" / "x.json"
        out.parent.mkdir()
        (tmp_path / "x.json").rename(out)
        monkeypatch.setattr(sys, "argv", ["x", "--out", str(out)])
    if changed not in KEPT:
        with pytest.raises(UserError, match="measured by another command, device or version"):
            Results("x", out)
        return
    again = Results("x", out)
    again.add("case", "s", 2.0, {}, {"limit": 2})
    assert load(out).records == [Record("case", "s", [1.0, 2.0], {"call": [1, 2], "limit": 2})]
    assert len(load(out).calls) == 2


def test_a_file_that_is_not_a_record_is_refused_in_one_line(tmp_path):
    out = tmp_path / "x.json"
    out.write_text("[]")
    with pytest.raises(UserError, match=r"x\.json: not a record"):
        Results("x", out)


@pytest.mark.parametrize(
    ("text", "recorded"),
    [
        ("configs/demo.toml", "configs/demo.toml"),
        ("{here}/configs/demo.toml", "configs/demo.toml"),
        ("/some/where/data", "data"),
        ("../data", "../data"),
        ('data.path="/some/where/tiny images"', 'data.path="tiny images"'),
        ("data.path={here}/demo", "data.path=demo"),
        ("--out=/some/out.json", "--out=out.json"),
        ("eager fp32;images/s", "eager fp32;images/s"),
        ("https://example.org/a", "https://example.org/a"),
    ],
)
def test_a_recorded_command_names_no_path_of_this_machine(text, recorded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["training", text.format(here=tmp_path)])
    command = measurements.new_session("training", []).command
    assert shlex.split(command) == ["python", "-m", "benchmarks.training", recorded]


def _leave_a_child(pipe, wakes, sleeps):
    if not os.fork():
        os.close(sleeps)
        os.read(wakes, 1)  # until the test has closed its end
    os._exit(3)


@pytest.mark.multiprocess
def test_the_end_of_a_process_is_noticed_though_its_child_holds_the_pipe():
    fork = multiprocessing.get_context("fork")
    pipe, theirs = fork.Pipe()
    wakes, sleeps = os.pipe()
    process = fork.Process(target=_leave_a_child, args=(theirs, wakes, sleeps))
    process.start()
    theirs.close()
    try:
        with pytest.raises(RuntimeError, match="its process ended with status 3"):
            receive(pipe, process)
    finally:
        os.close(sleeps)
        os.close(wakes)
