"""Figures of training and evaluation: kept on the device as sums, reduced once over all ranks."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from fastlab.compiling import compiled

_WARM_UP_STEPS = 5


@dataclass(frozen=True)
class Figures:
    """Figures of a whole split, over all processes."""

    loss: float
    """Mean cross-entropy, nats an image, without label smoothing."""
    correct1: int
    correct5: int
    images: int

    @property
    def top1(self) -> float:
        return self.correct1 / self.images

    @property
    def top5(self) -> float:
        return self.correct5 / self.images


class Sums:
    """Running sums on the device: `values` is float64 [4], as `batch_sums` gives them."""

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(4, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> None:
        """Add a batch, as `batch_sums` takes it. Does not wait for the device."""
        self.values += batch_sums(logits, labels, mask)

    def reduce(self, accelerator: Accelerator) -> Figures:
        """The figures over all processes, the same on each."""
        loss, top1, top5, images = accelerator.reduce(self.values.clone(), "sum").tolist()
        return Figures(loss / max(images, 1), int(top1), int(top5), int(images))


class Throughput:
    """Images per second of an epoch, without the first steps of the process and of each size of
    images, which compile, tune and fill caches."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._launched = 0  # by this process with images of this size, in all epochs

    def warm_up_again(self) -> None:
        """The next steps take images of another size."""
        self._launched = 0

    def start(self, steps: int) -> None:
        """Begin an epoch of which so many steps are left. Where these are few, half of them warm
        up."""
        self._warm_up = min(max(0, _WARM_UP_STEPS - self._launched), steps // 2)
        self._timed_from = self._launched + self._warm_up
        self._steps = steps - self._warm_up
        self._started = time.perf_counter()

    def step(self) -> None:
        """A step was launched."""
        self._launched += 1
        if self._warm_up and self._launched == self._timed_from:
            wait_for_device(self._device)
            self._started = time.perf_counter()

    def images_per_second(self, batch_size: int) -> float:
        """Call it after the device was waited for. `batch_size` is over all ranks."""
        return self._steps * batch_size / (time.perf_counter() - self._started)


def wait_for_device(device: torch.device) -> None:
    """Block until a GPU has done all that was queued; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def make_loss(compile: bool) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """`loss_and_sums`, compiled if asked: then it is one kernel a pass, where PyTorch launches some
    thirty."""
    return compiled(loss_and_sums, dynamic=False) if compile else loss_and_sums


def loss_and_sums(
    logits: torch.Tensor,
    smoothing: float,
    labels: torch.Tensor,
    mask: torch.Tensor,
    partners: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The training loss (scalar, at least fp32: mean cross-entropy with label `smoothing`) and
    `batch_sums` of the same logits. All from `labels` on is that of a `Batch`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if partners is None or weights is None:
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    else:
        loss = mixed_cross_entropy(logits, labels, partners, weights, smoothing).mean()
    return loss, batch_sums(logits.detach(), labels, mask, partners, weights)


def mixed_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    partners: torch.Tensor,
    weights: torch.Tensor,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """[b]: the cross-entropy of each image's label times its weight, and of its partner's label
    times the rest."""
    own, other = (
        F.cross_entropy(logits, each, reduction="none", label_smoothing=smoothing)
        for each in (labels, partners)
    )
    return weights * own + (1 - weights) * other


def batch_sums(
    logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    partners: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """float64 [4]: sums of cross-entropy, top-1 hits, top-5 hits and images over one batch.
    `logits` is [b, classes]; the rest is that of a `Batch`. Of mixed images, it takes the mixed
    cross-entropy, and hits of the label with the larger weight, or the image's own in a tie.

    A label is a top-k hit where fewer than k classes score higher, or as high with a lower index:
    of tied classes, one alone is the first.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if partners is None or weights is None:
        loss = F.cross_entropy(logits, labels, reduction="none")
    else:
        loss = mixed_cross_entropy(logits, labels, partners, weights)
        labels = torch.where(weights >= 0.5, labels, partners)
    score = logits.gather(1, labels[:, None])  # of the true class
    index = torch.arange(logits.shape[1], device=logits.device)
    ahead = (logits > score) | ((logits == score) & (index < labels[:, None]))
    # NaN is never a hit.
    rank = torch.where(score[:, 0].isnan(), 5, ahead.sum(dim=1))
    columns = torch.stack([loss, rank < 1, rank < 5, torch.ones_like(loss)]).double()
    return torch.where(mask, columns, 0).sum(dim=1)
