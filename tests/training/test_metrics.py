"""Sums of loss and hits, compared with sorting in plain Python and with torch's own mean."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlab.training import metrics
from fastlab.training.metrics import Sums, Throughput, batch_sums, loss_and_sums

ALONE: Any = SimpleNamespace(reduce=lambda values, how: values)
QUICK = settings(max_examples=80, deadline=None, database=None, derandomize=True)


def hits(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, k: int) -> int:
    """How many labels are among the k best classes, of which a lower index comes first in a tie."""
    total = 0
    for row, label, counts in zip(logits.tolist(), labels.tolist(), mask.tolist(), strict=True):
        ranking = sorted(range(len(row)), key=lambda c: (-row[c], c))
        total += counts and label in ranking[:k]
    return total


@st.composite
def batches(draw):
    """Logits, labels and mask of two classes or more. Few distinct values make many ties."""
    size, classes = draw(st.integers(1, 6)), draw(st.integers(2, 9))
    row = st.lists(st.sampled_from([-2.0, 0.0, 0.5, 3.0]), min_size=classes, max_size=classes)
    logits = draw(st.lists(row, min_size=size, max_size=size))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=size, max_size=size))
    mask = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    return torch.tensor(logits), torch.tensor(labels), torch.tensor(mask)


@QUICK
@given(batch=batches(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_sums_are_those_of_plain_python(batch, dtype):
    logits, labels, mask = batch  # these values are exact in each dtype
    loss, top1, top5, images = batch_sums(logits.to(dtype), labels, mask).tolist()
    assert images == sum(mask.tolist())
    assert top1 == hits(logits, labels, mask, 1)
    assert top5 == hits(logits, labels, mask, 5)
    expected = F.cross_entropy(logits[mask], labels[mask], reduction="sum").item()
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-6)


@QUICK
@given(batch=batches(), cut=st.integers(0, 6))
def test_the_sums_of_two_parts_of_a_batch_add_up_to_its_own(batch, cut):
    parts = zip(*(tensor.split([min(cut, len(tensor)), max(0, len(tensor) - cut)])
                  for tensor in batch), strict=True)  # fmt: skip
    added = sum(batch_sums(*part) for part in parts)
    torch.testing.assert_close(added, batch_sums(*batch))


def test_figures_of_masked_batches_are_those_of_the_unmasked_images():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, 12, generator=generator)
    labels = torch.randint(12, (40,), generator=generator)
    mask = torch.rand(40, generator=generator) < 0.7
    sums = Sums(torch.device("cpu"))
    for part in zip(logits.split(16), labels.split(16), mask.split(16), strict=True):
        sums.add(*part)
    figures = sums.reduce(ALONE)
    assert figures.images == int(mask.sum())
    assert figures.loss == pytest.approx(F.cross_entropy(logits[mask], labels[mask]).item())
    assert figures.top1 == hits(logits, labels, mask, 1) / figures.images
    assert figures.top5 == hits(logits, labels, mask, 5) / figures.images


def test_the_loss_of_bfloat16_logits_is_computed_in_higher_precision():
    logits = torch.randn(256, 200, generator=torch.Generator().manual_seed(2)).bfloat16()
    labels = torch.arange(256) % 200
    loss = batch_sums(logits, labels, torch.ones(256, dtype=torch.bool))[0].item()
    assert loss == pytest.approx(F.cross_entropy(logits.double(), labels).item() * 256, rel=1e-6)


@pytest.mark.parametrize(("label", "top1", "top5"), [(0, 1, 1), (1, 0, 1), (4, 0, 1), (5, 0, 0)])
def test_in_a_tie_the_class_with_the_lower_index_comes_first(label, top1, top5):
    sums = batch_sums(torch.zeros(1, 8), torch.tensor([label]), torch.tensor([True]))
    assert sums[1:3].tolist() == [top1, top5]


@pytest.mark.parametrize("classes", [3, 8])
def test_nan_is_no_hit_and_makes_the_loss_nan(classes):
    logits = torch.full((1, classes), math.nan)
    sums = batch_sums(logits, torch.tensor([0]), torch.tensor([True]))
    assert sums[1:].tolist() == [0, 0, 1]
    assert sums[0].isnan()


def test_nan_on_padding_does_not_reach_the_sums():
    logits = torch.tensor([[math.nan, math.nan], [0.0, 0.0]])
    sums = batch_sums(logits, torch.tensor([0, 0]), torch.tensor([False, True]))
    assert sums.tolist() == pytest.approx([math.log(2), 1, 1, 1])


@pytest.mark.parametrize("label", [0, 1, 2])
def test_with_fewer_than_five_classes_every_label_is_in_the_top_five(label):
    sums = batch_sums(torch.tensor([[0.3, 0.2, 0.1]]), torch.tensor([label]), torch.tensor([True]))
    assert sums[1:3].tolist() == [label == 0, 1]


LOGITS = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0], [0.5, 0.0, 0.0]])
LABELS, PARTNERS = torch.tensor([0, 2, 1]), torch.tensor([1, 1, 0])
WEIGHTS = torch.tensor([0.75, 0.25, 0.5])
ALL = torch.ones(3, dtype=torch.bool)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_mixed_loss_is_that_of_torch_for_shares_of_classes(smoothing):
    shares = torch.tensor([[0.75, 0.25, 0], [0, 0.75, 0.25], [0.5, 0.5, 0]])
    loss, sums = loss_and_sums(LOGITS, smoothing, LABELS, ALL, PARTNERS, WEIGHTS)
    expected = F.cross_entropy(LOGITS, shares, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert sums[0].item() == pytest.approx(3 * F.cross_entropy(LOGITS, shares).item(), rel=1e-6)


def test_a_mixed_loss_is_the_one_computed_by_hand():
    """Two classes whose scores differ by log 3 have the probabilities 3/4 and 1/4."""
    logits, labels = torch.tensor([[math.log(3), 0.0]]), torch.tensor([0])
    arguments = torch.tensor([True]), torch.tensor([1]), torch.tensor([0.25])
    loss, _ = loss_and_sums(logits, 0.0, labels, *arguments)
    assert loss.item() == pytest.approx(0.25 * math.log(4 / 3) + 0.75 * math.log(4))


def test_a_hit_is_that_of_the_label_with_the_larger_weight_and_of_the_own_in_a_tie():
    """The best class is 0, 1 and 0: the own label, the partner's, and the partner's in a tie."""
    hit = [batch_sums(LOGITS, LABELS, ALL & (torch.arange(3) == i), PARTNERS, WEIGHTS)[1].item()
           for i in range(3)]  # fmt: skip
    assert hit == [1, 1, 0]


@pytest.fixture
def epoch_rate(monkeypatch):
    """Runs an epoch by a clock: the images/s of a batch of 8 whose steps take so many seconds."""
    clock, throughput = [0.0], Throughput(torch.device("cpu"))
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def run(*seconds: float) -> float:
        throughput.start(len(seconds))
        for duration in seconds:
            clock[0] += duration
            throughput.step()
        return throughput.images_per_second(8)

    return run


def test_the_first_five_steps_of_a_process_are_not_timed(epoch_rate):
    assert epoch_rate(*[100.0] * 5, *[0.5] * 15) == 16
    assert epoch_rate(*[0.25] * 3) == 32  # no step of the next epoch warms up


def test_where_few_steps_are_left_half_of_them_are_timed(epoch_rate):
    assert epoch_rate(100.0, 100.0, 0.5, 0.5) == 16
    assert epoch_rate(100.0, 0.5, 0.5) == 16  # its first step is the fifth of the process
    assert epoch_rate(0.5) == 16
    assert epoch_rate(0.25, 0.25) == 32


def test_a_single_step_is_timed(epoch_rate):
    assert epoch_rate(0.5) == 16
