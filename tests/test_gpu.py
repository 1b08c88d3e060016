"""Bits, figures, waits and messages of real trainings on a CUDA device.

A test that also means something on a CPU runs there, too, so that an ordinary machine executes its
lines; with a simpler compiler than Inductor, which would take minutes.
"""

import json
import re
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch import nn
from torch._dynamo.utils import counters

from benchmarks import search
from benchmarks.records import energy
from fastlab import config, models
from fastlab import train as training
from fastlab.cli import main
from fastlab.config import AugmentConfig, DataConfig, ModelConfig
from fastlab.dataset.convert import Options, convert
from fastlab.dataset.formats.array import open_array
from fastlab.dataset.manifest import read_manifest
from fastlab.dataset.synth import synthesise
from fastlab.model_config import ModelName
from fastlab.models.dropout import DropoutKeys
from fastlab.runs import RunDir
from fastlab.traces.review import review_run
from fastlab.training.evaluate import evaluate
from fastlab.training.guards import Diverged
from fastlab.training.setup import DTYPES, compile_forward, make_accelerator, torch_settings
from pipelines import PipelineSpec, make_pipeline
from pipelines.augment import device_augmenter, make_augmenter
from pipelines.augment_cpu import augment_on_cpu
from pipelines.torchvision import nvjpeg, open_engine
from pipelines.uploads import uploaded
from tests.trainings import ROOT, TINY, assert_same_run, command, launch, same_weights, train

# Which warnings torch, Triton and Accelerate raise depends on the machine. fastlab raises none.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::UserWarning",
    "ignore::ResourceWarning",
)
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = pytest.param("cuda", marks=needs_gpu)
both_devices = pytest.mark.parametrize("device", ["cpu", CUDA], indirect=True)
gpu_only = pytest.mark.parametrize("device", [CUDA], indirect=True)

DETERMINISTIC = ("train.deterministic=true",)
NO_DROPOUT = ("model.dropout_conv=0", "model.dropout_stem=0", "model.dropout_fc=0")
# A model with torch's own dropout, and the settings at which such a model ignores the others.
OWN = "tests.models.own:network"
OTHER = (f"model.name={OWN}", "model.width=64", "model.dropout_conv=0.2")
OTHER = (*OTHER, "model.dropout_stem=0.15", "model.dropout_fc=0.2")
# One model for all tests that compile: the later ones find it in the compiler's cache.
SMALL = ("model.name=cnn8", "model.width=8", *NO_DROPOUT)


@pytest.fixture
def device(request, monkeypatch) -> Iterator[str]:
    """The device that Accelerate chooses. It would keep its choice for the whole process, and torch
    the functions that other tests compiled: both are reset before and after."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", str(request.param == "cpu").lower())
    if request.param == "cpu":
        monkeypatch.setattr(torch, "compile", _without_inductor(torch.compile))
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.compiler.reset()
    yield request.param
    AcceleratorState._reset_state(reset_partial_state=True)


def _without_inductor(compile: Callable) -> Callable:
    def with_simple_backend(function: Callable, **settings):
        return compile(function, backend="aot_eager", **settings)

    return with_simple_backend


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Ten classes: 160 training images, which are ten steps of 16, and 50 validation images."""
    root = tmp_path_factory.mktemp("gpu")
    synthesise(root / "originals", classes=10, per_class=16)
    convert(root / "originals", root / "dataset", Options())
    return root / "dataset"


@pytest.fixture
def make_trainer(device, dataset, tmp_path) -> Iterator[Callable[..., training.Trainer]]:
    """Makes a `Trainer` under the torch settings of its run, with the same initial weights at each
    call."""
    with ExitStack() as entered:

        def make(*overrides: str) -> training.Trainer:
            AcceleratorState._reset_state(reset_partial_state=True)
            torch.compiler.reset()
            sets = [f"data.path={dataset}", *TINY, *overrides]
            cfg = config.load(ROOT / "configs" / "demo.toml", sets)
            accelerator = make_accelerator(cfg)
            entered.enter_context(torch_settings(cfg))
            trainer = training.Trainer(cfg, RunDir(tmp_path / "run"), accelerator)
            assert trainer.device.type == device
            return trainer

        yield make


def precision_for(device: str) -> str:
    """bf16 on a GPU, as in a user's training. Many CPUs have no instructions for it."""
    return f"train.precision={'bf16' if device == 'cuda' else 'fp32'}"


def take_steps(trainer: training.Trainer, batches: Iterator, count: int) -> torch.Tensor:
    """Take `count` steps. Returns the loss of each, [count] on the device: by how much the step
    increased the epoch's sum of losses."""
    totals = [trainer.sums.values[0].clone()]
    for batch in islice(batches, count):
        trainer.step(batch)
        totals.append(trainer.sums.values[0].clone())
    return torch.stack(totals).diff() / trainer.cfg.train.batch_size


# Data

AUGMENTATIONS = [
    AugmentConfig(crop_scale=0.4),
    AugmentConfig(flip=True, translate=4, cutout=7, crop_scale=0.4),
    AugmentConfig(flip=True, translate=4, padding="mean", cutout=7),
    AugmentConfig(flip=True, crop_scale=0.4, mixup=0.4, cutmix=1.0, erasing=0.5),
    AugmentConfig(
        flip=True,
        translate=4,
        cutout=3,
        crop_scale=0.4,
        rotation=30,
        brightness=0.4,
        contrast=0.4,
        saturation=0.4,
        hue=0.1,
        trivial=True,
    ),
]
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


@both_devices
@pytest.mark.parametrize("settings", AUGMENTATIONS)
@pytest.mark.parametrize(("dtype", "compiled"), [(torch.float32, False), (torch.bfloat16, True)])
def test_augmentation_on_a_device_gives_the_bits_of_the_cpu_kernel(
    settings, dtype, compiled, device
):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    rows, key = random.permutation(40), 7
    host, moved = (make_augmenter(settings, 16, MEAN, STD, dtype, to) for to in ("cpu", device))
    row_tensor = torch.from_numpy(rows).to(device)
    augmented = device_augmenter(compiled)(
        moved,
        torch.from_numpy(images).to(device),
        row_tensor,
        row_tensor,
        torch.tensor(key, device=device),
    )
    expected = augment_on_cpu(host, images, rows, rows, key)
    assert augmented.dtype == dtype and augmented.device.type == device
    assert torch.equal(augmented.cpu(), expected)


def resident(dataset: Path, split: str, placement: str, device: str):
    spec = PipelineSpec(
        DataConfig(path=str(dataset), placement=placement),
        AUGMENTATIONS[3] if split == "train" else None,
        read_manifest(dataset),
        split,
        batch_size=16,
        device=torch.device(device),
        dtype=torch.bfloat16,
        seed=3,
        train=split == "train",
    )
    return make_pipeline(spec)


@both_devices
@pytest.mark.parametrize("placement", ["device", "stream"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_batches_do_not_depend_on_the_placement_of_images(split, placement, device, dataset):
    expected = list(resident(dataset, split, "auto", "cpu").epoch(2))
    count = 0
    # One at a time: a batch is valid until the next is requested.
    for batch in resident(dataset, split, placement, device).epoch(2):
        for part, expected_part in zip(batch, expected[count], strict=True):
            if expected_part is None:  # validation is not mixed
                assert part is None
            else:
                assert part.device.type == device and torch.equal(part.cpu(), expected_part)
        count += 1
    assert count == len(expected)


@gpu_only
def test_uploads_are_whole_while_the_device_is_busy(device):
    """The buffers of earlier batches are used again before the device has come to them."""
    busy = torch.rand(4096, 4096, device=device)
    batches = ([torch.full((1 << 22,), number).pin_memory()] for number in range(60))
    sums = []
    for (copy,) in uploaded(batches, torch.device(device)):
        for _ in range(4):
            busy = busy @ busy / 4096
        sums.append(copy.sum())
    assert torch.stack(sums).tolist() == [number << 22 for number in range(60)]


# The images of a class: a JPEG with colours at full resolution, one that has to be resized, two
# with a single channel (one of which claims four samples a block) and a PNG. The sixth, number 2,
# stores colours at half the resolution, as does the resized one.
FULL, RESIZED, GREY, ODD_GREY, PNG = 0, 1, 3, 4, 5
EACH = 6


@pytest.fixture(scope="module")
def encoded_dataset(tmp_path_factory) -> Path:
    """Smooth images: decoders differ most at edges."""
    root, random = tmp_path_factory.mktemp("encoded"), np.random.default_rng(0)
    for folder in (
        root / "originals" / split / name for split in ("train", "val") for name in "ab"
    ):
        folder.mkdir(parents=True)
        for number in range(EACH):
            coarse = Image.fromarray(random.integers(0, 256, (3, 3, 3), dtype=np.uint8))
            size = (90, 75) if number == RESIZED else (64, 64)
            image = coarse.resize(size, Image.Resampling.BICUBIC)
            image = image.convert("L") if number in (GREY, ODD_GREY) else image
            if number == PNG:
                image.save(folder / f"{number}.png")
            else:
                full = number in (FULL, GREY)
                image.save(folder / f"{number}.jpg", subsampling=0 if full else 2)
    convert(root / "originals", root / "dataset", Options(formats=("array", "tar")))
    return root / "dataset"


@both_devices
def test_decoded_pixels_are_the_converters_to_within_a_few_levels(device, encoded_dataset):
    """nvJPEG decodes on a GPU, libjpeg-turbo on a CPU."""
    manifest = read_manifest(encoded_dataset)
    pixels, labels = open_array(encoded_dataset, manifest, "train")
    settings = DataConfig(path=str(encoded_dataset), pipeline="torchvision", workers=1)
    engine = open_engine(settings, manifest, "train", torch.device(device))
    rows = np.random.default_rng(1).permutation(2 * EACH).reshape(3, -1)
    for row, (images, decoded_labels) in zip(rows, engine.batches(rows), strict=True):
        assert images.device.type == device and images.shape == (len(row), 64, 64, 3)
        assert decoded_labels.tolist() == labels[row].tolist()
        difference = np.abs(images.cpu().numpy().astype(int) - pixels[row]).reshape(len(row), -1)
        # nvJPEG repeats colours of half resolution; libjpeg-turbo interpolates them.
        halved = np.isin(row % EACH, (RESIZED, 2))
        assert difference[~halved].max(initial=0) <= 4, difference.max(axis=1)
        assert difference.mean(axis=1).max() < 4, difference.mean(axis=1)
        assert difference.max() < 48, difference.max(axis=1)
        grey = images[torch.from_numpy(np.isin(row % EACH, (GREY, ODD_GREY))).to(device)]
        assert torch.equal(grey, grey[..., :1].expand_as(grey))


@gpu_only
def test_torchcodec_and_torchvision_decode_to_the_same_pixels(device, encoded_dataset, monkeypatch):
    """Both call nvJPEG."""
    pytest.importorskip("torchcodec", "0.16")
    manifest = read_manifest(encoded_dataset)
    settings = DataConfig(path=str(encoded_dataset), pipeline="torchvision", workers=1)
    decoded = []
    for decoder in ("torchcodec", "torchvision"):
        if decoder == "torchvision":
            monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
        nvjpeg.cache_clear()
        engine = open_engine(settings, manifest, "train", torch.device(device))
        ((images, _),) = engine.batches(np.arange(2 * EACH)[None])
        decoded.append(images)
    nvjpeg.cache_clear()
    assert torch.equal(*decoded)


# Arithmetic


def loss_and_gradient(
    name: ModelName,
    device: str,
    precision: str,
    compiled: bool = False,
    channels_last: bool = True,
) -> tuple[float, torch.Tensor]:
    """The loss and the gradient of one training batch, with the same dropout on every device. The
    gradient is that of all weights, fp64 [n], on the host."""
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8, device=device)
    model = models.build(ModelConfig(name=name, width=8), classes=10).to(
        device, torch.float64 if precision == "fp64" else torch.float32
    )
    models.set_memory_format(model, channels_last)
    DropoutKeys(model, 5, 0, torch.device(device)).set(torch.tensor([3], device=device))
    if compiled:
        compile_forward(model, deterministic=False)
    images = images.to(device, DTYPES[precision], memory_format=torch.channels_last)
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        logits = model(images)
    loss = nn.functional.cross_entropy(logits if precision == "fp64" else logits.float(), labels)
    loss.backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert len(gradients) == sum(weight.requires_grad for weight in model.parameters())
    gradient = torch.cat([part.double().flatten() for part in gradients])
    return loss.item(), gradient.cpu()


@pytest.fixture
def without_tf32() -> Iterator[None]:
    with torch_settings(config.load(None, ["train.precision=fp32"])):
        yield


# The largest relative differences of the loss and of the gradient. A rounding error can switch
# ReLUs and max pools that are close to switching, which changes the gradient by far more than the
# error: on a CPU by up to 0.034 in fp32 (CNN-10) and 0.44 in bf16 (ResNet-19, the deepest). In fp64
# nothing switches, so fp64 is the precision that shows a wrong gradient.
BOUNDS = {"fp64": (1e-9, 1e-6), "fp32": (1e-4, 0.1), "bf16": (5e-2, 0.75)}


Result = tuple[float, torch.Tensor]


def assert_close(actual: Result, expected: Result, bounds: tuple[float, float]) -> None:
    assert actual[0] == pytest.approx(expected[0], rel=bounds[0])
    difference = (actual[1] - expected[1]).norm() / expected[1].norm()
    assert difference < bounds[1]


CASES = [("cpu", "cnn8"), ("cpu", "resnet11")] + [
    pytest.param("cuda", name, marks=needs_gpu) for name in models.MODELS
]


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize(("device", "name"), CASES, indirect=["device"])
def test_loss_and_gradient_are_those_of_fp64_on_a_cpu(device, name, precision, without_tf32):
    expected = loss_and_gradient(name, "cpu", "fp64", channels_last=False)
    assert_close(loss_and_gradient(name, device, precision), expected, BOUNDS[precision])


@both_devices
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_model_gives_the_eager_loss_and_gradient(device, precision, without_tf32):
    eager = loss_and_gradient("resnet11", device, precision)
    counters.clear()
    compiled = loss_and_gradient("resnet11", device, precision, compiled=True)
    assert counters["stats"]["unique_graphs"] == 1
    assert_close(compiled, eager, BOUNDS[precision])


CAPTURED = {
    "resnet11, clipped": (
        "model.name=resnet11",
        "schedule.name=cosine",
        "train.grad_clip=1",
    ),
    "cnn8, compiled, streamed": ("model.name=cnn8", "train.compile=true", "data.placement=stream"),
    "cnn8, compiled, mixed": (
        "model.name=cnn8",
        "train.compile=true",
        "augment.mixup=0.4",
        "augment.cutmix=1.0",
        "augment.erasing=0.5",
        "augment.trivial=true",
    ),
    "resnet18, compiled, sgd": ("model.name=resnet18", "train.compile=true", "optim.name=sgd"),
    "resnet11, muon, resized": (
        "model.name=resnet11",
        "optim.name=muon",
        "train.image_size=[[0.3,32],[0.6,48]]",
    ),
    "torch's dropout": OTHER,
}


@gpu_only
@pytest.mark.parametrize("name", CAPTURED)
def test_a_captured_training_is_an_eager_one_bit_for_bit(name, device, dataset, tmp_path, capsys):
    """With dropout, a moving average and a rate that changes after two of three epochs."""
    runs = {step: tmp_path / step for step in ("eager", "captured")}
    plateau = ("schedule.name=plateau", "schedule.patience=0", "schedule.threshold=0.9")
    sets = (*DETERMINISTIC, precision_for(device), "augment.flip=true", *plateau, *CAPTURED[name])
    for step, run in runs.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.compiler.reset()
        assert main(["train", *command(dataset, run, f"train.step={step}", *sets)]) == 0
    assert "captured" not in capsys.readouterr().out  # no refusal
    assert_same_run(runs["eager"], runs["captured"])


@gpu_only
def test_a_capture_runs_nothing_and_changes_nothing(make_trainer, device):
    trainer = make_trainer("model.name=resnet11", *DETERMINISTIC, precision_for(device))
    batches = iter(trainer.batches(0))
    take_steps(trainer, batches, 3)
    state = trainer.model.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    trainer.step._capture(next(batches))
    torch.cuda.synchronize()
    assert trainer.step._graph is not None and int(trainer.step.done) == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    assert all(p.grad is None for p in trainer.model.parameters())
    take_steps(trainer, batches, 1)
    assert int(trainer.step.done) == 4
    assert any(not torch.equal(tensor, before[name]) for name, tensor in state.items())


@gpu_only
def test_a_step_that_reads_the_device_is_not_captured_and_stays_eager(
    device, dataset, tmp_path, monkeypatch, capsys
):
    runs = {step: tmp_path / step for step in ("eager", "captured")}
    train_step = training.train_step

    def reading(trainer, batch):
        loss = train_step(trainer, batch)
        assert loss.item() > 0
        return loss

    monkeypatch.setattr(training, "train_step", reading)
    for step, run in runs.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        sets = (f"train.step={step}", *DETERMINISTIC, precision_for(device))
        assert main(["train", *command(dataset, run, *sets)]) == 0
    assert capsys.readouterr().out.count("the step cannot be captured") == 1
    assert same_weights(runs["eager"], runs["captured"])


@both_devices
def test_the_first_step_whose_loss_is_not_finite_is_reported(make_trainer, device):
    """On a GPU that step is captured: the fourth is the last that is not."""
    trainer = make_trainer(precision_for(device))
    batches = iter(trainer.batches(0))
    take_steps(trainer, batches, 4)
    trainer.watch.refuse_divergence(trainer.model)
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(torch.nan)
    take_steps(trainer, batches, 2)
    assert int(trainer.step.diverged) == 5
    with pytest.raises(Diverged, match="the loss is not a finite number at step 5"):
        trainer.watch.refuse_divergence(trainer.model)


@torch.no_grad()
def plain_evaluation(
    trainer: training.Trainer, dataset: Path, mirrored: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of the validation images, or of their mirror images, as one batch that is
    normalised here."""
    arrays = open_array(dataset, trainer.manifest, "val")
    images, labels = (torch.from_numpy(np.array(part)).to(trainer.device) for part in arrays)
    if mirrored:
        images = images[:, :, torch.arange(images.shape[2] - 1, -1, -1)]
    moments = (trainer.manifest.mean, trainer.manifest.std)
    mean, std = (torch.tensor(value, device=trainer.device) for value in moments)
    pixels = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    model = trainer.model.eval()
    return type(model).forward(model, pixels), labels


@both_devices
@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("batch_size", [7, 1000])
def test_evaluation_counts_each_image_once(compiled, batch_size, make_trainer, dataset, device):
    """The figures are those of a single batch of all images."""
    sets = (f"train.eval_batch_size={batch_size}", f"train.compile={compiled}")
    trainer = make_trainer(*SMALL, *sets)
    figures = evaluate(trainer.net, trainer.val_data, trainer.accelerator)
    logits, labels = plain_evaluation(trainer, dataset)
    hits = [int((logits.topk(k).indices == labels[:, None]).any(dim=1).sum()) for k in (1, 5)]
    assert [figures.images, figures.correct1, figures.correct5] == [50, *hits]
    loss = nn.functional.cross_entropy(logits, labels).item()
    assert figures.loss == pytest.approx(loss, rel=1e-4)
    assert 0 < figures.correct5 < 50


@both_devices
def test_test_time_flips_average_the_logits_of_an_image_and_its_mirror_image(make_trainer, dataset):
    """The last batch of 7 is padded. Initial weights hardly tell left from right."""
    trainer = make_trainer(*SMALL, "train.eval_batch_size=7", "train.compile=false")
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight += 0.2 * torch.randn_like(weight)
    figures = evaluate(trainer.net, trainer.val_data, trainer.accelerator, "flip")
    logits, labels = plain_evaluation(trainer, dataset)
    average = (logits + plain_evaluation(trainer, dataset, mirrored=True)[0]) / 2
    hits = [int((average.topk(k).indices == labels[:, None]).any(dim=1).sum()) for k in (1, 5)]
    assert [figures.images, figures.correct1, figures.correct5] == [50, *hits]
    loss, plain = (nn.functional.cross_entropy(each, labels).item() for each in (average, logits))
    assert figures.loss == pytest.approx(loss, rel=1e-5)
    assert abs(plain - loss) > 1e-3 * loss


@both_devices
def test_the_moving_average_is_that_of_a_loop_on_the_host(make_trainer):
    def snapshot(trainer: training.Trainer) -> list[torch.Tensor]:
        state = trainer.model.state_dict().values()
        return [tensor.double().cpu() for tensor in state if tensor.is_floating_point()]

    trainer = make_trainer("train.ema=0.5", "optim.lr=0.1", *NO_DROPOUT)
    expected, batches = snapshot(trainer), iter(trainer.batches(0))
    start, left = expected, 1.0
    for step in range(10):  # an epoch: the average is updated after the eighth and the last step
        take_steps(trainer, batches, 1)
        left *= min(0.5, (1 + step) / (10 + step))
        if step in (7, 9):
            weights = zip(expected, snapshot(trainer), strict=True)
            expected, left = [left * old + (1 - left) * new for old, new in weights], 1.0
    assert trainer.average is not None
    averages = [tensor.double().cpu() for tensor in trainer.average.average]
    moved = 0
    for average, expected_average, before in zip(averages, expected, start, strict=True):
        torch.testing.assert_close(average, expected_average, rtol=1e-5, atol=1e-6)
        moved += not torch.equal(average, before)
    frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
    assert frozen and moved == len(start) - len(frozen)


# Trainings


# The training sends itself a signal in its fourteenth step.
SIGNALLED = """
import os, signal, sys
from fastlab import train
from fastlab.training import step

call, steps = step.Step.__call__, []

def stopping(self, batch):
    steps.append(batch)
    if len(steps) == 14:
        os.kill(os.getpid(), signal.SIGTERM)
    return call(self, batch)

step.Step.__call__ = stopping
sys.exit(train.main(sys.argv[1:]))
"""


@gpu_only
@pytest.mark.parametrize(
    ("name", "compiled"), [("resnet11", "false"), ("cnn8", "true"), (OWN, "false"), (OWN, "true")]
)
def test_a_stopped_training_resumes_bit_for_bit(name, compiled, device, dataset, tmp_path):
    """It stops after four of the second epoch's ten steps, with dropout and a moving average."""
    whole, run, script = (tmp_path / part for part in ("whole", "run", "script.py"))
    script.write_text(SIGNALLED)
    model = OTHER if name == OWN else (f"model.name={name}",)
    sets = (*model, f"train.compile={compiled}", precision_for(device))
    sets = (*sets, "train.checkpoint_every=0", *DETERMINISTIC)
    train(command(dataset, whole, *sets), device=device)
    stopped = launch(command(dataset, run, *sets), script=script, device=device)
    _, errors = stopped.communicate(timeout=120)
    assert stopped.returncode == 128 + signal.SIGTERM, errors
    assert (run / "checkpoints" / "step-00000014").is_dir()
    train(["--resume", str(run)], device=device)
    assert_same_run(run, whole)


@gpu_only
@pytest.mark.parametrize("step", ["eager", "captured"])
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_no_step_waits_for_the_device(compiled, step, make_trainer, device):
    """The first steps may: they compile, capture and copy the epoch's order."""
    sets = (*SMALL, "data.placement=device", "augment.flip=true", precision_for(device))
    trainer = make_trainer(*sets, f"train.compile={compiled}", f"train.step={step}")
    batches = iter(trainer.batches(0))
    take_steps(trainer, batches, 5)
    with waits_refused():
        losses = take_steps(trainer, batches, 4)
        with pytest.raises(RuntimeError, match="synchronizing"):
            losses[0].item()
    assert len(losses) == 4 and losses.isfinite().all() and losses.min() > 0
    assert int(trainer.step.diverged) == 0


@contextmanager
def waits_refused() -> Generator[None]:
    """Raises RuntimeError where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@both_devices
def test_a_trace_shows_steps_that_do_not_wait(device, dataset, tmp_path, capsys):
    run, on_gpu = tmp_path / "run", device == "cuda"
    schedule = ("profile.wait=3", "profile.warmup=2", "profile.active=4")
    sets = (*schedule, "train.checkpoint_every=0", "train.epochs=1", precision_for(device))
    assert main(["train", *command(dataset, run, *sets), "--profile"]) == 0
    assert main(["trace", str(run)]) == 0
    assert str(run) in capsys.readouterr().out
    found = review_run(run).main
    assert found.numbers == [6, 7, 8, 9]
    assert not found.blind and not found.syncs, found.syncs
    assert bool(found.gpu) == bool(found.kernels) == bool(found.launches) == on_gpu
    assert sum(found.shares.values()) == pytest.approx(1, abs=1e-3)
    if on_gpu:
        assert found.busy is not None and 0 < found.busy <= 1
        assert found.kernels[0].gpu_ms > 0 and found.kernels[0].calls > 0


@contextmanager
def memory_capped(size: int) -> Generator[None]:
    """At most `size` more bytes of the device's memory can be allocated."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    allowed = torch.cuda.memory_reserved() + size
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


@gpu_only
def test_a_batch_that_does_not_fit_is_reported_in_one_line_until_its_half_fits(
    device, dataset, tmp_path, capsys
):
    """About 6 MB an image in training, and 80 MB of weights, their states and workspaces."""
    sets = ("model.width=64", "train.epochs=1", "train.checkpoint_every=0")
    with memory_capped(400 * 2**20):
        status, size, refused = 2, 160, 0
        while status == 2:
            AcceleratorState._reset_state(reset_partial_state=True)
            run = tmp_path / str(size)
            status = main(["train", *command(dataset, run, *sets, f"train.batch_size={size}")])
            errors = capsys.readouterr().err.splitlines()
            if status == 2:
                (line,) = errors
                size, refused = advised_size(line, size), refused + 1
    assert status == 0 and refused >= 1


def advised_size(line: str, failed: int) -> int:
    """The batch size that the error for `failed` advises: half of it."""
    advice = re.search(
        rf"with train\.batch_size = {failed}: try half of it, --set train\.batch_size=(\d+)$", line
    )
    assert advice and int(advice[1]) == failed // 2 > 0, line
    return int(advice[1])


def test_the_advised_size_is_read_from_the_line():
    start = "fastlab: out of memory on cuda:0 with train.batch_size = 160: try half of it, "
    assert advised_size(f"{start}--set train.batch_size=80", 160) == 80
    with pytest.raises(AssertionError):
        advised_size(f"{start}--set train.batch_size=81", 160)


@gpu_only
def test_a_diverging_training_is_reported_in_one_line(device, dataset, tmp_path, capsys):
    wild = ("optim.name=sgd", "optim.lr=1e30", "model.batch_norm=false", "schedule.name=constant")
    assert main(["train", *command(dataset, tmp_path / "run", *wild)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "not a finite number at step" in line
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "diverged"


@gpu_only
def test_trainings_of_equal_shapes_compile_nothing_anew(device, dataset):
    """As `benchmarks.search` trains its candidates: each has a trainer of its own. For a CPU there
    is tests/benchmarks/test_search.py."""
    sets = [f"data.path={dataset}", *TINY, *SMALL, "train.compile=true", precision_for(device)]
    cfg = config.load(ROOT / "configs" / "demo.toml", [*sets, "train.epochs=1"])
    compiled = []
    with torch_settings(cfg):
        accelerator = make_accelerator(cfg)
        for lr, decay in ((0.01, 0.0), (0.02, 0.1)):
            optim = replace(cfg.optim, lr=lr, weight_decay=decay)
            done = search.train(replace(cfg, optim=optim), accelerator)
            assert len(done.top1) == 1 and not done.diverged
            compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[0] == compiled[1] > 0


@gpu_only
def test_the_energy_of_a_gpu_is_that_of_a_plausible_power(device):
    pytest.importorskip("pynvml")
    matrix = torch.randn(4096, 4096, device=device)
    joules, started = energy.meter(torch.device(device)), time.perf_counter()
    while time.perf_counter() - started < 1:
        matrix @ matrix
        torch.cuda.synchronize()
    watts = (joules() or 0) / (time.perf_counter() - started)
    assert 20 < watts < 2000
