"""What a run records of its errors, against a plain count."""

import base64
import io
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastlab import config
from fastlab.dataset.manifest import read_manifest
from fastlab.predict import load_model
from fastlab.runs import RunDir
from fastlab.train import main
from fastlab.training.review import PAIRS, SAMPLES, WORST, counts, review
from tests.trainings import TINY, command, metrics


class Linear(nn.Module):
    """Logits that depend on every pixel, large enough for some to be wrong with certainty."""

    def __init__(self, classes: int, pixels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(classes, pixels, generator=generator) / 20)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ self.weight.T


CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


@pytest.fixture(scope="module", params=["cpu", CUDA])
def found(request, synth_dataset) -> Any:
    """The review of a made-up model, and what numpy finds in the files that it read."""
    manifest = read_manifest(synth_dataset)
    model = Linear(len(manifest.classes), 3 * manifest.image_size**2)
    # No batch is whole, and the last one has padding.
    cfg = config.load(None, [f"data.path={synth_dataset}", *TINY, "train.eval_batch_size=7"])
    device = torch.device(request.param)
    samples, errors = review(model.to(device), cfg, manifest, device)
    pixels = np.load(synth_dataset / "array" / "val-images.npy")
    labels = np.load(synth_dataset / "array" / "val-labels.npy").astype(int)
    scaled = (pixels / 255 - np.array(manifest.mean)) / np.array(manifest.std)
    logits = (
        scaled.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
        @ model.weight.detach().cpu().numpy().T
    )
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    names = [each.words for each in manifest.classes]
    expected = SimpleNamespace(pixels=pixels, labels=labels, shares=shares, names=names)
    return samples, errors, expected


def shown(sample: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(sample["png"]))))


def test_each_class_has_its_counts(found):
    _, errors, expected = found
    right = expected.shares.argmax(1) == expected.labels
    assert errors["classes"] == [
        {
            "name": name,
            "images": int((expected.labels == index).sum()),
            "correct": int(right[expected.labels == index].sum()),
        }
        for index, name in enumerate(expected.names)
    ]
    assert 0 < right.sum() < len(right)


def test_the_confused_pairs_are_those_of_a_plain_count(found):
    _, errors, expected = found
    counted: dict[tuple[str, str], int] = {}
    for label, guess in zip(expected.labels, expected.shares.argmax(1), strict=True):
        if label != guess:
            pair = expected.names[label], expected.names[guess]
            counted[pair] = counted.get(pair, 0) + 1
    pairs = [(pair["label"], pair["predicted"], pair["count"]) for pair in errors["confused"]]
    assert all(counted[label, predicted] == count for label, predicted, count in pairs)
    assert [count for *_, count in pairs] == sorted(counted.values(), reverse=True)[:PAIRS]


def test_the_worst_mistakes_are_the_surest_wrong_answers_with_their_pictures(found):
    _, errors, expected = found
    wrong = np.flatnonzero(expected.shares.argmax(1) != expected.labels)
    surest = wrong[np.argsort(-expected.shares.max(1)[wrong])][:WORST]
    assert len(errors["worst"]) == len(surest) > 1
    for mistake, row in zip(errors["worst"], surest, strict=True):
        best = mistake["predicted"][0]
        assert mistake["label"] == expected.names[expected.labels[row]]
        assert best["name"] == expected.names[expected.shares[row].argmax()]
        assert best["probability"] == pytest.approx(expected.shares[row].max(), abs=1e-5)
        assert np.array_equal(shown(mistake), expected.pixels[row])


def test_the_samples_are_evenly_spaced(found):
    samples, _, expected = found
    rows = np.linspace(0, len(expected.pixels) - 1, SAMPLES).astype(int)
    for sample, row in zip(samples, rows, strict=True):
        assert np.array_equal(shown(sample), expected.pixels[row])


def test_only_the_most_frequent_pairs_are_kept_and_none_that_never_occurs():
    confusion = np.arange(36).reshape(6, 6)
    confused = counts(confusion, list("abcdef"))["confused"]
    assert len(confused) == PAIRS
    assert confused[0] == {"label": "f", "predicted": "e", "count": 34}
    assert counts(np.diag([3, 0]), ["a", "b"])["confused"] == []


def test_a_model_without_a_mistake_has_none(synth_dataset):
    manifest = read_manifest(synth_dataset)
    labels = iter(torch.from_numpy(np.load(synth_dataset / "array" / "val-labels.npy")).long())

    class Oracle(Linear):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            answers = [next(labels, torch.tensor(0)) for _ in images]
            return nn.functional.one_hot(torch.stack(answers), self.weight.shape[0]).float()

    cfg = config.load(None, [f"data.path={synth_dataset}", *TINY])
    _, errors = review(Oracle(len(manifest.classes), 1), cfg, manifest, torch.device("cpu"))
    assert errors["confused"] == errors["worst"] == []
    assert all(each["correct"] == each["images"] for each in errors["classes"])


def test_a_training_records_the_errors_of_its_best_weights(synth_dataset, tmp_path):
    run = RunDir(tmp_path / "run")
    sets = ("train.epochs=3", "optim.lr=0.02", "train.compile=false")
    assert main(command(synth_dataset, run.path, *sets)) == 0
    record = json.loads(run.errors.read_text())
    best = max(line["val_correct1"] for line in metrics(run.path))
    assert sum(each["correct"] for each in record["classes"]) == best
    manifest, cfg = read_manifest(synth_dataset), run.load_config()
    model = load_model(run, cfg, len(manifest.classes), "best").cpu()
    _, errors = review(model, cfg, manifest, torch.device("cpu"))
    assert [errors[key] == record[key] for key in ("classes", "confused")] == [True, True]
