from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ceilings, timing
from benchmarks.measurements import new_session

CPU = torch.device("cpu")
GPU = SimpleNamespace(type="cuda")


class Event:
    """An event of a device that takes 250 ms from event to event."""

    recorded = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.recorded += 1
        self.at = 250.0 * Event.recorded

    def synchronize(self):
        assert self.at

    def elapsed_time(self, other):
        return other.at - self.at


def test_a_gpu_is_timed_by_cuda_events(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    monkeypatch.setattr(timing, "_host_seconds", lambda work: work() or 0.125)
    seconds = timing.timed(lambda: calls.append("work"), GPU)
    assert seconds == (0.25, 0.125) and calls == ["wait", "work"]


def test_a_round_repeats_calls_for_at_least_its_time(monkeypatch):
    calls = []

    def timed(work, device):
        before = len(calls)
        work()
        return timing.Seconds((len(calls) - before) * 0.02, 0.0)

    monkeypatch.setattr(ceilings, "timed", timed)
    assert ceilings._seconds(lambda: calls.append(1), GPU) == pytest.approx([0.02] * 7)
    assert len(calls) == 1 + 1 + 7 * 3
    monkeypatch.setattr(ceilings, "timed", lambda work, device: timing.Seconds(9.0, 9.0))
    assert ceilings._seconds(lambda: None, GPU) == [9.0]


def test_the_flop_of_a_convolution_are_those_that_torch_counts():
    with FlopCounterMode(display=False) as counter:
        gradients = ceilings._convolution(2, 16, 8, CPU)()
    assert counter.get_total_flops() == ceilings.convolution_flop(2, 16, 8)
    assert all(g.is_contiguous(memory_format=torch.channels_last) for g in gradients)


def test_every_ceiling_has_rounds_and_settings_are_restored(monkeypatch):
    """On a CPU these are all ceilings that need neither pinned memory nor TF32."""
    seen = []

    def seconds(work, device):
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark))
        return [0.5, 0.25]

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    monkeypatch.setattr(ceilings, "_seconds", seconds)
    records = ceilings.measure_rounds(CPU)
    convolutions = ["conv_bf16_64x32", "conv_bf16_128x16", "conv_bf16_256x8"]
    assert [r.case for r in records] == ["matmul_fp32", "matmul_bf16", *convolutions, "copy"]
    assert seen == [("highest", True)] * 5 + [before]
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == before
    assert records[0].rounds == [2 * 1024**3 / 0.5, 2 * 1024**3 / 0.25]
    assert records[-1].rounds == [2 * 2**27 / 0.5, 2 * 2**27 / 0.25]
    assert ceilings.measure(CPU)["copy"] == records[-1].median
    assert "| copy | 0.0008053 Tbytes/s ± 33% |" in ceilings.table(new_session("ceilings", records))
