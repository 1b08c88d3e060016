"""Optimizers, schedules and the moving average, compared with arithmetic by hand."""

import copy
import io
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastlab.config import ModelConfig, OptimConfig, ScheduleConfig
from fastlab.models import build
from fastlab.training.optim import Rate, WeightAverage, make_optimizer, schedule_factor


@pytest.mark.parametrize(
    ("min_lr", "rates"),
    [
        (1e-8, [1e-6, 1e-7, 1e-8]),
        (1e-5, [1e-6]),
        # PyTorch leaves out a reduction by no more than 1e-8.
        (5e-8, [1e-6, 1e-7, 5e-8]),
        (9.5e-8, [1e-6, 1e-7]),
        (0.0, [1e-6, 1e-7, 1e-8]),
    ],
)
def test_a_plateau_is_at_its_floor_from_the_last_rate_on(min_lr, rates):
    config = ScheduleConfig(factor=0.1, patience=0, min_lr=min_lr)
    rate = Rate(config, rates[0], 1, "cpu")
    rate.end_epoch(0.0)
    for expected in rates[:-1]:
        assert rate.at(0) == pytest.approx(expected) and not rate.at_floor()
        rate.end_epoch(0.0)
    for _ in range(3):
        assert rate.at(0) == pytest.approx(rates[-1]) and rate.at_floor()
        rate.end_epoch(0.0)


def test_only_a_plateau_has_a_floor():
    assert not Rate(ScheduleConfig(name="constant"), 1e-8, 1, "cpu").at_floor()


@pytest.mark.parametrize(
    ("name", "step", "expected"),
    [
        # Of 21 steps, four rise from 1/25 to the peak at step 4; 16 fall from there to a tenth.
        ("onecycle", 0, 0.04),
        ("onecycle", 2, 0.52),
        ("onecycle", 4, 1.0),
        ("onecycle", 8, 0.775),
        ("onecycle", 12, 0.55),
        ("onecycle", 20, 0.1),
        ("onecycle", 21, 0.1),
        ("cosine", 0, 0.04),
        ("cosine", 2, 0.52),
        ("cosine", 4, 1.0),
        ("cosine", 8, 0.1 + 0.9 * (2 + math.sqrt(2)) / 4),
        ("cosine", 12, 0.55),
        ("cosine", 20, 0.1),
        ("cosine", 21, 0.1),
        ("constant", 0, 1.0),
        ("constant", 20, 1.0),
    ],
)
def test_the_rate_is_that_of_arithmetic_by_hand(name, step, expected):
    config = ScheduleConfig(name=name, warmup=0.2, final=0.1)
    assert schedule_factor(config, step, 21) == pytest.approx(expected)


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(
    name=st.sampled_from(["cosine", "onecycle"]),
    steps=st.integers(2, 400),
    warmup=st.floats(0, 0.999),
    final=st.floats(0, 0.99),
)
def test_the_rate_rises_to_its_peak_once_and_falls_to_its_final_share(name, steps, warmup, final):
    config = ScheduleConfig(name=name, warmup=warmup, final=final)
    rates = [schedule_factor(config, step, steps) for step in range(steps)]
    peak = rates.index(max(rates))
    assert rates[peak] == pytest.approx(1)
    assert abs(peak - min(warmup * steps, steps - 2)) <= 0.5
    assert all(a < b for a, b in itertools.pairwise(rates[: peak + 1]))
    falling = rates[peak:]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(falling))
    assert rates[-1] == pytest.approx(final, abs=1e-9)
    assert peak == 0 or rates[0] == pytest.approx(1 / 25)


def one_weight(**settings) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    assert isinstance(model.weight, nn.Parameter)
    return model.weight, make_optimizer(OptimConfig(**settings), model)


def rate_of(optimizer: torch.optim.Optimizer) -> float:
    (rate,) = {float(group["lr"]) for group in optimizer.param_groups}
    return rate


def test_cosine_without_warmup_is_torchs_cosine_annealing():
    _, ours = one_weight()
    rate = Rate(ScheduleConfig(name="cosine", warmup=0.0, final=0.2), 0.3, 30, "cpu")
    rate.attach(ours)
    _, theirs = one_weight(lr=0.3)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=29, eta_min=0.06)
    for step in range(30):
        rate.set(torch.tensor([step]))
        assert rate_of(ours) == pytest.approx(rate_of(theirs)) == pytest.approx(rate.at(step))
        theirs.step()
        annealing.step()


def test_a_schedule_sets_the_rate_of_every_group():
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(OptimConfig(lr=1.0), model)
    rate = Rate(ScheduleConfig(name="onecycle", warmup=0.2, final=0.1), 2.0, 21, "cpu")
    rate.attach(optimizer)
    rate.set(torch.tensor([12]))
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([1.1, 1.1])


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_step_uses_the_rate_that_was_set_last(name):
    """Adam's first step is the rate, whatever the gradient. SGD's is the rate times the gradient,
    which is 1 here."""
    weight, optimizer = one_weight(name=name, momentum=0.0)
    rate = Rate(ScheduleConfig(name="onecycle", warmup=0.2, final=0.1), 0.5, 21, "cpu")
    rate.attach(optimizer)
    rate.set(torch.tensor([12]))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.item() == pytest.approx(1 - 0.275)


def plateau_rates(top1: list[float], **settings) -> list[float]:
    """The rate after each epoch. It starts at 0.015, the rate of the reference report."""
    _, optimizer = one_weight()
    rate = Rate(ScheduleConfig(**settings), 0.015, 1000, "cpu")
    rate.attach(optimizer)
    rates = []
    for value in top1:
        rate.end_epoch(value)
        assert rate_of(optimizer) == pytest.approx(rate.at(0))
        rates.append(rate_of(optimizer))
    return rates


def test_a_plateau_resumes_from_its_saved_state():
    settings = ScheduleConfig(name="plateau", patience=1)
    undisturbed = Rate(settings, 0.5, 1000, "cpu")
    for top1 in (0.3, 0.3):
        undisturbed.end_epoch(top1)
    resumed = Rate(settings, 0.5, 1000, "cpu")
    resumed.load_state_dict(undisturbed.state_dict(), undisturbed.at(0))
    for rate in (undisturbed, resumed):
        rate.end_epoch(0.3)
        assert rate.at(0) == pytest.approx(0.05)


@pytest.mark.parametrize("records_initial_rate", [True, False])
def test_a_plateau_that_resumes_with_a_lower_initial_rate_begins_anew(records_initial_rate):
    """A checkpoint of an earlier version does not record the initial rate."""
    before = Rate(ScheduleConfig(name="plateau", patience=1), 0.5, 1000, "cpu")
    for top1 in (0.3, 0.3):
        before.end_epoch(top1)
    state = before.state_dict()
    if not records_initial_rate:
        del state["initial_lr"]
    resumed = Rate(ScheduleConfig(name="plateau", patience=1), 0.2, 1000, "cpu")
    resumed.load_state_dict(state, before.at(0))
    rates = []
    for _ in range(3):
        rates.append(resumed.at(0))
        resumed.end_epoch(0.1)
    assert rates == pytest.approx([0.2, 0.2, 0.2]) and resumed.at(0) == pytest.approx(0.02)


def test_a_plateau_resumes_under_the_patience_and_factor_of_its_configuration():
    before = Rate(ScheduleConfig(name="plateau", patience=9), 0.5, 1000, "cpu")
    for top1 in (0.3, 0.3, 0.3):
        before.end_epoch(top1)
    changed = ScheduleConfig(name="plateau", patience=2, factor=0.5)
    resumed = Rate(changed, 0.5, 1000, "cpu")
    resumed.load_state_dict(before.state_dict(), before.at(0))
    resumed.end_epoch(0.3)
    assert resumed.at(0) == pytest.approx(0.25)


@pytest.mark.parametrize("name", ["plateau", "cosine"])
def test_a_restarted_rate_is_that_of_a_new_schedule(name):
    settings = ScheduleConfig(name=name, patience=0)
    used, fresh = Rate(settings, 0.5, 21, "cpu"), Rate(settings, 0.5, 21, "cpu")
    optimizers = [one_weight()[1] for _ in range(2)]
    for rate, optimizer in zip((used, fresh), optimizers, strict=True):
        rate.attach(optimizer)
    used.set(torch.tensor([12]))
    for top1 in (0.3, 0.3):
        used.end_epoch(top1)
    assert rate_of(optimizers[0]) != rate_of(optimizers[1])
    used.restart()
    assert rate_of(optimizers[0]) == rate_of(optimizers[1])
    assert used.at(0) == fresh.at(0)


@pytest.mark.parametrize(
    ("top1", "rates"),
    [
        # Two epochs after the best are waited out, the third lowers the rate. The count restarts.
        ([0.3] * 7, [0.015] * 3 + [0.0015] * 3 + [0.00015]),
        # Only a rise by more than a ten-thousandth of the best is an improvement.
        ([0.3, 0.30002, 0.30002, 0.30002], [0.015] * 3 + [0.0015]),
        ([0.3, 0.30004, 0.30004, 0.30004], [0.015] * 4),
        ([0.3, 0.29, 0.28, 0.31, 0.30, 0.30], [0.015] * 6),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.015] * 6),
    ],
)
def test_a_plateau_waits_for_two_epochs_and_lowers_the_rate_after_the_third(top1, rates):
    assert plateau_rates(top1) == pytest.approx(rates)


def test_a_plateau_has_the_factor_patience_and_floor_of_its_configuration():
    rates = plateau_rates([0.3] * 6, factor=0.5, patience=0, min_lr=0.004)
    assert rates == pytest.approx([0.015, 0.0075, 0.004, 0.004, 0.004, 0.004])


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "muon"])
@pytest.mark.parametrize("model_name", ["resnet11", "cnn8"])
def test_weight_decay_moves_weights_but_no_bias_and_no_norm_parameter(name, model_name):
    model = build(ModelConfig(name=model_name, width=4), 5)
    settings = OptimConfig(name=name, lr=0.01, weight_decay=0.1, momentum=0.0)
    optimizer = make_optimizer(settings, model)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    kinds = (nn.Conv2d, nn.Linear)
    layers = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    decayed = {f"{name}.weight" for name in layers}
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert moved == decayed
    if name != "adam":  # without a gradient, the others shrink a weight by rate times decay
        for key in decayed:
            torch.testing.assert_close(model.get_parameter(key), before[key] * (1 - 0.01 * 0.1))


@pytest.mark.parametrize(
    ("momentum", "decay", "weights"),
    [
        # The gradient is 1, then 2; the rate is 0.1.
        (0.0, 0.0, [1 - 0.1 * 1, 0.9 - 0.1 * 2]),
        # Velocity 1: 1 + 0.5 * 1 = 1.5. Velocity 0.5 * 1 + 2 = 2.5: 2 + 0.5 * 2.5 = 3.25.
        (0.5, 0.0, [1 - 0.1 * 1.5, 0.85 - 0.1 * 3.25]),
        # Decay adds 0.2 of the weight to the gradient: 1.2, 1.2 + 0.6 = 1.8; then 0.82 and
        # 2.164, velocity 0.6 + 2.164 = 2.764, 2.164 + 1.382 = 3.546.
        (0.5, 0.2, [1 - 0.1 * 1.8, 0.82 - 0.1 * 3.546]),
    ],
)
def test_two_steps_of_sgd_are_those_of_arithmetic_by_hand(momentum, decay, weights):
    weight, optimizer = one_weight(name="sgd", lr=0.1, momentum=momentum, weight_decay=decay)
    after_each_step = []
    for grad in (1.0, 2.0):
        weight.grad = torch.full_like(weight, grad)
        optimizer.step()
        after_each_step.append(weight.item())
    assert after_each_step == pytest.approx(weights)


def test_the_first_step_of_adam_is_the_rate_whatever_the_gradient():
    weight, optimizer = one_weight(name="adam", lr=0.1)
    weight.grad = torch.full_like(weight, 37.0)
    optimizer.step()
    assert weight.item() == pytest.approx(0.9)


def test_adam_has_the_settings_of_its_configuration():
    _, optimizer = one_weight(name="adamw", lr=0.1, beta1=0.8, beta2=0.95, eps=1e-4)
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-4)


def averaged_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))


def move(model: nn.Module, step: int) -> None:
    """Change all parameters and buffers in place, as a forward pass and an update do."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor += step + 1 if tensor.is_floating_point() else 1


def floats(model: nn.Module) -> list[torch.Tensor]:
    return [t.detach().clone() for t in model.state_dict().values() if t.is_floating_point()]


@pytest.mark.parametrize("decay", [0.0, 0.15, 0.9])
def test_the_average_is_that_of_a_plain_loop_which_looks_every_eighth_step_and_after_each_epoch(
    decay,
):
    model = averaged_model()
    average = WeightAverage(model, decay)
    expected = [t.double() for t in floats(model)]
    left, looks = 1.0, 0
    for step in range(40):  # eight epochs of five steps
        move(model, step)
        average.update(step + 1, 5)
        left *= min(decay, (1 + step) / (10 + step))
        if step + 1 in (5, 8, 10, 15, 16, 20, 24, 25, 30, 32, 35, 40):
            pairs = zip(expected, floats(model), strict=True)
            expected = [left * old + (1 - left) * new.double() for old, new in pairs]
            left, looks = 1.0, looks + 1
    with average.applied():
        averaged = floats(model)
    torch.testing.assert_close(averaged, [t.float() for t in expected])
    assert looks == 12


def test_the_model_has_its_trained_weights_again_after_the_average_even_after_an_error():
    model = averaged_model()
    average = WeightAverage(model, 0.9)
    move(model, 3)
    average.update(4, 4)
    move(model, 4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError), average.applied():
        assert not torch.equal(model.state_dict()["0.weight"], before["0.weight"])
        assert not torch.equal(model.state_dict()["1.running_mean"], before["1.running_mean"])
        raise ZeroDivisionError
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_an_average_resumes_from_its_saved_state():
    model = averaged_model()
    average = WeightAverage(model, 0.9)
    for step in range(3):
        move(model, step)
        average.update(step + 1, 1)
    stored = io.BytesIO()
    torch.save([average.state_dict(), model.state_dict()], stored)
    stored.seek(0)
    state, weights = torch.load(stored, weights_only=True)
    resumed_model = averaged_model()
    resumed_model.load_state_dict(weights)
    resumed = WeightAverage(resumed_model, 0.9)
    resumed.load_state_dict(state)
    averages = []
    for each, averaging in ((model, average), (resumed_model, resumed)):
        move(each, 5)
        averaging.update(4, 1)
        with averaging.applied():
            averages.append(floats(each))
    assert all(torch.equal(a, b) for a, b in zip(*averages, strict=True))
