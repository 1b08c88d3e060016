"""Batch normalisation whose statistics are those of all processes, on any device."""

import torch
import torch.distributed as dist
from torch import nn

from fastlab.console import UserError


def check_synchronisable(model: nn.Module) -> None:
    """Raises `UserError` where `synchronise` would lose what a batch norm of `model` does besides,
    such as the activation in those of timm."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        usual = module.affine and module.track_running_stats and module.momentum is not None
        if type(module) is not nn.BatchNorm2d or not usual:
            raise UserError(
                f"model.sync_batch_norm: {name} is no plain BatchNorm2d ({type(module).__name__}); "
                f"set it to false, or take a model with other norms"
            )


def synchronise(model: nn.Module, device: torch.device) -> nn.Module:
    """Make each batch norm take its statistics over all processes: by torch's own `SyncBatchNorm`
    on accelerators; on a CPU, for which torch has none, by the same arithmetic over gloo."""
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            synchronised = CPUSyncBatchNorm(child.num_features, child.eps, child.momentum)
            synchronised.load_state_dict(child.state_dict())
            setattr(model, name, synchronised)
        else:
            synchronise(child, device)
    return model


class CPUSyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over all processes of a gloo group, each of which must hold equally many values,
    as fastlab's batches do. With one process it is `BatchNorm2d`."""

    def __init__(self, features: int, eps: float, momentum: float | None) -> None:
        super().__init__(features, eps, momentum)
        # Not at the class, since this imports torch's compiler, which takes a second.
        self._normalise = torch.compiler.disable(_SyncNorm.apply)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        out, mean, var, count = self._normalise(input, self.weight, self.bias, self.eps)
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        return out


def _wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32, or in float64 if it has it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _channel_sum(x: torch.Tensor) -> torch.Tensor:
    """[b, c, h, w] to [c]."""
    return _wide(x).sum(dim=(0, 2, 3))


def _reduced_mean(total: torch.Tensor, count: int) -> torch.Tensor:
    """Collective: add `total` over all processes, in place, and divide it by `count`."""
    dist.all_reduce(total)
    return total / count


class _SyncNorm(torch.autograd.Function):
    """Batch normalisation and its gradient (Ioffe and Szegedy, 2015). The mean comes first and the
    deviations from it second, so that no cancellation makes the statistics differ from those of a
    single process."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = _reduced_mean(_channel_sum(x), count)
        centred = _wide(x) - mean[:, None, None]
        var = _reduced_mean(_channel_sum(centred * centred), count)
        scale = torch.rsqrt(var + eps)
        normal = centred * scale[:, None, None]
        ctx.save_for_backward(normal, weight, scale)
        ctx.count = count
        ctx.mark_non_differentiable(mean, var)
        out = normal * weight[:, None, None] + bias[:, None, None]
        return out.to(x.dtype), mean, var, count

    @staticmethod
    def backward(ctx, *gradients):
        normal, weight, scale = ctx.saved_tensors
        grad = _wide(gradients[0])
        # These sums are this process's share; the reduction of gradients adds those of the others.
        grad_bias, grad_weight = _channel_sum(grad), _channel_sum(grad * normal)
        shared = torch.stack([grad_bias, grad_weight])
        mean_grad, mean_product = _reduced_mean(shared.clone(), ctx.count)[:, :, None, None]
        factor = (weight * scale)[:, None, None]
        grad_x = factor * (grad - mean_grad - normal * mean_product)
        return grad_x, grad_weight, grad_bias, None
