import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.measurements import Record, Results, Session, checkout, load, save
from benchmarks.records import clock, energy, leaderboard, reference, sixty, sixty_six
from fastlab import config as configs
from fastlab import models
from fastlab.runs import RunDir
from fastlab.train import Trainer
from fastlab.training.setup import make_accelerator

ROOT = Path(__file__).parents[2]
SMALL = (
    "model.width=4",
    "train.batch_size=16",
    "train.eval_batch_size=16",
    "train.epochs=2",
    "train.ema=0.9",
    "train.compile=false",
    "train.precision=fp32",
)


@pytest.fixture
def cfg(synth_dataset):
    demo = ROOT / "configs" / "demo.toml"
    return configs.load(demo, [*SMALL, f"data.path={synth_dataset}"])


@pytest.fixture
def trainer(cfg, tmp_path):
    return Trainer(cfg, RunDir(tmp_path), make_accelerator(cfg))


def race(cfg, target, runs, out=None, deadline=math.inf):
    results = Results("records.clock", out, "records.reference")
    clock.race(cfg, target, runs, results, deadline)
    return results.session


def test_the_clock_stops_at_the_target_and_every_run_is_kept(cfg):
    easy, hard = race(cfg, 0.0, 3), race(cfg, 1.01, 1)
    runs = easy.records[0].details["runs"]
    assert [len(run["top1"]) for run in runs] == [1, 1, 1] and all(run["reached"] for run in runs)
    missed = hard.records[0].details["runs"][0]
    assert not missed["reached"] and not missed["stopped"] and len(missed["top1"]) == 2
    assert missed["curve_seconds"] == sorted(missed["curve_seconds"])
    assert missed["curve_seconds"][-1] == hard.records[0].rounds[0]
    assert "3 of 3" in clock.table(easy)
    assert "0 of 1 | not reached | not reached |" in clock.table(hard)
    assert "benchmarks.records.reference" in easy.command and easy.benchmark == "records.clock"


def test_an_interrupted_race_does_only_the_remaining_seeds(cfg, tmp_path, monkeypatch):
    done, run, out = [], clock.timed, tmp_path / "x.json"

    def cut(trainer, seed, *rest):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(seed)
        return run(trainer, seed, *rest)

    monkeypatch.setattr(clock, "timed", cut)
    with pytest.raises(KeyboardInterrupt):
        race(cfg, 0.0, 3, out)
    assert len(load(out).records[0].rounds) == 2
    monkeypatch.setattr(clock, "timed", lambda *rest: done.append(rest[1]) or run(*rest))
    race(cfg, 0.0, 3, out)
    (record,), calls = load(out).records, load(out).calls
    assert done == [0, 1, 2]
    assert record.details["call"] == [1, 1, 2] and len(record.details["runs"]) == 3
    assert len(record.rounds) == 3 and len(calls) == 2
    assert cfg.data.path not in record.details["config"]


def test_a_run_stops_after_an_epoch_at_the_deadline_and_none_begins_after_it(cfg, monkeypatch):
    run = clock.timed
    now = time.monotonic()
    monkeypatch.setattr(clock, "timed", lambda *rest: run(*rest[:3], now - 1))
    stopped = race(cfg, 1.01, 1).records[0].details["runs"][0]
    assert stopped["stopped"] and not stopped["reached"] and len(stopped["top1"]) == 1
    assert not race(cfg, 1.01, 1, deadline=now - 1).records


def test_a_run_starts_from_the_weights_of_its_seed(trainer):
    clock.warm_up(trainer)
    clock.restart(trainer, 5)
    torch.manual_seed(5)
    fresh = models.build(trainer.cfg.model, len(trainer.manifest.classes)).state_dict()
    assert all(torch.equal(value, fresh[key]) for key, value in trainer.model.state_dict().items())
    floats = [value for value in fresh.values() if value.is_floating_point()]
    assert all(torch.equal(*pair) for pair in zip(trainer.average.average, floats, strict=True))
    states = trainer.optimizer.optimizer.state.values()
    assert states and not any(tensor.any() for state in states for tensor in state.values())


def test_a_run_does_not_depend_on_earlier_runs(trainer):
    clock.warm_up(trainer)
    first = clock.timed(trainer, 1, 1.01).top1
    clock.timed(trainer, 2, 1.01)
    assert clock.timed(trainer, 1, 1.01).top1 == first


@pytest.mark.parametrize(
    ("script", "config"),
    [
        (reference, "resnet11.toml"),
        (sixty, "resnet11-modern.toml"),
        (sixty_six, "resnet18.toml"),
    ],
)
def test_recipes_are_valid(script, config):
    cfg = configs.load(ROOT / "configs" / config, clock.overrides(script.RECIPE))
    assert cfg.train.batch_size == 512 and 0 < script.TARGET < 1


def test_a_run_whose_loss_is_not_finite_ends_as_diverged(cfg, tmp_path):
    cfg = replace(cfg, optim=replace(cfg.optim, lr=1e38))
    trainer = Trainer(cfg, RunDir(tmp_path), make_accelerator(cfg))
    run = clock.timed(trainer, 0, 1.01)
    assert run.diverged and not run.reached and not run.stopped and len(run.top1) == 1


UUID = "01234567-89ab-cdef-0123-456789abcdef"


@pytest.fixture
def nvml(monkeypatch) -> SimpleNamespace:
    """A stand-in for pynvml and a GPU: each reading is 1,500 mJ above the one before."""
    readings = iter(range(4_000, 100_000, 1_500))
    fake = SimpleNamespace(
        NVMLError=type("NVMLError", (Exception,), {}),
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: {f"GPU-{UUID}": "board"}[uuid],
        nvmlDeviceGetTotalEnergyConsumption=lambda board: next(readings) + 0 * len(board),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    properties = SimpleNamespace(uuid=UUID)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return fake


def test_energy_is_counted_in_joules_on_the_board_of_the_device(nvml):
    assert energy.meter(torch.device("cuda"))() == 1.5


def test_energy_is_none_where_nothing_counts_it(nvml, monkeypatch):
    def refuse():
        raise nvml.NVMLError

    assert energy.meter(torch.device("cpu"))() is None
    nvml.nvmlInit = refuse
    assert energy.meter(torch.device("cuda"))() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy.meter(torch.device("cuda"))() is None


def test_every_run_has_its_own_joules(cfg, monkeypatch):
    measured = iter([10.0, 20.0])
    monkeypatch.setattr(energy, "meter", lambda device: lambda: next(measured))
    session = race(cfg, 0.0, 2)
    assert [run["joules"] for run in session.records[0].details["runs"]] == [10.0, 20.0]
    assert "| 15 ± 7 |" in clock.table(session)
    assert session.records[0].details["commit"] == checkout()


def record(seconds: list[float], reached: int, joules: float | None = None, **more) -> Record:
    runs = [
        {"reached": number < reached, "top1": [0.3, 0.5], "joules": joules}
        for number in range(len(seconds))
    ]
    return Record("net", "s", seconds, {"runs": runs, "target": sixty.TARGET, **more})


def test_a_price_is_that_of_the_mean_run_at_the_hourly_rate():
    # 1,800 s are half an hour.
    assert clock.cells(record([1700.0, 1900.0], 2, rate=2.5)).price == "$1.2500 at $2.50/h"
    assert clock.cells(record([1700.0, 1900.0], 2, rate=None)).price == ""
    assert clock.cells(record([1700.0, 1900.0], 2)).joules == "not measured"


@pytest.mark.parametrize("rate", ["-1", "0", "nan", "inf", "much"])
def test_a_rate_that_is_no_price_is_refused(rate, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--data", "somewhere", "--rate", rate])
    with pytest.raises(SystemExit):
        clock.main("reference", 0.5, {}, "configs/resnet11.toml")
    assert "--rate: expected a number above 0" in capsys.readouterr().err


def test_the_leaderboard_has_the_fastest_record_of_each_script(tmp_path):
    """First counts how many runs reach the target; fewer than five runs are no record."""
    records = {
        "unreliable": record([1.0] * 5, 4),
        "few": record([1.0] * 4, 4),
        "slow": record([30.0] * 5, 5),
        "best": record([20.0] * 5, 5, joules=400.0, rate=3.6, commit="abc1234567"),
    }
    for folder, each in records.items():
        command = "python -m benchmarks.records.sixty --data data"
        made = Session("records.clock", [each], command, "2026-12-01T10", {"gpus": ["GPU X"]}, {})
        save(made, tmp_path / folder / "race-sixty.json")
    rows = leaderboard.table(tmp_path).splitlines()
    assert rows[4] == (
        "| 60.00%, `records/sixty.py` | 20.00 ± 0.00 | 5 of 5 | plain | 400 ± 0 "
        "| $0.0200 at $3.60/h | GPU X, 2026-12-01, abc1234567 |"
    )
    assert rows[2].startswith("| 46.04%, `records/reference.py` | not measured |")


def test_a_copy_without_git_names_the_commit_of_its_environment(monkeypatch):
    monkeypatch.setenv("FASTLAB_COMMIT", "abc1234")
    monkeypatch.setenv("PATH", "")
    assert checkout() == "abc1234"
