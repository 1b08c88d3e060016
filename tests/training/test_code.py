"""What a second training of a process compiles."""

import itertools
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fastlab import config as configs
from fastlab import train as training
from fastlab.runs import RunDir
from fastlab.training import metrics, setup

TINY = ("model.width=4", "train.batch_size=16", "train.eval_batch_size=20", "train.precision=fp32")


def train_two_steps(dataset: Path, out: Path, *changes: str) -> None:
    """Train two steps and evaluate on whatever batch comes first."""
    cfg = configs.load(None, [f"data.path={dataset}", 'model.name="cnn8"', *TINY, *changes])
    with setup.torch_settings(cfg):
        trainer = training.Trainer(cfg, RunDir(out), setup.make_accelerator(cfg))
        trainer.net.train()
        for _, batch in zip(range(2), trainer.batches(0), strict=False):
            trainer.step(batch)
        trainer.net.eval()
        with torch.no_grad():
            trainer.net(next(iter(trainer.val_data.epoch(0))).images)


def test_only_a_training_of_other_shapes_or_constants_compiles_anew(
    synth_dataset, tmp_path, monkeypatch
):
    counter = CompileCounter()
    for module in (setup, metrics):
        monkeypatch.setattr(
            module, "compiled", lambda f, **options: torch.compile(f, backend=counter, **options)
        )
    counts = [
        (counter.frame_count, train_two_steps(synth_dataset, tmp_path, *changes))[0]
        for changes in (
            [],
            ["train.seed=1", "optim.lr=0.1"],
            ["optim.name=sgd", "schedule.factor=0.5", "optim.lr=0.1"],
            ["model.dropout_conv=0.5"],
            [],
        )
    ]
    counts.append(counter.frame_count)
    compiled = [after - before for before, after in itertools.pairwise(counts)]
    whole = compiled[0]
    assert whole > 0
    assert compiled == [whole, 0, 0, whole, whole]


@pytest.fixture(autouse=True)
def _forget():
    yield
    setup._compiled.clear()
    torch.compiler.reset()
