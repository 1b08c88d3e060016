"""Test-time flips: their figures, on several processes and with padding, and their labels."""

import io
import json
from contextlib import redirect_stdout
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fastlab.cli import main
from fastlab.training.evaluate import evaluate
from pipelines.base import Batch
from tests.training.ranks import on_ranks
from tests.trainings import command, metrics


class Means(nn.Module):
    """The mean of each channel: equal for an image and its mirror image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3))


class FirstColumn(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., 0].mean(dim=2)


def batches(first: int, last: int) -> list[Batch]:
    """Images `first` to `last` of eleven, whole numbers, four a batch; padding is NaN."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(-8, 9, (11, 6, 4, 4), generator=generator).double()[first:last]
    labels = torch.randint(6, (11,), generator=generator)[first:last]
    missing = -len(images) % 4
    images = torch.cat([images, torch.full((missing, 6, 4, 4), torch.nan)])
    labels = torch.cat([labels, labels.new_zeros(missing)])
    mask = torch.arange(len(images)) < last - first
    parts = zip(images.split(4), labels.split(4), mask.split(4), strict=True)
    return [Batch(*each) for each in parts]


def figures(net: nn.Module, tta: Any, processes: int = 1) -> list[Any]:
    """What each process finds, of which the first has seven of the images."""
    shares = [(0, 7), (7, 11)] if processes == 2 else [(0, 11)]

    def run(rank: Any) -> Any:
        rank.unwrap_model = lambda model: model
        data: Any = SimpleNamespace(epoch=lambda number: batches(*shares[rank.process_index]))
        return evaluate(net, data, rank, tta)

    return on_ranks(run, processes)


def test_flips_do_not_change_the_figures_of_a_symmetric_network():
    assert figures(Means(), "flip") == figures(Means(), "none")
    assert figures(FirstColumn(), "flip") != figures(FirstColumn(), "none")


def test_two_processes_find_the_figures_of_one_with_flips():
    [alone] = figures(FirstColumn(), "flip")
    first, second = figures(FirstColumn(), "flip", processes=2)
    assert first == second and alone.images == 11
    assert (first.images, first.correct1, first.correct5) == (11, alone.correct1, alone.correct5)
    assert first.loss == pytest.approx(alone.loss, rel=1e-12)


@pytest.fixture(scope="module")
def flipped(synth_dataset, tmp_path_factory):
    """A run that evaluates with flips."""
    run = tmp_path_factory.mktemp("flipped") / "run"
    sets = ("train.epochs=1", "evaluate.tta=flip")
    with redirect_stdout(io.StringIO()) as printed:
        assert main(["train", *command(synth_dataset, run, *sets)]) == 0
    lines = printed.getvalue().splitlines()
    (head,) = (line for line in lines if line.lstrip().startswith("epoch "))
    assert head.endswith("  val (tta=flip)")
    assert any(line.startswith("best validation top-1 (tta=flip) ") for line in lines)
    return run


def test_every_record_of_a_run_labels_its_figures(flipped):
    assert [line["tta"] for line in metrics(flipped)] == ["flip"]
    assert json.loads((flipped / "summary.json").read_text())["tta"] == "flip"
    events = b"".join(path.read_bytes() for path in (flipped / "tensorboard").glob("events*"))
    assert b"top1/val-flip" in events and b"top1/train" in events
    assert b"top1/train-flip" not in events


def test_evaluate_takes_the_setting_of_the_run_unless_told_otherwise(flipped, capsys):
    def evaluated(*options: str) -> str:
        assert main(["evaluate", str(flipped), *options]) == 0
        return capsys.readouterr().out

    assert " on val (tta=flip): loss " in evaluated()
    assert " on val: loss " in evaluated("--tta", "none")
    flip, plain = (json.loads(evaluated("--json", "--tta", tta)) for tta in ("flip", "none"))
    assert (flip["tta"], plain["tta"]) == ("flip", "none")
    [record] = metrics(flipped)
    assert flip["loss"] == pytest.approx(record["val_loss"], abs=1e-5)
    assert plain["loss"] != pytest.approx(flip["loss"], abs=1e-5)


def test_a_report_labels_the_run(flipped, tmp_path):
    page = tmp_path / "report.html"
    assert main(["report", str(flipped), "--out", str(page)]) == 0
    text = page.read_text()
    assert "run (tta=flip)</a>" in text
    assert "Sample predictions without tta: " in text


def test_a_resumed_run_cannot_change_it(flipped, capsys):
    """Its best epoch is chosen by comparing the figures of all epochs."""
    assert main(["train", "--resume", str(flipped), "--set", "evaluate.tta=none"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "evaluate.tta: a resumed run cannot change it" in line
