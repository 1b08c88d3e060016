"""Checkpoints are exact to the bit, whole or absent, and never a way to run code."""

import copy
import itertools
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fastlab.config import ModelConfig, OptimConfig
from fastlab.console import UserError
from fastlab.models import build
from fastlab.models.dropout import DropoutKeys
from fastlab.training import checkpoint
from fastlab.training.optim import make_optimizer
from tests.training.ranks import on_ranks

ALONE: Any = SimpleNamespace(
    is_main_process=True, process_index=0, num_processes=1, wait_for_everyone=lambda: None
)


def small(value: float = 0.0) -> Any:
    """A linear layer and a batch norm, filled with `value`."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(value)
    return model


def content(model: nn.Module) -> float:
    """The value that `small` filled a model with. A torn checkpoint would hold several."""
    (value,) = {v for t in model.state_dict().values() for v in t.double().flatten().tolist()}
    return value


def newest(folder: Path) -> Path:
    path = checkpoint.last(folder)
    assert path is not None
    return path


def load(
    path: Path, model: nn.Module, rank: int, rank_tensors: Sequence[torch.Tensor] = ()
) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Restore `model`. Returns the main process's state, and this rank's `rank_tensors`."""
    state = checkpoint.load_state(path)
    return state, checkpoint.load(path, model, rank, state["processes"], rank_tensors)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Take steps whose images and dropout follow from their numbers."""
    model.train()
    dropout = DropoutKeys(model, seed=7, rank=0, device=torch.device("cpu"))
    for step in steps:
        dropout.set(torch.tensor([step]))
        images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(step))
        model(images).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return list(first) == list(second) and all(first[k].equal(second[k]) for k in first)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_a_training_resumes_bit_for_bit(tmp_path, name):
    def fresh():
        model = build(ModelConfig(name="resnet11", width=4), 5).to(
            memory_format=torch.channels_last
        )
        return model, make_optimizer(OptimConfig(name=name, lr=0.01), model)

    model, optimizer = fresh()
    train(model, optimizer, range(2))
    state = {"optimizer": optimizer.state_dict(), "progress": {"epoch": 3, "rates": [1.5, 2.25]}}
    checkpoint.save(tmp_path, 2, model, state, ALONE)
    saved = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(2, 4))

    resumed, resumed_optimizer = fresh()
    loaded, rank_tensors = load(newest(tmp_path), resumed, 0)
    assert len(rank_tensors) == 0
    assert loaded["progress"] == {"epoch": 3, "rates": [1.5, 2.25]}
    assert same(resumed.state_dict(), saved)
    resumed_optimizer.load_state_dict(loaded["optimizer"])
    train(resumed, resumed_optimizer, range(2, 4))
    assert same(resumed.state_dict(), model.state_dict())
    assert not same(resumed.state_dict(), saved)


def save_by_two(folder: Path, models: list[nn.Module]) -> None:
    """Save with two ranks."""

    def save(rank: Any) -> None:
        checkpoint.save(folder, 1, models[rank.process_index], {}, rank)

    assert on_ranks(save) == [None, None]


def test_each_rank_gets_its_own_statistics_and_a_new_rank_those_of_the_main_process(tmp_path):
    models = [small(1.0), small(1.0)]
    models[1][1].running_mean.fill_(7.0)
    save_by_two(tmp_path, models)
    for rank, mean in ((0, 1.0), (1, 7.0), (2, 1.0)):
        model = small()
        load(newest(tmp_path), model, rank)
        assert model[1].running_mean.tolist() == [mean] * 3
        assert model[0].weight.tolist() == [[1.0] * 2] * 3


@pytest.mark.parametrize("lost", [0, 1])
def test_all_ranks_refuse_a_checkpoint_that_lacks_the_file_of_one(tmp_path, lost):
    save_by_two(tmp_path, [small(1.0), small(1.0)])
    path = newest(tmp_path)
    (path / f"rank-{lost}.pt").unlink()
    for rank in range(3):
        with pytest.raises(UserError, match=f"damaged checkpoint .rank-{lost}.pt is missing"):
            load(path, small(), rank)


def test_without_a_checkpoint_there_is_no_last_one(tmp_path):
    assert checkpoint.last(tmp_path) is None
    assert checkpoint.last(tmp_path / "missing") is None


def test_the_newest_step_is_the_last(tmp_path):
    for step in (9, 1000, 10, 200):
        checkpoint.save(tmp_path / str(step), step, small(step), {}, ALONE)
        shutil.copytree(tmp_path / str(step), tmp_path / "all", dirs_exist_ok=True)
    model = small()
    load(newest(tmp_path / "all"), model, 0)
    assert content(model) == 1000


def test_a_save_removes_older_checkpoints(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, small(step), {}, ALONE)
    assert list(tmp_path.iterdir()) == [newest(tmp_path)]


def test_a_torn_save_is_no_checkpoint_and_is_removed_by_the_next(tmp_path):
    torn = tmp_path / "partial"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    (torn / "rank-5.pt").write_bytes(b"of a larger run")
    assert checkpoint.last(tmp_path) is None
    checkpoint.save(tmp_path, 4, small(4), {}, ALONE)
    assert list(tmp_path.iterdir()) == [newest(tmp_path)]
    assert not (newest(tmp_path) / "rank-5.pt").exists()


class Killed(BaseException):
    pass


class Killer:
    """Raises `Killed` at the n-th change of the file system in a folder, as a kill would end it."""

    def __init__(self) -> None:
        self.left = 0
        self.folder = ""
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple) -> None:
        if self.left and event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            paths = [os.fspath(arg) for arg in args if isinstance(arg, str | Path)]
            if event in ("os.remove", "os.rmdir") or any(self.folder in path for path in paths):
                self.left -= 1
                if not self.left:
                    raise Killed


@pytest.fixture(scope="module")
def killer() -> Killer:
    return Killer()


@pytest.mark.parametrize("second", [8, 7], ids=["a later step", "the same step again"])
def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path, killer, second):
    """The best weights, too, are those of the checkpoint, whichever the kill leaves."""
    for moment in itertools.count(1):
        folder = tmp_path / str(moment)
        save_both(folder, 7, 70)
        killer.folder, killer.left = str(folder), moment
        try:
            save_both(folder, second, 80 if second == 8 else 70)
            break
        except Killed:
            model, best = small(), small()
            path = newest(folder)
            state, _ = load(path, model, 0)
            assert content(model) == state["value"] in (70, 80)
            checkpoint.promote_best(path)
            checkpoint.load_weights(best, folder / "best.safetensors")
            assert content(best) == state["value"] + 1
            checkpoint.save(folder, 9, small(90), {}, ALONE)
            assert {p.name for p in folder.iterdir()} == {newest(folder).name, "best.safetensors"}
            checkpoint.load_weights(best, folder / "best.safetensors")
            assert content(best) == state["value"] + 1
        finally:
            killer.left = 0
    assert moment > 5  # at the last one, the save was over
    load(newest(folder), model, 0)
    assert content(model) == (80 if second == 8 else 70)


def save_both(folder: Path, step: int, value: int) -> None:
    """A checkpoint filled with `value`, with new best weights that are filled with one more."""
    best = small(value + 1).state_dict()
    checkpoint.save(folder, step, small(value), {"value": value}, ALONE, best=best)


def break_file(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        parts = {"empty": b"", "cut": whole[: len(whole) // 2], "noise": b"\x93noise\n" * 99}
        path.write_bytes(parts[how])


@pytest.mark.parametrize("how", ["missing", "empty", "cut", "noise"])
@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "rank-0.pt"])
def test_a_damaged_file_is_reported_in_one_line(tmp_path, name, how):
    checkpoint.save(tmp_path, 1, small(1), {"value": torch.ones(300)}, ALONE)
    path = newest(tmp_path)
    break_file(path / name, how)
    with pytest.raises(UserError) as caught:
        load(path, small(), 0)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_are_refused(tmp_path):
    checkpoint.save(tmp_path, 1, small(), {}, ALONE)
    for other in (nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)), nn.Linear(2, 3)):
        with pytest.raises(UserError, match="no weights of this model") as caught:
            load(newest(tmp_path), other, 0)
        assert "\n" not in str(caught.value)


class Exploit:
    """Unpickling this makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["state.pt", "rank-0.pt"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, name):
    checkpoint.save(tmp_path / "run", 1, small(), {}, ALONE)
    path, trace = newest(tmp_path / "run"), tmp_path / "trace"
    torch.save({"cpu": Exploit(trace), "buffers": {}}, path / name)
    with pytest.raises(UserError, match="damaged checkpoint") as caught:
        load(path, small(), 0)
    assert "\n" not in str(caught.value)
    assert not trace.exists()
    torch.load(path / name, weights_only=False)  # the exploit works where pickles are trusted
    assert trace.is_dir()


def test_saved_weights_are_read_back_and_replace_the_old_ones_at_once(tmp_path):
    path = tmp_path / "best.safetensors"
    checkpoint.save_weights(small(1).state_dict(), path)
    with path.open("rb") as reader:
        checkpoint.save_weights(small(2).state_dict(), path)
        (tmp_path / "old").write_bytes(reader.read())
    for name, value in (("old", 1), ("best.safetensors", 2)):
        model = small()
        checkpoint.load_weights(model, tmp_path / name)
        assert content(model) == value
    assert {p.name for p in tmp_path.iterdir()} == {"old", "best.safetensors"}
