import argparse
import math
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

from benchmarks import (
    tables,
    timing,
    training,
    training_process,
)
from benchmarks.measurements import (
    Record,
    load,
    new_session,
    save,
)
from fastlab import config as configs
from fastlab.console import UserError
from fastlab.runs import RunDir
from pipelines.base import Batch

ROOT = Path(__file__).parents[2]

LIMITS = {"matmul_fp32": 1e12, "matmul_bf16": 1e12}


class FakeProcess(training.Process):
    """A process in which every case takes the same time, but those in bf16 fail."""

    asked: ClassVar[list] = []
    cut = 99
    """It is interrupted after so many requests."""

    def _start(self):
        self.asked.append("start")
        return SimpleNamespace(kill=lambda: None)

    def _exchange(self, child, request):
        if len([name for name in self.asked if name != "start"]) == self.cut:
            raise KeyboardInterrupt
        _, variant, _ = request
        self.asked.append(variant)
        if "bf16" in variant:
            return {"problem": "no bf16 here"}
        once = {"flop": 1.0, "memory": None, "compile": 0.0, "steps": 3}
        return {"rate": 10.0, "each": {"held": 11.0, "stall": 0.1}, "once": once}

    def _end(self):
        self._child = None


@pytest.fixture
def process(monkeypatch):
    monkeypatch.setattr(FakeProcess, "asked", [])
    monkeypatch.setattr(training, "Process", FakeProcess)
    return FakeProcess


def arguments_of(dataset, *more: str) -> list[str]:
    demo = str(ROOT / "configs" / "demo.toml")
    sets = ["--set", f"data.path={dataset}", "--set", "model.width=4"]
    return ["--config", demo, "--batches", "8", *sets, *more]


def test_an_interrupted_training_measures_only_the_rest(
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
    session = load(out)
    assert [r.case for r in session.records] == [f"demo, {v}, batch 8" for v in (one, two)]
    assert [record.details["call"] for record in session.records] == [[1, 2], [2, 3]]
    assert all(len(record.rounds) == 2 for record in session.records) and len(session.calls) == 3
    assert tables.origin(session).endswith("over 2 rounds, in 3 parts.")
    assert list(out.parent.iterdir()) == [out]


def test_rounds_of_variants_alternate_in_one_process(synth_dataset, monkeypatch, process):
    monkeypatch.setattr(training.ceilings, "measure", lambda device: LIMITS)
    arguments = ["--variants", "eager fp32;compiled fp32", "--rounds", "2"]
    assert training.main(arguments_of(synth_dataset, *arguments)) == 0
    assert process.asked == ["start", *["eager fp32", "compiled fp32"] * 2]


def test_a_case_that_fails_later_loses_its_rounds_and_the_others_continue(
    synth_dataset, tmp_path, monkeypatch, process, capsys
):
    out, exchange = tmp_path / "training.json", process._exchange

    def second_time(self, child, request):
        if request[1] == "eager fp32" and self.asked.count("eager fp32") == 2:
            self.asked.append("failed")
            return {"problem": "diverged: x"}
        return exchange(self, child, request)

    monkeypatch.setattr(process, "_exchange", second_time)
    monkeypatch.setattr(training.ceilings, "measure", lambda device: LIMITS)
    arguments = ["--variants", "eager fp32;compiled fp32", "--rounds", "3", "--out", str(out)]
    assert training.main(arguments_of(synth_dataset, *arguments)) == 0
    (record,) = load(out).records
    assert record.case == "demo, compiled fp32, batch 8" and len(record.rounds) == 3
    assert process.asked[-3:] == ["failed", "start", "compiled fp32"]
    assert capsys.readouterr().err == "skipped demo, eager fp32, batch 8: diverged: x\n"


def test_ceilings_come_from_a_record_of_the_same_device(
    synth_dataset, tmp_path, monkeypatch, process, capsys
):
    record, out = tmp_path / "ceilings.json", tmp_path / "training.json"
    made = new_session("ceilings", [Record(name, "FLOP/s", [v]) for name, v in LIMITS.items()])
    save(made, record)
    arguments = ["--variants", "eager fp32", "--ceilings", str(record), "--out", str(out)]
    assert training.main(arguments_of(synth_dataset, *arguments)) == 0
    assert load(out).records[0].details["limits"] == LIMITS
    save(replace(made, machine={**made.machine, "gpus": ["another"]}), record)
    out.unlink()
    assert training.main(arguments_of(synth_dataset, *arguments)) == 2
    assert capsys.readouterr().err.endswith("ceilings.json: measured on another\n")


def test_the_flop_of_resnet11_are_those_counted_by_hand():
    """2.218 GFLOP for each image in training, computed from the layers' shapes."""
    cfg = configs.load(None, ["train.compile=false"])
    assert training_process.flop_per_image(cfg, 200, 64) == pytest.approx(2.218e9, rel=5e-4)


STEP, ORDER = 1 / 128, 1 / 16


@pytest.fixture
def variant(monkeypatch):
    """A variant with a clock that each step moves by `STEP` and the beginning of each epoch by
    `ORDER`; the first two steps, which compile and record, take longer."""
    clock, done, epochs = [0.0], [], []
    batch = Batch(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.ones(1))

    class Step:
        def __init__(self):
            self.diverged = torch.zeros(1, dtype=torch.int64)

        def __call__(self, batch):
            done.append(batch)
            clock[0] += {1: 30.0, 2: 1.0}.get(len(done), STEP)
            self.diverged.fill_(0 if math.isfinite(trainer.loss) else len(done))

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
    monkeypatch.setattr(timing, "time", fake)
    cfg = configs.load(None, ["train.precision=fp32", "train.batch_size=1"])
    return lambda steps=None: training_process.Measured(cfg, None, steps)


def test_a_round_includes_the_beginnings_of_its_epochs(variant):
    measured = variant().measure(epochs=2)
    assert measured["rate"] == 80 / (80 * STEP + 2 * ORDER)
    assert measured["each"] == {"held": 128, "stall": 1 - STEP / (STEP + ORDER / 40)}
    once = measured["once"]
    assert once["compile"] == 30 + ORDER - STEP and once["held_steps"] == 20
    assert (once["epochs"], once["steps"], once["steps_of_epoch"]) == (2, 40, 40)


def test_the_first_steps_of_each_epoch_can_be_taken_alone(variant):
    tried = variant(steps=10)
    before = len(tried.trainer.epochs)
    measured = tried.measure(epochs=2)
    assert tried.trainer.epochs[before:] == [before, before + 1]
    assert measured["rate"] == 20 / (20 * STEP + 2 * ORDER)
    assert (measured["once"]["steps"], measured["once"]["steps_of_epoch"]) == (10, 40)


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
        overrides=[f"data.path={dataset}", "model.width=4", *more],
        epochs=1,
        steps=2,
        traces=tmp_path / "traces",
    )
    demo = ROOT / "configs" / "demo.toml"
    return training_process.Answers(args, demo, 8, RunDir(tmp_path))


def test_variants_of_either_precision_train_in_one_process_and_are_traced(dataset, tmp_path):
    answers = answers_of(dataset, tmp_path)
    for _ in range(2):
        for name in ("eager fp32", "eager bf16"):
            measured = answers("measure", name, "x")
            assert measured["rate"] > 0 and measured["each"]["stall"] < 1
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
def test_rounds_before_a_kill_are_a_record(dataset, tmp_path):
    """SIGTERM comes after the first round; the training process dies too."""
    out, limits = tmp_path / "training.json", tmp_path / "ceilings.json"
    save(new_session("ceilings", [Record(n, "FLOP/s", [v]) for n, v in LIMITS.items()]), limits)
    arguments = ["--variants", "eager fp32", "--steps", "1", "--rounds", "100000"]
    arguments = arguments_of(dataset, *arguments, "--ceilings", str(limits), "--out", str(out))
    command = [sys.executable, "-m", "benchmarks.training", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.terminate()
        assert process.wait(20) == -signal.SIGTERM
    (record,) = load(out).records
    assert 1 <= len(record.rounds) == len(record.details["held"]) < 100000
    assert children
    assert wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))


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
