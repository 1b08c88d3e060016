"""Optimizers, learning-rate schedules and the moving average of weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from fastlab.config import OptimConfig, ScheduleConfig

# The rate at the first step of a warm-up, as a share of the peak: OneCycleLR's usual 1/25.
_WARMUP_START = 1 / 25


def make_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """A fused optimizer over all parameters; biases and norm parameters are not decayed."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if config.name == "sgd":
        nesterov = config.momentum > 0
        return torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True
        )
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
    betas = (config.beta1, config.beta2)
    return kind(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


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


def make_schedule(
    config: ScheduleConfig, optimizer: torch.optim.Optimizer, steps: int
) -> LambdaLR | ReduceLROnPlateau:
    """`steps`: optimizer steps of the whole training. A plateau is stepped with each epoch's
    validation top-1, any other every step."""
    if config.name == "plateau":
        return ReduceLROnPlateau(
            optimizer,
            mode="max",
            factor=config.factor,
            patience=config.patience,
            threshold=config.threshold,
            min_lr=config.min_lr,
        )
    return LambdaLR(optimizer, lambda step: schedule_factor(config, step, steps))


class WeightAverage:
    """Exponential moving average of a model's parameters and floating-point buffers.

    The decay is held down to (1 + t) / (10 + t) at step t, so that the initial weights are
    forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._live = [t for t in model.state_dict(keep_vars=True).values() if t.is_floating_point()]
        self._decay = decay
        self.average = [t.detach().clone() for t in self._live]
        self.buffers = [
            average
            for average, live in zip(self.average, self._live, strict=True)
            if not isinstance(live, nn.Parameter)
        ]
        """Of the running statistics, which differ between processes; the rest does not."""
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self._decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.average, [t.detach() for t in self._live], 1 - decay)
        self.steps += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the average inside, and its own weights again afterwards."""
        own = [t.detach().clone() for t in self._live]
        self.apply()
        try:
            yield
        finally:
            self._copy(own)

    def apply(self) -> None:
        """The model holds the average from now on."""
        self._copy(self.average)

    @torch.no_grad()
    def _copy(self, values: list[torch.Tensor]) -> None:
        torch._foreach_copy_([t.detach() for t in self._live], values)

    def state_dict(self) -> dict:
        return {"average": self.average, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        torch._foreach_copy_(self.average, state["average"])
        self.steps = state["steps"]
