"""Optimizers, learning-rate schedules and the moving average of weights."""

import math
from collections.abc import Container, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fastlab.config import OptimConfig, ScheduleConfig
from fastlab.fields import AboveZero, Count, Share
from fastlab.training.muon import Muon, is_hidden

# The rate at the first step of a warm-up, as a share of the peak: OneCycleLR's usual 1/25.
_WARMUP_START = 1 / 25


def make_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """A fused optimizer over all parameters, with no weight decay on biases, norm parameters and
    those that `model.no_weight_decay()` names, a method which many models of timm have."""
    exempt = getattr(model, "no_weight_decay", set)()
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and name not in exempt]
    others = [p for name, p in model.named_parameters() if p.ndim <= 1 or name in exempt]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if config.name == "sgd":
        nesterov = config.momentum > 0
        return torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True
        )
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    kind = kinds.get(config.name) or partial(Muon, momentum=config.momentum)
    betas = (config.beta1, config.beta2)
    return kind(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def optimizer_tensors(
    config: OptimConfig, optimizer: torch.optim.Optimizer, updated: Container[int]
) -> dict[int, dict[str, torch.Tensor]]:
    """Tensors of the shape, dtype and layout of those that the `state_dict` of an optimizer of
    `make_optimizer` holds under "state" after a step: number of the parameter -> name.

    A frozen parameter, and a bias in front of a batch norm, gets no gradient and has none: of
    those, of biases and of norm parameters, only those in `updated` are listed.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    listed = {
        n: p for n, p in enumerate(parameters) if (p.ndim > 1 and p.requires_grad) or n in updated
    }
    if config.name == "sgd":
        return {n: {"momentum_buffer": p} for n, p in listed.items()} if config.momentum else {}
    step = torch.zeros((), dtype=torch.float32, device=parameters[0].device)
    adam = {n: {"step": step, "exp_avg": p, "exp_avg_sq": p} for n, p in listed.items()}
    hidden = [n for n, p in listed.items() if config.name == "muon" and is_hidden(p)]
    return {**adam, **{n: {"momentum_buffer": listed[n]} for n in hidden}}


def schedule_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """The rate at `step` of `steps` (0-based) as a share of the peak: cosine and onecycle.

    Both rise linearly for the share `warmup` of all steps. Then "cosine" follows half a cosine
    (Loshchilov and Hutter, 2017) and "onecycle" a straight line (Smith and Topin, 2018), down to
    `final` at the last step. The peak comes a step before it at the latest.
    """
    if config.name == "constant":
        return 1.0
    rise = max(0, min(round(config.warmup * steps), steps - 2))
    if step < rise:
        return _WARMUP_START + (1 - _WARMUP_START) * step / rise
    progress = min(1.0, (step - rise) / max(1, steps - 1 - rise))
    left = (1 + math.cos(math.pi * progress)) / 2 if config.name == "cosine" else 1 - progress
    return config.final + (1 - config.final) * left


class Rate:
    """The learning rate: a scalar on the device that every group of an optimizer reads, and the
    schedule that changes it."""

    def __init__(
        self, config: ScheduleConfig, lr: float, steps: int, device: torch.device | str
    ) -> None:
        """`steps`: optimizer steps of the whole training."""
        self._config, self._lr = config, lr
        self._plateau = _plateau(config, lr) if config.name == "plateau" else None
        self._table = None
        if not self._plateau:
            self._rates = [lr * schedule_factor(config, step, steps) for step in range(steps)]
            self._table = torch.tensor(self._rates, dtype=torch.float32, device=device)
        self._tensor = torch.tensor(self.at(0), dtype=torch.float32, device=device)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the optimizer read this rate. Call it again after its `load_state_dict`, which puts
        numbers in place of the tensor."""
        for group in optimizer.param_groups:
            group["lr"] = self._tensor

    def at(self, step: int) -> float:
        """The rate at `step`; after the last step, the last rate. A plateau: the current rate."""
        if self._plateau:
            return self._plateau.optimizer.param_groups[0]["lr"]
        return self._rates[min(step, len(self._rates) - 1)]

    def set(self, done: torch.Tensor) -> None:
        """Set the rate for the step with the number `done`: int64 [1] on the device."""
        if self._table is not None:
            last = len(self._table) - 1  # benchmarks take more steps than that
            self._tensor.copy_(self._table.index_select(0, done.clamp(max=last))[0])

    def end_epoch(self, top1: float) -> None:
        """Report the epoch's validation top-1 to a plateau schedule."""
        if self._plateau:
            self._plateau.step(top1)
            self._tensor.fill_(self.at(0))

    def at_floor(self) -> bool:
        """Whether a plateau schedule can lower the rate no further: it leaves out a reduction by no
        more than its `eps`, so that it may stay above `min_lr`."""
        if not self._plateau:
            return False
        rate, lowest = self.at(0), self._config.min_lr
        return rate - max(rate * self._config.factor, lowest) <= self._plateau.eps

    def restart(self) -> None:
        """Return to the state before the first step, in the same memory."""
        if self._plateau:
            self._plateau = _plateau(self._config, self._lr)
        self._tensor.fill_(self.at(0))

    def state_dict(self) -> dict:
        return {**self._plateau.state_dict(), "initial_lr": self._lr} if self._plateau else {}

    def load_state_dict(self, state: dict, lr: float) -> None:
        """`lr` is the rate when the state was saved. A plateau that began at another initial rate
        begins anew, at the initial rate of now."""
        # Where the state does not say at which rate it began, only a lower one is recognised.
        began = state.get("initial_lr", max(lr, self._lr))
        if self._plateau and began == self._lr:
            # Its settings are those of the configuration, which may have changed.
            counters = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
            self._plateau.load_state_dict({name: state[name] for name in counters})
            self._plateau.optimizer.param_groups[0]["lr"] = lr
            self._tensor.fill_(lr)


def schedule_kinds(config: ScheduleConfig, saved: dict) -> dict[str, Any]:
    """The types of what `Rate.load_state_dict` reads in `saved`, a `Rate.state_dict` after the
    first epoch, as `checkpoint.conforming` takes them."""
    if config.name != "plateau":
        return {}
    kinds: dict[str, Any] = {"best": Share, "num_bad_epochs": Count}
    kinds.update(cooldown_counter=Count, last_epoch=Count)
    if "initial_lr" in saved:  # not in checkpoints of earlier versions
        kinds["initial_lr"] = AboveZero
    return kinds


def _plateau(config: ScheduleConfig, lr: float) -> ReduceLROnPlateau:
    """A scheduler whose stand-in optimizer holds the rate as a number: read back from the device,
    it would be rounded to fp32."""
    return ReduceLROnPlateau(
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr),
        mode="max",
        factor=config.factor,
        patience=config.patience,
        threshold=config.threshold,
        min_lr=config.min_lr,
    )


class WeightAverage:
    """Exponential moving average of a model's parameters and floating-point buffers.

    It takes in the weights after every eighth step and at the end of an epoch, with the decay of
    all steps since: each time this reads and writes them once, and in between a step costs nothing.
    The decay of a step is held down to (1 + t) / (10 + t) at step t, so that the initial weights
    are forgotten.
    """

    _EVERY = 8

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._live = [t for t in model.state_dict(keep_vars=True).values() if t.is_floating_point()]
        self._decay = decay
        self.average = [t.detach().clone() for t in self._live]
        self.buffers = [
            average
            for average, live in zip(self.average, self._live, strict=True)
            if not isinstance(live, nn.Parameter)
        ]
        """The averages of running statistics: they differ between ranks, the others do not."""

    def restart(self) -> None:
        """Begin anew from the weights that the model holds now, in the same memory."""
        torch._foreach_copy_(self.average, [t.detach() for t in self._live])

    @torch.no_grad()
    def update(self, done: int, steps_per_epoch: int) -> None:
        """Take in the weights, if that is due after `done` steps of the run."""
        if done % self._EVERY and done % steps_per_epoch:
            return
        before = max((done - 1) // every * every for every in (self._EVERY, steps_per_epoch))
        decays = [min(self._decay, (1 + step) / (10 + step)) for step in range(before, done)]
        torch._foreach_lerp_(self.average, [t.detach() for t in self._live], 1 - math.prod(decays))

    @contextmanager
    def applied(self) -> Generator[None]:
        """The model holds the average within the block, and its trained weights again after it."""
        trained = [t.detach().clone() for t in self._live]
        self.apply()
        try:
            yield
        finally:
            self._copy(trained)

    def apply(self) -> None:
        """Overwrite the model's weights with the average."""
        self._copy(self.average)

    @torch.no_grad()
    def _copy(self, values: list[torch.Tensor]) -> None:
        torch._foreach_copy_([t.detach() for t in self._live], values)

    def state_dict(self) -> dict:
        return {"average": self.average}

    def load_state_dict(self, state: dict) -> None:
        torch._foreach_copy_(self.average, state["average"])
