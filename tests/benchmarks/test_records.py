import math
import time
from pathlib import Path

import pytest
import torch

from benchmarks.measurements import Results, load
from benchmarks.records import clock, reference, sixty_six
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
    ("script", "config"), [(reference, "resnet11.toml"), (sixty_six, "resnet18.toml")]
)
def test_recipes_are_valid(script, config):
    sets = [f"{key}={clock.json.dumps(value)}" for key, value in script.RECIPE.items()]
    cfg = configs.load(ROOT / "configs" / config, sets)
    assert cfg.train.batch_size == 512 and 0 < script.TARGET < 1
