import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import agreement, convert, loaders, measurements, scaling, tables, training
from benchmarks.measurements import (
    Journal,
    Record,
    Session,
    in_process,
    interleave,
    load,
    save,
    session,
)
from fastlab import config as configs
from fastlab.dataset.convert import Options
from fastlab.dataset.convert import convert as convert_dataset
from fastlab.dataset.synth import synthesise
from fastlab.models import build
from pipelines.base import Batch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "synth"
    synthesise(path, classes=4, per_class=80)
    return path


@pytest.fixture(scope="module")
def dataset(originals, tmp_path_factory):
    path = tmp_path_factory.mktemp("dataset") / "synth"
    convert_dataset(originals, path, Options(formats=("array", "tar")))
    return path


def test_median_and_spread():
    record = Record("case", "images/s", [90.0, 100.0, 120.0])
    assert record.median == 100 and record.spread == pytest.approx(0.15)


def test_a_session_carries_what_made_it_and_survives_saving(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--rounds", "3"])
    made = session("loaders", [Record("case, 1", "images/s", [1.0], {"cores": 1})])
    save(made, tmp_path / "new" / "records.json")
    assert load(tmp_path / "new" / "records.json") == made
    assert made.command == "python -m benchmarks.loaders --rounds 3"
    assert made.versions["torch"] == torch.__version__.partition("+")[0]
    assert made.machine["cores"] >= 1 and made.date.startswith("20")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["records.json"]


def test_rounds_are_interleaved_and_the_first_is_dropped(capsys):
    calls = []

    def case(name):
        calls.append(name)
        return float(len(calls))

    found = interleave({"a": lambda: case("a"), "b": lambda: case("b")}, rounds=2)
    assert calls == ["a", "b"] * 3 and found == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_a_failing_process_is_told_by_its_last_line():
    with pytest.raises(RuntimeError, match="no_such_module"):
        in_process("no_such_module", [])


def cut_after(cases: int, measured: list[str]):
    """In place of `in_process`: notes each case, and is interrupted after so many."""

    def run(module, arguments):
        if len(measured) == cases:
            raise KeyboardInterrupt
        case = arguments[arguments.index("--case") + 1]
        measured.append(case)
        if "bf16" in case:
            raise RuntimeError("no bf16 here")
        figures = {"flop": 1.0, "memory": 1, "compile": 0.0, "steps": 3}
        return {"rate": 10.0, "held": 11.0, "stall": 0.1, **figures}

    return run


def test_training_that_was_cut_off_measures_only_the_rest(synth_dataset, tmp_path, monkeypatch):
    """Three cases, two rounds; the case that fails is tried once a call."""
    out, measured, limits = tmp_path / "new" / "training.json", [], []
    arguments = ["--config", str(ROOT / "configs" / "demo.toml")]
    arguments += [
        "--set",
        f"data.path={synth_dataset}",
        "--variants",
        "eager fp32;eager bf16;compiled fp32",
    ]
    arguments += ["--batches", "8", "--rounds", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    monkeypatch.setattr(
        training.ceilings,
        "measure",
        lambda device: limits.append(device) or {"matmul_fp32": 1.0, "matmul_bf16": 1.0},
    )
    for cut in (2, 4):
        monkeypatch.setattr(training, "in_process", cut_after(cut, measured))
        assert training.main() == 130
        assert not out.exists()
    monkeypatch.setattr(training, "in_process", cut_after(99, measured))
    assert training.main() == 0
    cases = ["eager fp32, batch 8", "eager bf16, batch 8", "compiled fp32, batch 8"]
    assert measured == [*cases[:2], *cases[1:], cases[1], cases[0], cases[2]] and len(limits) == 1
    found = load(out)
    assert [record.case for record in found.records] == [cases[0], cases[2]]
    assert [record.details["call"] for record in found.records] == [[1, 3], [2, 3]]
    assert all(len(record.rounds) == 2 for record in found.records) and len(found.calls) == 3
    assert tables.origin(found).endswith("over 2 rounds, in 3 parts.")
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("changed", ["argv", "versions", "place"])
def test_a_journal_goes_on_only_on_what_one_record_can_name(changed, tmp_path, monkeypatch):
    """Where the result lies is not named by it."""
    out = tmp_path / "x.json"
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(out)])
    Journal("x", out).measured("case", lambda: [1])
    if changed == "argv":
        monkeypatch.setattr(sys, "argv", ["x", "--seconds", "9", "--out", str(out)])
    if changed == "versions":
        made = measurements.environment(1)
        made["versions"]["torch"] = "9"
        monkeypatch.setattr(measurements, "environment", lambda processes: made)
    if changed == "place":
        out = tmp_path / "moved" / "x.json"
        (tmp_path / "moved").mkdir()
        (tmp_path / "x.json.journal").rename(f"{out}.journal")
        monkeypatch.setattr(sys, "argv", ["x", "--out", str(out)])
    again = Journal("x", out)
    kept = changed == "place"
    assert again.measured("case", lambda: [2]) == ([1] if kept else [2])
    assert again.call("case") == 1 and len(again.calls) == (2 if kept else 1)
    again.finish()
    assert not list(out.parent.glob("*.journal"))


@pytest.mark.multiprocess
def test_conversion_is_measured(originals, tmp_path, monkeypatch, capsys):
    out = tmp_path / "convert.json"
    arguments = [str(originals), "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["x", *arguments, "--scratch", str(tmp_path / "scratch")])
    convert.main()
    found = load(out)
    assert found["decode"].details["images"] == 4 * 80 + 4 * 16  # a fifth as many for val
    assert all(rate > 0 for record in found.records for rate in record.rounds)
    assert "| convert directory |" in convert.table(found)
    assert not (tmp_path / "scratch").exists()


@pytest.mark.multiprocess
@pytest.mark.parametrize("case", ["fastlab resident", "fastlab torchvision", "DataLoader + PIL"])
def test_a_loader_is_measured(originals, dataset, case):
    arguments = [str(dataset), "--originals", str(originals), "--cores", "1"]
    found = in_process("benchmarks.loaders", [*arguments, "--seconds", "0.1", "--case", case])
    assert found["rate"] > 0 and found["batch"] == 256 and found["memory"] > 1e8
    assert 0 < found["cpu"] < 3


def test_the_table_of_loaders_names_what_was_not_measured(monkeypatch):
    def record(name, cores, rate):
        details = {"cores": cores, "cpu": 1.0, "memory": 1e9}
        return Record(f"{name}, {cores}", "images/s", [rate], details)

    limit = "memory gather, no augmentation"
    made = session(
        "loaders", [record(limit, 1, 50.0), record(limit, 2, 100.0), record("x", 2, 25.0)]
    )
    rows = loaders.table(made).splitlines()
    assert rows[2].startswith(f"| {limit} | 50 ± 0% | 100 ± 0% | 100.0% |")
    assert rows[3].startswith("| x | not measured | 25 ± 0% | 25.0% |")


def test_flop_of_resnet11_are_the_computed_ones():
    """2.218 GFLOP an image trained: counted by hand from the layers' shapes (FIELD-NOTES)."""
    cfg = configs.load(None, ["train.compile=false"])
    batch = Batch(torch.zeros(1, 3, 64, 64), torch.zeros(1), torch.ones(1))
    assert build(cfg.model, 200) is not None
    assert training.flop_per_image(cfg, 200, batch) == pytest.approx(2.218e9, rel=5e-4)


def test_steps_that_record_cuda_graphs_do_not_shorten_the_blocks(monkeypatch):
    """By a clock that only steps move: compiling, then recording, take longer than a step."""
    clock, steps, step = [0.0], [], 1 / 128

    def train_step(trainer, batch):
        steps.append(batch)
        clock[0] += {1: 30.0, 2: 1.0}.get(len(steps), step)

    batch = Batch(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.ones(1))
    trainer = SimpleNamespace(
        device=torch.device("cpu"),
        cfg=SimpleNamespace(train=SimpleNamespace(batch_size=1)),
        manifest=SimpleNamespace(classes=[]),
        train_data=SimpleNamespace(epoch=lambda epoch: [batch]),
    )
    monkeypatch.setattr(training, "train_step", train_step)
    monkeypatch.setattr(training, "flop_per_image", lambda *_: 0.0)
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    found = training._measure(trainer, seconds=2 * training._BLOCKS * 16 * step)
    assert found["steps"] == 16 and found["rate"] == found["held"] == 128
    assert found["compile"] == 30 - step


@pytest.mark.slow
@pytest.mark.multiprocess
def test_training_steps_are_measured(dataset):
    arguments = ["--config", "configs/demo.toml", "--set", f'data.path="{dataset}"']
    arguments += ["--seconds", "0.5", "--case", "eager fp32, batch 32"]
    found = in_process("benchmarks.training", arguments)
    assert found["rate"] > 0 and found["held"] > 0 and found["stall"] < 1
    row = Record("eager fp32, batch 32", "images/s", [found["rate"]])
    details = {**found, "held": [found["held"]], "stall": [found["stall"]]}
    details["limits"] = {"matmul_fp32": 1e12, "matmul_bf16": 1e12}
    made = session("training", [Record(row.case, row.unit, row.rounds, details)])
    share = found["rate"] * found["flop"] / 1e12
    assert f"| {share:.1%} |" in training.table(made)


def test_efficiency_is_the_rate_over_as_many_times_the_first():
    records = [
        Record(f"{n} processes", "images/s", [rate], {"processes": n})
        for n, rate in ((1, 100.0), (4, 300.0))
    ]
    assert "| 4 | 300 ± 0% | 75.0% (75.0% to 75.0%) |" in scaling.table(session("scaling", records))


def test_a_page_is_rewritten_from_the_records(tmp_path, monkeypatch):
    made = session("scaling", [Record("1 processes", "images/s", [5.0], {"processes": 1})])
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


def test_two_records_give_the_table_of_their_ratios(tmp_path, monkeypatch):
    for name, second in (("one", 8.0), ("two", 9.0)):
        records = [
            Record(f"{n} processes", "images/s", [rate, rate], {"processes": n})
            for n, rate in ((1, 5.0), (2, second))
        ]
        save(session("scaling", records), tmp_path / "benchmarks" / "results" / f"{name}.json")
    page = tmp_path / "page.md"
    page.write_text("<!-- table: one two -->\n<!-- end -->\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.update(page, write=True)
    assert "| 2 processes | 1.600 ± 0% | 1.800 ± 0% | NO |" in page.read_text().splitlines()


@pytest.mark.parametrize("page", tables.PAGES)
def test_the_tables_of_the_pages_are_current(page):
    assert not tables.update(tables.ROOT / page, write=False), "run python -m benchmarks.tables"


def a_run(**rounds: list[float]) -> Session:
    records = [Record(case, "images/s", values) for case, values in rounds.items()]
    return Session("loaders", records, "", "", {}, {})


def test_runs_agree_by_ratios_to_their_own_first_case():
    # Twice as fast a machine, the same ratios but for the last case.
    first = a_run(limit=[100, 110, 90], half=[50, 55, 46], tenth=[10, 11, 9])
    second = a_run(limit=[200, 220, 180], half=[101, 110, 90], tenth=[30, 33, 27])
    half, tenth = agreement.compare(first, second)
    assert half.first.median == pytest.approx(0.5)
    assert half.first.spread == pytest.approx((46 / 90 - 0.5) / 2 / 0.5)
    assert half.agrees
    assert not tenth.agrees
    rows = agreement.table([half, tenth]).splitlines()[2:]
    assert [row.split("|")[-2].strip() for row in rows] == ["yes", "NO"]


def test_runs_of_different_kinds_are_not_compared(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="same first case"):
        agreement.compare(a_run(limit=[1.0]), a_run(other=[1.0]))
    monkeypatch.setattr(sys, "argv", ["agreement", str(tmp_path / "none"), str(tmp_path)])
    assert agreement.main() == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_command_says_by_its_status_whether_runs_agree(tmp_path, monkeypatch, capsys):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    save(a_run(limit=[100, 110], half=[50, 55]), first)
    save(a_run(limit=[100, 110], half=[70, 77]), second)
    for other, status in ((first, 0), (second, 1)):
        monkeypatch.setattr(sys, "argv", ["agreement", str(first), str(other)])
        assert agreement.main() == status
    assert "| half | 0.500 ± 0% | 0.700 ± 0% | NO |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.multiprocess
def test_scaling_measures_each_number_of_processes(dataset, tmp_path):
    out = tmp_path / "scaling.json"
    command = [sys.executable, "-m", "benchmarks.scaling", "--config", "configs/demo.toml"]
    command += ["--set", f"data.path={dataset}", "--set", "model.width=4", "--batch", "16"]
    command += ["--processes", "1,2", "--seconds", "0.2", "--rounds", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    one, two = load(out).records
    assert (one.details["processes"], two.details["processes"]) == (1, 2)
    assert one.details["cores"] == two.details["cores"]  # of each process, or it is no comparison
    assert len(one.rounds) == len(two.rounds) == 1 and min(one.rounds + two.rounds) > 0
    assert scaling.table(load(out)) in done.stdout
