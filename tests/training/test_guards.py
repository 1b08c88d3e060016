"""What ends a training early: on which rank it happens, and what all ranks then hear of it."""

import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fastlab.training.guards import Diverged, Look, StopRequested, Watch, all_finite
from fastlab.training.metrics import Sums
from tests.training.ranks import on_ranks

CPU = torch.device("cpu")
ALONE: Any = SimpleNamespace(device=CPU, num_processes=1)


def watch_of(accelerator: Any, diverged: int = 0, done: int = 0) -> Watch:
    """A watch over epochs of ten steps, of which the step `diverged` (0: none) diverged."""
    step: Any = SimpleNamespace(
        diverged=torch.tensor([diverged]), done=torch.tensor([done]), steps_per_epoch=10
    )
    return Watch(accelerator, step, Sums(CPU))


def test_a_look_returns_the_values_of_the_look_before():
    watch = watch_of(ALONE)
    watch._sums.values.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert watch.look(True) == Look(False, [])
    watch._sums.values.copy_(torch.tensor([5.0, 6.0, 7.0, 8.0]))
    assert watch.look(False) == Look(True, [1.0, 2.0, 3.0, 4.0])
    assert watch.look(False) == Look(False, [5.0, 6.0, 7.0, 8.0])


def test_a_checkpoint_that_was_written_is_not_due_again():
    watch = watch_of(ALONE)
    watch.look(True)
    watch.forget()
    assert watch.look(False) == Look(False, [])
    assert not watch.look(False).checkpoint_due


@pytest.mark.parametrize("steps", [(0, 4), (4, 0), (4, 7), (7, 4)])
def test_all_ranks_report_the_step_at_which_the_first_of_them_diverged(steps):
    def look_twice(accelerator):
        watch = watch_of(accelerator, diverged=steps[accelerator.process_index])
        assert watch.look(False) == Look(False, [])
        watch.look(False)

    def check(accelerator):
        watch_of(accelerator, steps[accelerator.process_index]).refuse_divergence(nn.Linear(1, 1))

    for call in (look_twice, check):
        for error in on_ranks(call):
            assert isinstance(error, Diverged)
            assert str(error) == "the loss is not a finite number at step 4"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_all_ranks_refuse_weights_that_are_not_finite_on_one(value):
    def check(accelerator):
        model = nn.Linear(2, 2)
        if accelerator.process_index == 1:
            nn.init.constant_(model.bias[1:], value)
        watch_of(accelerator, done=23).refuse_divergence(model)

    for error in on_ranks(check):
        assert isinstance(error, Diverged)
        assert str(error) == "the weights are not finite numbers after step 3"


def test_finite_losses_and_weights_are_not_refused():
    assert on_ranks(lambda rank: watch_of(rank).refuse_divergence(nn.Linear(1, 1))) == [None, None]


def test_a_buffer_that_is_not_finite_is_noticed_and_large_weights_are_finite():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    nn.init.constant_(model.get_parameter("0.weight"), 3e38)  # their sum overflows fp32
    assert all_finite(model)
    model.get_buffer("1.running_var")[2] = float("inf")
    assert not all_finite(model)


def test_all_ranks_write_a_checkpoint_that_is_due_on_one():
    def look_twice(accelerator):
        watch = watch_of(accelerator)
        watch._sums.values += accelerator.process_index
        watch.look(accelerator.process_index == 1)
        return watch.look(False)

    assert on_ranks(look_twice) == [Look(True, [0.0] * 4), Look(True, [1.0] * 4)]


@pytest.mark.parametrize("received", [(signal.SIGTERM, 0), (0, signal.SIGINT)])
def test_a_signal_to_one_rank_stops_all_of_them(received):
    def watch_with_signal(accelerator):
        watch = watch_of(accelerator)
        watch.signal = received[accelerator.process_index]
        return watch

    def look_twice(accelerator):
        watch = watch_with_signal(accelerator)
        watch.look(False)
        watch.look(False)

    for call in (look_twice, lambda accelerator: watch_with_signal(accelerator).agree_to_stop()):
        for stop in on_ranks(call):
            assert isinstance(stop, StopRequested) and stop.number == max(received)


def test_without_a_signal_no_rank_stops():
    assert on_ranks(lambda accelerator: watch_of(accelerator).agree_to_stop()) == [None, None]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_for_a_stop_and_the_second_acts_at_once(number):
    second, before = [], {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(number, lambda received, frame: second.append(received))
    try:
        watch = watch_of(ALONE)
        with watch.signals():
            os.kill(os.getpid(), number)
            assert watch.signal == number and not second
            os.kill(os.getpid(), number)
            assert second == [number]
            with pytest.raises(StopRequested):
                watch.agree_to_stop()
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def test_a_closed_terminal_may_send_its_signal_twice_and_after_another():
    """By default each would end the process."""
    watch = watch_of(ALONE)
    with watch.signals():
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
            assert watch.signal == number


def test_an_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        watch = watch_of(ALONE)
        with watch.signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert watch.signal == 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_without_a_signal_the_handlers_are_restored():
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {name: signal.getsignal(name) for name in names}
    with watch_of(ALONE).signals():
        assert all(signal.getsignal(name) != handler for name, handler in before.items())
    assert {name: signal.getsignal(name) for name in before} == before
