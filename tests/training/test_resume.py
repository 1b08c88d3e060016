"""Checkpoints whose bytes are intact but whose values cannot be: refused before any is loaded."""

import dataclasses
import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastlab import train as training
from fastlab.cli import main
from fastlab.training import checkpoint
from tests.trainings import assert_same_run, checkpoints, command, launch

STEPS = 5  # in an epoch
STOPPED = 7


@pytest.fixture(scope="module")
def runs(synth_dataset, tmp_path_factory) -> Path:
    """``whole``, a run of two epochs, and ``stopped``, the same run two steps into the second."""
    base, save = tmp_path_factory.mktemp("runs"), checkpoint.save

    def save_and_copy(folder: Path, step: int, *rest: Any) -> None:
        save(folder, step, *rest)
        if step == STOPPED:
            shutil.copytree(base / "whole", base / "stopped")

    sets = ("train.epochs=2", "train.checkpoint_every=1", "schedule.name=plateau")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_copy)
        assert main(["train", *command(synth_dataset, base / "whole", *sets)]) == 0
    return base


@pytest.fixture
def run(runs, tmp_path) -> Path:
    shutil.copytree(runs / "stopped", tmp_path / "run")
    return tmp_path / "run"


def change(run: Path, how: Callable[[dict[str, Any]], object]) -> None:
    """Change the state in the checkpoint of `run`, and give the file new checksums."""
    path = checkpoints(run)[-1] / "state.pt"
    state = torch.load(path, weights_only=True)
    how(state)
    torch.save(state, path)


def content(run: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "lock"}


def moments(state: dict[str, Any], **values: torch.Tensor) -> None:
    for held in state["optimizer"]["state"].values():
        held.update(values)


def shared_memory(state: dict[str, Any]) -> None:
    """Tensors of the right shape in memory for one number."""
    for held in state["optimizer"]["state"].values():
        held["exp_avg"] = held["exp_avg"].flatten()[0].expand(held["exp_avg"].shape)


IMPOSSIBLE: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("progress.epoch: expected", lambda s: s["progress"].update(epoch=-1)),
    ("progress: impossible", lambda s: s["progress"].update(step=STEPS)),
    ("progress: impossible", lambda s: s["progress"].update(epoch=2)),
    ("progress.seconds: expected", lambda s: s["progress"].update(seconds="long")),
    ("progress.wall: expected", lambda s: s["progress"].pop("wall")),
    ("progress.best_epoch: impossible", lambda s: s["progress"].update(best_epoch=2)),
    ("progress.best_top1: expected", lambda s: s["progress"].update(best_top1=float("nan"))),
    ("lr: expected", lambda s: s["optimizer"]["param_groups"][0].update(lr=float("nan"))),
    ("schedule: impossible", lambda s: s["optimizer"]["param_groups"][0].update(lr=1e6)),
    ("exp_avg: is missing", lambda s: [m.pop("exp_avg") for m in s["optimizer"]["state"].values()]),
    ("optimizer.state.0.exp_avg: expected", lambda s: moments(s, exp_avg=torch.zeros(1))),
    ("step: holds", lambda s: moments(s, step=torch.tensor(float("nan")))),
    ("optimizer: impossible", lambda s: moments(s, step=torch.tensor(99.0))),
    ("optimizer.state.0.step: is missing", lambda s: s["optimizer"]["state"].clear()),
    ("param_groups: expected", lambda s: s["optimizer"]["param_groups"].pop()),
    ("schedule.best: expected", lambda s: s["schedule"].update(best=5.0)),
    ("schedule: impossible", lambda s: s["schedule"].update(num_bad_epochs=9)),
    ("average.average: expected", lambda s: s["average"]["average"].pop()),
    ("sums: is missing", lambda s: s.pop("sums")),
    ("sums: expected", lambda s: s.update(sums=torch.zeros(4))),
    ("sums: impossible", lambda s: s.update(sums=-torch.ones(4, dtype=torch.float64))),
    ("rank-1.pt is missing", lambda s: s.update(processes=2**40)),
    ("settings.train.ema: expected", lambda s: s["settings"].update({"train.ema": -1.0})),
]


@pytest.mark.parametrize(("message", "how"), IMPOSSIBLE)
def test_an_impossible_value_in_a_checkpoint_is_refused(message, how, run, capsys):
    change(run, how)
    before = content(run)
    assert main(["train", "--resume", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"step-0000000{STOPPED}: damaged" in line and message in line
    assert content(run) == before


def test_weights_that_are_not_finite_are_refused(run, capsys):
    path = checkpoints(run)[-1] / "model.safetensors"
    weights = {name: tensor * float("nan") for name, tensor in load_file(path).items()}
    for file, arguments in (
        (path, ["train", "--resume", str(run)]),
        (run / "checkpoints" / "best.safetensors", ["evaluate", str(run)]),
    ):
        checkpoint.save_weights(weights, file)
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "holds no weights of this model" in line and "not finite" in line


@pytest.mark.slow
def test_tensors_of_another_shape_do_not_reach_the_fused_optimizer(run):
    """It would write beyond their end, which kills the process."""
    change(run, lambda state: moments(state, exp_avg=torch.zeros(1), exp_avg_sq=torch.zeros(1)))
    process = launch(["--resume", str(run)])
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and len(errors.splitlines()) == 1, errors


@pytest.mark.slow
def test_tensors_that_overlap_in_memory_get_memory_of_their_own(run):
    change(run, shared_memory)
    process = launch(["--resume", str(run)])
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def test_an_earlier_version_s_checkpoint_with_additional_values_resumes_as_before(runs, run):
    """It recorded neither settings nor the rate at which a plateau began."""

    def as_before(state):
        del state["settings"]
        state["progress"]["unknown"] = 1
        del state["schedule"]["initial_lr"]

    change(run, as_before)
    assert main(["train", "--resume", str(run)]) == 0
    assert_same_run(run, runs / "whole")


OTHER_SETTINGS = {
    "optim.name": ('name = "adamw"', 'name = "sgd"'),
    "schedule.name": ('name = "plateau"', 'name = "cosine"'),
    "train.ema": ("ema = 0.9", "ema = 0.0"),
    "train.batch_size": ("\nbatch_size = 16", "\nbatch_size = 8"),
    "train.precision": ('"fp32"', '"fp64"'),
    "train.seed": ("seed = 0", "seed = 1"),
    "model.width": ("width = 4", "width = 8"),
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_an_edited_setting_that_the_checkpoint_depends_on_is_refused_by_name(name, run, capsys):
    edit(run, *OTHER_SETTINGS[name])
    before = content(run)
    assert main(["train", "--resume", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(rf"was written with {re.escape(name)} = .*, and the run's", line)
    assert content(run) == before


@pytest.mark.parametrize("name", ["optim.name", "schedule.name", "train.ema"])
def test_an_edited_setting_is_refused_where_the_checkpoint_records_none(name, run, capsys):
    old, new = ("ema = 0.0", "ema = 0.9") if name == "train.ema" else OTHER_SETTINGS[name]
    if name == "train.ema":
        change(run, lambda state: state.update(average=None))
        edit(run, "ema = 0.9", "ema = 0.0")
    if name == "schedule.name":
        change(run, lambda state: state.update(schedule={}))
        edit(run, '"plateau"', '"cosine"')
        old, new = new, old
    change(run, lambda state: state.pop("settings"))
    edit(run, old, new)
    assert main(["train", "--resume", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "damaged, or config.toml was changed" in line


def edit(run: Path, old: str, new: str) -> None:
    path = run / "config.toml"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_other_edited_settings_are_obeyed(run):
    """Weight decay, among others, is a setting of the optimizer, whose state is resumed."""
    edit(run, "weight_decay = 0.01", "weight_decay = 0.5")
    edit(run, "\nlr = 0.01", "\nlr = 0.005")
    edit(run, "epochs = 2", "epochs = 3")
    assert main(["train", "--resume", str(run)]) == 0
    state = torch.load(checkpoints(run)[-1] / "state.pt", weights_only=True)
    decays = [group["weight_decay"] for group in state["optimizer"]["param_groups"]]
    assert decays == [0.5, 0.0]
    assert state["progress"]["epoch"] == 3
    assert state["optimizer"]["param_groups"][0]["lr"] == 0.005


@pytest.mark.parametrize("moment", ["before", "after"])
def test_the_best_weights_are_those_that_the_checkpoint_records_whenever_a_kill_comes(
    moment, synth_dataset, tmp_path, monkeypatch
):
    """Each epoch is better than the one before. The kill comes just before or just after the
    checkpoint of the second gets its name."""
    run, rename, evaluate = tmp_path / "run", Path.rename, training.evaluate
    epochs = itertools.count(1)

    def better(*rest):
        return dataclasses.replace(evaluate(*rest), correct1=next(epochs))

    def killed(path, target):
        second = path.name == "partial" and Path(target).name == "step-00000010"
        if second and moment == "before":
            raise KeyboardInterrupt
        renamed = rename(path, target)
        if second:
            raise KeyboardInterrupt
        return renamed

    monkeypatch.setattr(training, "evaluate", better)
    monkeypatch.setattr(Path, "rename", killed)
    sets = ("train.ema=0", "train.checkpoint_every=0", "train.epochs=3")
    assert main(["train", *command(synth_dataset, run, *sets)]) == 130
    monkeypatch.setattr(Path, "rename", rename)
    if moment == "before":
        assert best_is_the_last(run, 5)
    assert main(["train", "--resume", str(run)]) == 0
    assert best_is_the_last(run, 15)


def best_is_the_last(run: Path, step: int) -> bool:
    path = checkpoints(run)[-1]
    assert path.name == f"step-{step:08d}"
    best, weights = (
        load_file(file)
        for file in (run / "checkpoints" / "best.safetensors", path / "model.safetensors")
    )
    return all(best[name].equal(weights[name]) for name in weights)


def test_a_last_checkpoint_without_its_average_is_not_evaluated(run, capsys):
    change(run, lambda state: state["average"]["average"].pop())
    assert main(["evaluate", str(run), "--checkpoint", "last"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "damaged checkpoint (average.average: expected a list" in line
