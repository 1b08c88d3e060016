"""Muon: momentum, orthogonalised, for the convolutions; AdamW for all else."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Newton-Schulz iterations, and the coefficients of the quintic that each applies to the singular
# values: those from 0.001 to 1 end between 0.7 and 1.2 (Jordan et al., 2024).
_ITERATIONS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# The root mean square of an update, before the rate: about that of AdamW's (Liu et al., 2025), so
# that one rate and one weight decay suit both.
_RMS = 0.2


def is_hidden(parameter: Tensor) -> bool:
    """Whether Muon updates `parameter`: the weight of any convolution but depthwise ones and the
    one that takes the images, which have three channels. Embeddings of positions, [1, channels,
    height, width], are no weights of convolutions."""
    return parameter.ndim == 4 and parameter.shape[1] > 3 and parameter.shape[0] > 1


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) for the parameters that
    `is_hidden` chooses, AdamW for the others.

    A weight is one matrix, [outputs, inputs x height x width]. Its update is the Nesterov momentum
    of its gradient, replaced by the nearest matrix with orthogonal rows or columns, and scaled to
    the size of AdamW's updates.
    """

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float, **adamw: Any) -> None:
        """`adamw`: the options of `torch.optim.AdamW`."""
        super().__init__(groups, **adamw)
        self._momentum = momentum
        # A GradScaler would leave it to AdamW's fused kernel to divide the gradients.
        self._step_supports_amp_scaling = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by `load_state_dict`. AdamW's own expects a count of steps for every parameter."""
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # ty: ignore[incompatible-method-override]
        """`closure` is not supported."""
        for group in self.param_groups:
            hidden = [p for p in group["params"] if is_hidden(p) and p.grad is not None]
            if hidden:
                self._step_hidden(hidden, group["lr"], group["weight_decay"])
        super().step()

    def _step_hidden(
        self, parameters: list[Tensor], rate: Tensor | float, weight_decay: float
    ) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        for parameter in parameters:
            parameter.grad = None  # so that AdamW skips it
        momenta = [self._momentum_of(p) for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - self._momentum)
        updates = orthogonalised(list(torch._foreach_lerp(gradients, momenta, self._momentum)))
        # The rate is a tensor on the device, which is not read.
        torch._foreach_add_(updates, parameters, alpha=weight_decay)
        torch._foreach_mul_(updates, rate)
        torch._foreach_sub_(parameters, updates)

    def _momentum_of(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def orthogonalised(weights: list[Tensor]) -> list[Tensor]:
    """For each of the `weights`, [outputs, inputs, height, width], the update of Muon before the
    rate, of the same shape, dtype and memory format. Weights of equal shapes share their kernels.
    """
    by_shape = defaultdict(list)
    for number, weight in enumerate(weights):
        by_shape[weight.shape].append(number)
    updates: list[Tensor] = list(weights)
    for (outputs, inputs, height, width), numbers in by_shape.items():
        # In channels-last memory these are views. The order of columns does not matter.
        rows = [weights[n].permute(0, 2, 3, 1).reshape(outputs, -1) for n in numbers]
        columns = inputs * height * width
        matrices = newton_schulz(torch.stack(rows)) * (_RMS * max(outputs, columns) ** 0.5)
        for number, matrix in zip(numbers, matrices, strict=True):
            update = matrix.view(outputs, height, width, inputs).permute(0, 3, 1, 2)
            updates[number] = torch.empty_like(weights[number]).copy_(update)
    return updates


def newton_schulz(matrices: Tensor) -> Tensor:
    """[n, rows, columns] -> the same with singular values near 1. On a GPU, matrices in fp32 are
    iterated in bf16, as the method's author does."""
    a, b, c = _COEFFICIENTS
    half = matrices.is_cuda and matrices.dtype == torch.float32  # fp64 stays exact
    x = matrices.bfloat16() if half else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
