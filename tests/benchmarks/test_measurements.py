import argparse
import json
import math
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks import (
    agreement,
    convert,
    loaders,
    measurements,
    scaling,
    tables,
    training,
    training_process,
)
from benchmarks.measurements import (
    Record,
    Session,
    in_process,
    interleave,
    load,
    save,
    session,
)
from fastlab import config as configs
from fastlab.console import UserError
from fastlab.dataset.convert import Options
from fastlab.dataset.convert import convert as convert_dataset
from fastlab.dataset.synth import synthesise
from fastlab.runs import RunDir
from pipelines.base import Batch

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def accelerate_is_left_as_it_was():
    """It keeps the precision of a process's first `Accelerator`, for the tests of other modules."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


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


def test_a_saved_record_names_no_place_outside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    details = {
        "config": f'path = "{tmp_path}/data/tiny"\n# after a line: \n/some/where/else',
        "files": [{"/some/where/trace.json": "at /some/where/train.py:7"}],
        "rate": 2.5,
    }
    made = session("loaders", [Record("read /some/where/data", "images/s", [1.0], details)])
    save(made, tmp_path / "records.json")
    (record,) = load(tmp_path / "records.json").records
    assert record.case == "read data" and record.rounds == [1.0]
    assert record.details == {
        "config": 'path = "data/tiny"\n# after a line: \nelse',
        "files": [{"trace.json": "at train.py:7"}],
        "rate": 2.5,
    }


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


LIMITS = {"matmul_fp32": 1e12, "matmul_bf16": 1e12}


class FakeProcess:
    """In place of `training.Process`: every case takes a step a second, but bf16 fails."""

    asked: ClassVar[list] = []
    cut = 99
    """Interrupted after so many requests."""

    def __init__(self, args, case):
        self.asked.append("start")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, what, case):
        if len([name for name in self.asked if name != "start"]) == self.cut:
            raise KeyboardInterrupt
        self.asked.append(case.variant)
        if "bf16" in case.variant:
            raise training.Failed(case, "no bf16 here")
        once = {"flop": 1.0, "memory": None, "compile": 0.0, "steps": 3}
        return {"rate": 10.0, "each": {"held": 11.0, "stall": 0.1}, "once": once}


@pytest.fixture
def process(monkeypatch):
    monkeypatch.setattr(FakeProcess, "asked", [])
    monkeypatch.setattr(training, "Process", FakeProcess)
    return FakeProcess


def arguments_of(dataset, *more: str) -> list[str]:
    found = ["--config", str(ROOT / "configs" / "demo.toml"), "--batches", "8"]
    found += ["--set", f"data.path={dataset}", "--set", "model.width=4"]
    return [*found, *more]


def test_training_that_was_cut_off_measures_only_the_rest(
    synth_dataset, tmp_path, monkeypatch, process
):
    """Three cases, two rounds; the case that fails is tried once a call."""
    out, limits = tmp_path / "new" / "training.json", []
    variants = "eager fp32;eager bf16;compiled fp32"
    arguments = ["--variants", variants, "--rounds", "2", "--out", str(out)]
    arguments = arguments_of(synth_dataset, *arguments)
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    monkeypatch.setattr(
        training.ceilings, "measure", lambda device: limits.append(device) or LIMITS
    )
    for cut, rounds in ((2, [1]), (5, [2, 1])):
        monkeypatch.setattr(process, "cut", cut)
        assert training.main() == 130
        assert [len(record.rounds) for record in load(out).records] == rounds
    monkeypatch.setattr(process, "cut", 99)
    assert training.main() == 0
    one, bad, two = variants.split(";")
    first, second, third = ["start", one, bad, "start"], [bad, "start", two, one], [bad, "start"]
    assert process.asked == [*first, "start", *second, "start", *third, two]
    assert len(limits) == 1
    found = load(out)
    assert [r.case for r in found.records] == [f"demo, {v}, batch 8" for v in (one, two)]
    assert [record.details["call"] for record in found.records] == [[1, 2], [2, 3]]
    assert all(len(record.rounds) == 2 for record in found.records) and len(found.calls) == 3
    assert tables.origin(found).endswith("over 2 rounds, in 3 parts.")
    assert list(out.parent.iterdir()) == [out]


def test_rounds_of_variants_alternate_in_one_process(synth_dataset, monkeypatch, process):
    monkeypatch.setattr(training.ceilings, "measure", lambda device: LIMITS)
    arguments = ["--variants", "eager fp32;compiled fp32", "--rounds", "2"]
    assert training.main(arguments_of(synth_dataset, *arguments)) == 0
    assert process.asked == ["start", *["eager fp32", "compiled fp32"] * 2]


def test_a_case_that_fails_later_loses_its_rounds_and_the_others_go_on(
    synth_dataset, tmp_path, monkeypatch, process, capsys
):
    out, ask = tmp_path / "training.json", process.ask

    def fail(self, what, case):
        if self.asked.count("eager fp32") == 2:
            self.asked.append("failed")
            raise training.Failed(case, "diverged: x")
        return ask(self, what, case)

    def second_time(self, what, case):
        return (fail if case.variant == "eager fp32" else ask)(self, what, case)

    monkeypatch.setattr(process, "ask", second_time)
    monkeypatch.setattr(training.ceilings, "measure", lambda device: LIMITS)
    arguments = ["--variants", "eager fp32;compiled fp32", "--rounds", "3", "--out", str(out)]
    assert training.main(arguments_of(synth_dataset, *arguments)) == 0
    (record,) = load(out).records
    assert record.case == "demo, compiled fp32, batch 8" and len(record.rounds) == 3
    assert process.asked[-3:] == ["failed", "start", "compiled fp32"]
    assert capsys.readouterr().err == "left out: demo, eager fp32, batch 8: diverged: x\n"


def test_ceilings_come_from_a_record_of_the_same_device(
    synth_dataset, tmp_path, monkeypatch, process, capsys
):
    record, out = tmp_path / "ceilings.json", tmp_path / "training.json"
    made = session("ceilings", [Record(name, "FLOP/s", [v]) for name, v in LIMITS.items()])
    save(made, record)
    arguments = ["--variants", "eager fp32", "--ceilings", str(record), "--out", str(out)]
    assert training.main(arguments_of(synth_dataset, *arguments)) == 0
    assert load(out).records[0].details["limits"] == LIMITS
    save(replace(made, machine={**made.machine, "gpus": ["another"]}), record)
    out.unlink()
    assert training.main(arguments_of(synth_dataset, *arguments)) == 2
    assert capsys.readouterr().err.endswith("ceilings.json: measured on another\n")


KEPT = ("place", "memory", "cores", "limit")


@pytest.mark.parametrize("changed", ["argv", "versions", "device", *KEPT])
def test_results_go_on_only_on_what_one_record_can_name(changed, tmp_path, monkeypatch):
    """Where they lie is not named by it, nor is the memory of a rented machine, which grows."""
    out = tmp_path / "x.json"
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(out)])
    measurements.Results("x", out).add("case", "s", 1.0, {}, {"limit": 1})
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
        with pytest.raises(UserError, match="another command, device or version"):
            measurements.Results("x", out)
        return
    again = measurements.Results("x", out)
    again.add("case", "s", 2.0, {}, {"limit": 2})
    assert load(out).records == [Record("case", "s", [1.0, 2.0], {"call": [1, 2], "limit": 2})]
    assert len(load(out).calls) == 2


def test_what_is_no_record_is_told_in_a_line(tmp_path):
    out = tmp_path / "x.json"
    out.write_text("[]")
    with pytest.raises(UserError, match=r"x\.json: no record"):
        measurements.Results("x", out)


@pytest.mark.parametrize(
    ("text", "found"),
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
def test_a_command_names_no_place_outside(text, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["training", text.format(here=tmp_path)])
    command = measurements.session("training", []).command
    assert shlex.split(command) == ["python", "-m", "benchmarks.training", found]


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
    assert training_process.flop_per_image(cfg, 200, 64) == pytest.approx(2.218e9, rel=5e-4)


STEP, ORDER = 1 / 128, 1 / 16


@pytest.fixture
def variant(monkeypatch):
    """By a clock that a step moves by `STEP`, and the beginning of an epoch by `ORDER`: compiling,
    then recording, take longer than a step."""
    clock, done, epochs = [0.0], [], []
    batch = Batch(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.ones(1))

    class Step:
        def __call__(self, batch):
            done.append(batch)
            clock[0] += {1: 30.0, 2: 1.0}.get(len(done), STEP)
            trainer.losses.fill_(trainer.loss)

        def batches(self, data, epoch, first, *, capture):
            return data.epoch(epoch)

    def epoch(number):
        epochs.append(number)
        clock[0] += ORDER
        yield from [batch] * 40

    model = torch.nn.Linear(1, 1)
    trainer = SimpleNamespace(
        device=torch.device("cpu"),
        manifest=SimpleNamespace(classes=[], image_size=8),
        train_data=SimpleNamespace(epoch=epoch, steps=lambda: 40),
        model=model,
        net=model,
        loss=1.0,
        losses=torch.zeros(40),
        captures=False,
        step=Step(),
        make_step=Step,
        batches=epoch,
        epochs=epochs,
    )
    monkeypatch.setattr(training_process, "Trainer", lambda *_: trainer)
    monkeypatch.setattr(training_process, "flop_per_image", lambda *_: 0.0)
    fake = SimpleNamespace(perf_counter=lambda: clock[0])
    monkeypatch.setattr(training_process, "time", fake)
    cfg = configs.load(None, ["train.precision=fp32", "train.batch_size=1"])
    return lambda steps=None: training_process.Measured(cfg, None, steps)


def test_a_round_is_whole_epochs_with_what_begins_them(variant):
    found = variant().measure(epochs=2)
    assert found["rate"] == 80 / (80 * STEP + 2 * ORDER)
    assert found["each"] == {"held": 128, "stall": 1 - STEP / (STEP + ORDER / 40)}
    once = found["once"]
    assert once["compile"] == 30 + ORDER - STEP and once["held_steps"] == 20
    assert (once["epochs"], once["steps"], once["steps_of_epoch"]) == (2, 40, 40)


def test_the_first_steps_of_each_epoch_can_be_taken_alone(variant):
    tried = variant(steps=10)
    before = len(tried.trainer.epochs)
    found = tried.measure(epochs=2)
    assert tried.trainer.epochs[before:] == [before, before + 1]
    assert found["rate"] == 20 / (20 * STEP + 2 * ORDER)
    assert (found["once"]["steps"], found["once"]["steps_of_epoch"]) == (10, 40)


@pytest.mark.parametrize("what", ["loss", "weight"])
def test_a_variant_that_diverged_is_refused(variant, what):
    tried = variant()
    tried.measure(epochs=1)
    if what == "loss":
        tried.trainer.loss = math.nan
    else:
        torch.nn.init.constant_(tried.trainer.model.weight, math.inf)
    with pytest.raises(UserError, match=f"diverged: a {what} is not a finite number"):
        tried.measure(epochs=1)


def answers_of(dataset, tmp_path, *more: str) -> training_process.Answers:
    args = argparse.Namespace(
        config=ROOT / "configs" / "demo.toml",
        overrides=[f"data.path={dataset}", "model.width=4", *more],
        batch=8,
        epochs=1,
        steps=2,
        traces=tmp_path / "traces",
    )
    return training_process.Answers(args, RunDir(tmp_path))


def test_variants_of_either_precision_train_in_one_process_and_are_traced(dataset, tmp_path):
    answers = answers_of(dataset, tmp_path)
    for _ in range(2):
        for name in ("eager fp32", "eager bf16"):
            found = answers("measure", name, "x")
            assert found["rate"] > 0 and found["each"]["stall"] < 1
    dtypes = [v._batch.images.dtype for v in answers._variants.values()]
    assert dtypes == [torch.float32, torch.bfloat16]
    assert answers("trace", "eager fp32", "case") == {}
    (trace,) = (tmp_path / "traces" / "case" / "traces").iterdir()
    assert trace.name.endswith(".pt.trace.json") and trace.stat().st_size < 8e6
    written = (tmp_path / "traces" / "case" / "config.toml").read_text()
    assert f'path = "{dataset.name}"' in written


@pytest.mark.slow
def test_variants_that_take_turns_are_not_compiled_again(dataset, tmp_path):
    answers, graphs = answers_of(dataset, tmp_path), []
    names = ("compiled fp32", "eager bf16")  # each sets what the other is guarded by
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(3):
        for name in names:
            answers("measure", name, "x")
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
    assert graphs == [2, 2, 2]  # the model, and the loss with the metrics


@pytest.mark.slow
@pytest.mark.multiprocess
def test_training_steps_are_measured_and_a_diverged_case_is_not(
    dataset, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(training.ceilings, "measure", lambda device: LIMITS)
    monkeypatch.chdir(ROOT)
    out = tmp_path / "training.json"
    common = ["--variants", "eager fp32", "--steps", "2", "--rounds", "2", "--out", str(out)]
    assert training.main(arguments_of(dataset, *common)) == 0
    (record,) = load(out).records
    details = record.details
    assert len(record.rounds) == len(details["held"]) == len(details["stall"]) == 2
    assert min(record.rounds + details["held"]) > 0 and max(details["stall"]) < 1
    assert details["steps"] == 2 < details["steps_of_epoch"] == 40
    share = record.median * details["flop"] / 1e12
    assert f"| {share:.1%} |" in training.table(load(out))
    out.unlink()
    assert training.main(arguments_of(dataset, *common, "--set", "optim.lr=1e30")) == 2
    assert "eager fp32, batch 8: diverged: a " in capsys.readouterr().err
    assert not out.exists() or not load(out).records


@pytest.mark.slow
@pytest.mark.multiprocess
def test_what_was_measured_before_a_kill_is_a_record(dataset, tmp_path):
    """SIGTERM comes after the first round; the process that trains dies too."""
    out, limits = tmp_path / "training.json", tmp_path / "ceilings.json"
    save(session("ceilings", [Record(n, "FLOP/s", [v]) for n, v in LIMITS.items()]), limits)
    arguments = ["--variants", "eager fp32", "--steps", "1", "--rounds", "100000"]
    arguments = arguments_of(dataset, *arguments, "--ceilings", str(limits), "--out", str(out))
    command = [sys.executable, "-m", "benchmarks.training", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.terminate()
        assert process.wait(20) == -signal.SIGTERM
    (record,) = load(out).records
    assert 1 <= len(record.rounds) == len(record.details["held"]) < 100000
    assert wait_until(lambda: not Path(f"/proc/{child}").exists())


def wait_until(condition, seconds=20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_compiling_alone_leaves_no_record(dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "training.json"
    arguments = ["--variants", "eager fp32", "--compile-only", "--out", str(out)]
    assert training.main(arguments_of(dataset, *arguments)) == 0
    assert capsys.readouterr().out.startswith("demo, eager fp32, batch 8: compiled in ")
    assert not out.exists()


def test_the_rounds_of_a_table_are_those_of_its_records():
    made = session("x", [Record("a", "s", [1.0, 2.0]), Record("b", "s", [1.0])])
    assert tables.origin(made).endswith("over 1 or 2 rounds.")


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
