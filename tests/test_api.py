"""The Python interface, against Pillow's pixels, the commands' output and the files of a run."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastlab
from fastlab import config as configs
from fastlab import train as training
from fastlab.cli import main
from fastlab.dataset.convert import Options, convert
from fastlab.training import setup
from tests.trainings import ROOT, assert_same_run, command, metrics

DEMO = ROOT / "configs" / "demo.toml"
TINY = {
    "model": {"width": 4, "dropout_conv": 0.1},
    "train": {
        "batch_size": 16,
        "eval_batch_size": 7,
        "epochs": 3,
        "checkpoint_every": 2,
        "checkpoint_seconds": 0,
        "ema": 0.9,
        "deterministic": True,
    },
}
"""The settings of `tests.trainings.TINY`, and where there is a GPU the same weights in any run."""


@pytest.fixture(scope="module")
def trained(synth_source, tmp_path_factory) -> Path:
    """A folder with the dataset ``data`` and the run ``run``, which the command trained."""
    folder = tmp_path_factory.mktemp("trained")
    convert(synth_source, folder / "data", Options())
    arguments = command(folder / "data", folder / "run", "train.deterministic=true")
    assert main(["train", *arguments]) == 0
    return folder


@pytest.fixture
def pictures(synth_source) -> list[Path]:
    return sorted((synth_source / "val" / "images").iterdir())[:3]


def settings(folder: Path, **changes: dict) -> dict:
    return {**TINY, "data": {"path": folder / "data"}, **changes}


def python(code: str, folder: Path) -> str:
    """Run `code` as a script in a process of its own, in `folder`. Returns what it printed."""
    script = folder / "script.py"
    script.write_text(textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Importing


def test_import_fastlab_imports_nothing_slow(tmp_path):
    code = """
        import sys, fastlab
        assert fastlab.__version__ and "train" in dir(fastlab)
        fastlab.Config, fastlab.UserError, fastlab.load_dataset, fastlab.load_run
        slow = {"torch", "numpy", "jinja2", "accelerate", "PIL", "numba"}
        print(slow & set(sys.modules))
    """
    assert python(code, tmp_path) == "set()\n"


CALLED = """
import fastlab, inspect, sys
for name in ({names}):
    try:
        getattr(fastlab, name)("missing.toml", out="out")
    except fastlab.UserError as error:
        print(error)
    assert "out" in inspect.signature(getattr(fastlab, name)).parameters
    assert getattr(fastlab, name) is sys.modules["fastlab." + name]
from fastlab import study
import fastlab.study.command
assert study.command.run is fastlab.study.command.run
"""


@pytest.mark.parametrize(
    ("first", "names"),
    [
        ("import fastlab", '"train", "study"'),
        ("from fastlab.study import spec", '"study", "study"'),  # which needs no torch
        ("import fastlab.study.command", '"study", "study"'),
        ("from fastlab import study", '"study", "study"'),
    ],
)
def test_train_and_study_are_functions_and_modules_in_any_order(first, names, tmp_path):
    lines = python(f"{first}\n{CALLED.format(names=names)}", tmp_path).splitlines()
    assert len(lines) == 2 and all("missing.toml: cannot be read" in line for line in lines)
    assert training is fastlab.train is sys.modules["fastlab.train"]  # here, the module came first
    assert training.Trainer is training.__dict__["Trainer"] and callable(training)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        fastlab.trian  # noqa: B018


# Datasets and batches


def test_a_dataset_has_the_pixels_and_labels_of_its_originals(tmp_path):
    random, labels = np.random.default_rng(0), {}
    for name in ("bird", "cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(10):
            pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
            labels[pixels.tobytes()] = name
    fastlab.convert(tmp_path / "photos", tmp_path / "data", image_size=16, val_fraction=0.2)
    dataset = fastlab.load_dataset(tmp_path / "data")
    assert (dataset.classes, dataset.splits) == (["bird", "cat", "dog"], {"train": 24, "val": 6})
    assert dataset.image_size == 16 and "24" in repr(dataset)
    found = {
        image.tobytes(): dataset.classes[label]
        for split in dataset.splits
        for image, label in zip(dataset.images(split), dataset.labels(split), strict=True)
    }
    assert found == labels
    assert np.bincount(dataset.labels("val")).tolist() == [2, 2, 2]
    assert isinstance(dataset.images("train"), np.memmap)


def test_a_script_that_converts_needs_no_guard(synth_source, tmp_path):
    code = f"import fastlab\nprint(fastlab.convert({str(synth_source)!r}, 'data').splits)"
    assert python(code, tmp_path) == "{'train': 80, 'val': 20}\n"


def test_the_batches_are_those_of_a_training(trained):
    """Each iteration is the next epoch, in the order and with the augmentation of `Trainer`."""
    cfg = configs.changed(
        configs.Config(),
        {
            "data": {"path": str(trained / "data")},
            "augment": {"flip": True, "mixup": 0.2},
            "train": {"batch_size": 16, "seed": 5, "precision": "fp32", "compile": False},
        },
    )
    dataset, accelerator = fastlab.load_dataset(trained / "data"), setup.make_accelerator(cfg)
    expected = setup.open_split(cfg, dataset.manifest, accelerator, "train", train=True)
    options = {"augment": {"flip": True, "mixup": 0.2}, "seed": 5, "device": accelerator.device}
    loader = fastlab.pipeline(dataset, "train", batch_size=16, **options)
    assert len(loader) == len(list(loader)) == 5
    for batch, other in zip(loader, expected.epoch(1), strict=True):
        assert all(one.equal(two) for one, two in zip(batch, other, strict=True))
    assert loader.epoch == 2


def test_validation_batches_hold_each_image_once_in_order(trained):
    dataset = fastlab.load_dataset(trained / "data")
    batches = list(fastlab.pipeline(dataset, "val", batch_size=8, device="cpu"))
    images = torch.cat([batch.images[batch.mask] for batch in batches]).permute(0, 2, 3, 1).double()
    mean, std = (torch.tensor(each) for each in (dataset.manifest.mean, dataset.manifest.std))
    pixels = ((images * std + mean) * 255).round().byte()
    assert np.array_equal(pixels.numpy(), dataset.images("val"))
    assert torch.cat([b.labels[b.mask] for b in batches]).tolist() == [*dataset.labels("val")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_lie_on_a_gpu_where_there_is_one(trained):
    options = {"batch_size": 16, "augment": {"flip": True}}
    here, there = (
        fastlab.pipeline(trained / "data", "train", device=device, **options)
        for device in ("cpu", None)
    )
    for one, other in zip(here, there, strict=True):
        assert other.images.is_cuda and other.images.cpu().equal(one.images)


# Runs


def test_train_gives_the_weights_of_the_command(trained, tmp_path):
    sections = settings(trained)
    run = fastlab.train(DEMO, tmp_path / "run", **sections)
    assert_same_run(run.path, trained / "run")
    given = {name: {**table} for name, table in configs.read_toml(DEMO).items()}
    for name, table in sections.items():
        given[name] |= table
    assert_same_run(fastlab.train(given, tmp_path / "dict").path, trained / "run")
    again = fastlab.train(run.config, tmp_path / "again", train={"epochs": 1}, init=run)
    assert "initial.safetensors" in os.listdir(again.path) and len(again.metrics) == 1


def test_an_interrupted_training_resumes_to_the_same_weights(trained, tmp_path, monkeypatch):
    epoch = training.epoch

    def interrupted(trainer):
        if trainer.progress.epoch == 1:
            os.kill(os.getpid(), signal.SIGINT)
        epoch(trainer)

    with monkeypatch.context() as patch:
        patch.setattr("fastlab.train.epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fastlab.train(DEMO, tmp_path / "run", **settings(trained))
    run = fastlab.load_run(tmp_path / "run")
    assert run.summary["status"] == "interrupted" and len(run.metrics) < 3
    assert_same_run(fastlab.resume(run, train={"log_every": 7}).path, trained / "run")


def test_a_training_that_diverges_raises_one_line(trained, tmp_path):
    with pytest.raises(fastlab.UserError, match="not a finite number") as caught:
        sections = settings(trained, optim={"lr": 1e30, "name": "sgd"})
        fastlab.train(DEMO, tmp_path / "run", **sections)
    assert "\n" not in str(caught.value)


def test_a_run_tells_its_metrics_classes_and_configuration(trained):
    run = fastlab.load_run(trained / "run")
    recorded = metrics(run.path)
    assert [each["val_top1"] for each in run.metrics] == [each["val_top1"] for each in recorded]
    assert run.config == configs.load(run.path / "config.toml")
    assert run.summary["status"] == "finished" and "3 of 3 epochs, finished" in repr(run)
    assert run.classes == fastlab.load_dataset(trained / "data").classes
    assert not run.model.training
    count = sum(parameter.numel() for parameter in run.model.parameters())
    assert count == run.summary["parameters"]


def test_predict_gives_the_figures_of_the_command(trained, pictures, capsys):
    capsys.readouterr()
    names = [str(path) for path in pictures]
    assert main(["predict", str(trained / "run"), *names, "--json", "--top", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = [[(p["name"], p["probability"]) for p in line["predicted"]] for line in lines]
    run = fastlab.load_run(trained / "run")
    assert run.predict(pictures, top=2) == expected
    # Alone, an image may differ in the last bits.
    alone = [[(name, pytest.approx(share, abs=1e-6)) for name, share in expected[0]]]
    assert run.predict(names[0], top=2) == alone
    opened = [Image.open(path) for path in pictures]
    assert run.predict(opened, top=2) == expected
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in opened])
    assert run.predict(pixels, top=2) == run.predict([*pixels], top=2) == expected
    assert run.predict(pixels[0], top=2) == alone and run.predict([]) == []


def test_an_open_image_is_prepared_as_its_file(trained, tmp_path):
    """Another size, a palette with transparency, four inks and an orientation."""
    source = Image.effect_noise((90, 70), 80).convert("RGB")
    upside_down = Image.Exif()
    upside_down[0x0112] = 3
    source.save(tmp_path / "wide.png")
    source.quantize(16).save(tmp_path / "palette.gif")
    source.convert("CMYK").save(tmp_path / "inks.tif")
    source.save(tmp_path / "turned.png", exif=upside_down)
    run = fastlab.load_run(trained / "run")
    for path in sorted(tmp_path.iterdir()):
        with Image.open(path) as image:
            assert run.predict(image) == run.predict(path), path.name
    assert run.predict(tmp_path / "turned.png") != run.predict(tmp_path / "wide.png")
    assert run.predict(np.asarray(source)) == run.predict(tmp_path / "wide.png")


def test_predicting_leaves_the_random_numbers_of_the_caller_alone(trained, pictures):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    run = fastlab.load_run(trained / "run")
    run.predict(pictures)
    run.evaluate()
    assert torch.get_rng_state().equal(before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_evaluate_gives_the_figures_of_the_command(trained, capsys):
    arguments = ["evaluate", str(trained / "run"), "--tta", "flip", "--checkpoint", "last"]
    capsys.readouterr()
    assert main([*arguments, "--json"]) == main(arguments) == 0
    as_json, line = capsys.readouterr().out.splitlines()
    evaluation = fastlab.load_run(trained / "run").evaluate(tta="flip", checkpoint="last")
    assert asdict(evaluation) == json.loads(as_json) and str(evaluation) == line
    best = fastlab.load_run(trained / "run").evaluate("val", data=trained / "data")
    assert best.top1 == max(each["val_top1"] for each in metrics(trained / "run"))
    assert replace(best, tta="flip", checkpoint="last") != evaluation


# Studies


def test_a_study_in_a_thread_returns_its_runs(trained, tmp_path):
    (tmp_path / "rate.toml").write_text(
        f'title = "Rate"\nbase = "{DEMO}"\nfactor = "optim.lr"\nvalues = [0.01, 1e30]\n'
    )
    changes = {**settings(trained), "train": {**TINY["train"], "epochs": 1}}
    studies = []

    def call() -> None:
        rate = tmp_path / "rate.toml"
        studies.append(fastlab.study(rate, tmp_path / "out", seeds=1, **changes))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    [study] = studies
    [run] = study.runs
    assert run.config.train.epochs == 1 and run.config.model.width == 4
    good, bad = study.table
    assert (good["study"], good["row"], good["seeds"], good["failed"]) == ("rate", "0.01", 1, "")
    assert good["top1"] == run.metrics[0]["val_top1"] and good["top1_half"] is None
    assert bad["seeds"] == 0 and "not a finite number" in bad["failed"] and bad["top1"] is None
    assert study.report.is_file() and study.path == tmp_path / "out"


@pytest.mark.parametrize(("status", "signals"), [(130, ()), (143, (signal.SIGTERM,))])
def test_a_study_that_a_signal_stops_raises_an_interrupt(status, signals, tmp_path, monkeypatch):
    monkeypatch.setattr("fastlab.study.command.run", lambda request: status)
    with pytest.raises(KeyboardInterrupt) as caught:
        fastlab.study(tmp_path / "any.toml", tmp_path / "out")
    assert caught.value.args == signals


# Mistakes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: fastlab.train({"train": {"epoch": 1}}, "out"), "train.epoch: unknown key; "),
        (lambda run: fastlab.train({}, "out", train={"epochs": 0}), "train.epochs: expected a "),
        (lambda run: fastlab.train({}, "out", trian={}), "trian: unknown section; nearest "),
        (lambda run: fastlab.train({}, "out", train=3), "train: expected a section, [train], "),
        (lambda run: fastlab.train(run.config, run), "is not empty; resume with: "),
        (lambda run: fastlab.train("missing.toml", "out"), "missing.toml: cannot be read"),
        (lambda run: fastlab.resume(run, model={"width": 8}), "model.width: a resumed run cannot"),
        (lambda run: fastlab.resume("missing"), "missing: not a run directory"),
        (lambda run: fastlab.load_run("missing"), "missing: not a run directory"),
        (lambda run: fastlab.load_dataset("missing"), "missing: not a dataset directory"),
        (lambda run: fastlab.convert("missing", "out"), "missing: no such directory"),
        (lambda run: fastlab.study("missing.toml", "out"), "missing.toml: cannot be read"),
        (lambda run: fastlab.study("missing.toml", "out", jobs=0), "jobs: expected a whole"),
        (lambda run: fastlab.study("x.toml", "out", optim={"lt": 1}), "optim.lt: unknown key"),
        (lambda run: run.predict("missing.png"), "missing.png: cannot be read"),
        (lambda run: run.predict(np.zeros((4, 4, 3))), "got ndarray of float64 [4, 4, 3]"),
        (lambda run: run.predict(run, top=0), "top: expected a whole number at least 1"),
        (lambda run: run.evaluate("tset"), "has no split 'tset'; it has: train, val"),
        (lambda run: run.evaluate(checkpoint="bset"), 'checkpoint: expected one of "best", '),
        (lambda run: run.evaluate(tta="flop"), 'tta: expected one of "none", "flip"'),
    ],
)
def test_a_mistake_raises_one_line(call, message, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = fastlab.load_run(trained / "run")
    with pytest.raises(fastlab.UserError) as caught:
        call(run)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) in ([], ["out"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "train.batch_size: expected a whole number at least 1, got 0"),
        ({"batch_size": 8, "split": "tset"}, "has no split 'tset'"),
        ({"batch_size": 8, "engine": "dail"}, "data.pipeline: expected one of"),
        ({"batch_size": 8, "augment": {"flop": True}}, "augment.flop: unknown key; nearest"),
        ({"batch_size": 8, "device": "gpu"}, "device: Expected one of cpu, cuda"),
        ({"batch_size": 8, "engine": "torchvision"}, "tar"),
    ],
)
def test_a_mistake_in_a_pipeline_raises_one_line(options, message, trained):
    with pytest.raises(fastlab.UserError) as caught:
        fastlab.pipeline(trained / "data", **{"split": "train", **options})
    assert message in str(caught.value) and "\n" not in str(caught.value)
