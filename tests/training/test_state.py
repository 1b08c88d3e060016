"""What a checkpoint holds, when other ranks resume than wrote it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastlab.config import Config, OptimConfig, ScheduleConfig
from fastlab.runs import RunDir
from fastlab.training.metrics import Sums
from fastlab.training.optim import Rate, WeightAverage, make_optimizer
from fastlab.training.state import Progress, State
from tests.training.ranks import on_ranks

CONFIG = Config(optim=OptimConfig(name="adam", lr=0.5), schedule=ScheduleConfig(name="constant"))


def state_of(accelerator: Any, folder: Path) -> State:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer: Any = make_optimizer(OptimConfig(name="adam"), model)
    rate = Rate(ScheduleConfig(name="constant"), 0.5, 10, "cpu")
    average = WeightAverage(model, 0.9)
    sums = Sums(torch.device("cpu"))
    run = RunDir(folder)
    run.checkpoints.mkdir(exist_ok=True)
    return State(run, accelerator, model, optimizer, rate, average, sums)


@pytest.fixture
def saved(tmp_path) -> Path:
    """A run that two ranks saved within an epoch, with different sums and running means."""

    def save(accelerator):
        state, rank = state_of(accelerator, tmp_path), accelerator.process_index
        state._model(torch.ones(2, 2)).sum().backward()
        state._optimizer.step()
        state.progress = Progress(epoch=1, step=4, best_top1=0.5, best_epoch=1)
        state._sums.values += torch.tensor([1.0, 2.0, 3.0, 4.0]) * 10**rank
        assert state._average is not None
        for buffers in (state._model.buffers(), state._average.buffers):
            for buffer in buffers:
                if buffer.is_floating_point():
                    buffer.fill_(5 + rank)
        state.save(9)

    assert on_ranks(save) == [None, None]
    RunDir(tmp_path).append_metrics({"epoch": 1})
    return tmp_path


@pytest.mark.parametrize("count", [1, 2, 3])
def test_sums_resume_on_the_main_rank_whatever_the_number_of_ranks(saved, count):
    def restored(accelerator):
        state = state_of(accelerator, saved)
        state.restore(CONFIG, 5)
        assert (state.progress.epoch, state.progress.step) == (1, 4)
        return state._sums.values.tolist()

    sums = on_ranks(restored, count)
    assert sums[0] == [11.0, 22.0, 33.0, 44.0]
    assert sums[1:] == [[0.0] * 4] * (count - 1)


def test_each_rank_resumes_with_its_own_statistics_and_their_average(saved):
    def restored(accelerator):
        state = state_of(accelerator, saved)
        state.restore(CONFIG, 5)
        assert state._average is not None
        buffers = (*state._model.buffers(), *state._average.buffers)
        return {value for b in buffers if b.is_floating_point() for value in b.tolist()}

    assert on_ranks(restored) == [{5.0}, {6.0}]


def test_the_best_weights_are_those_of_the_moment_and_written_with_the_next_checkpoint(tmp_path):
    def save(accelerator):
        state = state_of(accelerator, tmp_path)
        nn.init.constant_(state._model.get_parameter("0.bias"), 7.0)
        state.keep_best()
        nn.init.constant_(state._model.get_parameter("0.bias"), 8.0)
        assert not RunDir(tmp_path).best.exists()
        state.save(1)

    assert on_ranks(save, 1) == [None]
    assert load_file(RunDir(tmp_path).best)["0.bias"].tolist() == [7.0] * 3
