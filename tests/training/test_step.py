"""The captured step, without a GPU: what it replays must be all that a step does, and the same in
each step."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastlab import config
from fastlab import train as training
from fastlab.cli import main
from fastlab.runs import RunDir
from fastlab.training import setup, step
from fastlab.training.setup import make_accelerator
from pipelines.resident import ResidentPipeline
from tests.trainings import ROOT, TINY, assert_same_run, command, same_weights

# For these operators the host would wait for the device, or send it data.
READS = ("_local_scalar_dense", "item", "nonzero", "equal", "masked_select", "lift_fresh")
MIXED = "onecycle, adamw, no average, mixed"
SETTINGS = {
    "plateau, adam": ("schedule.name=plateau", "schedule.patience=0", "optim.lr=0.01"),
    "cosine, sgd, clipped, smoothed": (
        "schedule.name=cosine",
        "optim.name=sgd",
        "train.grad_clip=1.0",
        "train.label_smoothing=0.1",
    ),
    MIXED: (
        "schedule.name=onecycle",
        "optim.name=adamw",
        "train.ema=0",
        "augment.flip=true",
        "augment.translate=2",
        "augment.cutout=4",
        "augment.mixup=0.4",
        "augment.cutmix=1.0",
        "augment.trivial=true",
    ),
    "resnet11 without norms": ("model.name=resnet11", "model.batch_norm=false"),
    "muon, resized": (
        "model.name=resnet11",
        "optim.name=muon",
        "train.image_size=[[0.6,16],[0.9,24]]",
    ),
}


class Recorder(TorchDispatchMode):
    """Records every operator with its constants and its tensors. A tensor that was made since
    `start` is named by the call that made it, any other by its address."""

    def __init__(self) -> None:
        super().__init__()
        self.start()

    def start(self) -> None:
        self.calls: list[tuple] = []
        self._makers: dict[int, str] = {}
        self._kept: list[torch.Tensor] = []  # alive, so that no address is used twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        call = (str(func), self._show(args), self._show(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
        for number, tensor in enumerate(tensors(out)):
            self._kept.append(tensor)
            address = tensor.untyped_storage().data_ptr()
            if address not in known:
                self._makers[address] = f"output {number} of call {len(self.calls)}"
        if not call[0].startswith("profiler."):  # a handle of theirs is a new object each time
            self.calls.append(call)
        return out

    def _show(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            address = value.untyped_storage().data_ptr()
            place = self._makers.get(address, address)
            return place, value.dtype, tuple(value.shape), value.stride(), value.storage_offset()
        if isinstance(value, dict):
            return {key: self._show(part) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._show(part) for part in value]
        return repr(value)


def tensors(value: Any) -> list[torch.Tensor]:
    return [v for v in tree_leaves(value) if isinstance(v, torch.Tensor)]


def reads(calls: list[tuple]) -> list[str]:
    return [name for name, *_ in calls if name.split(".")[1] in READS]


class StandIn:
    """Stands in for `CUDAGraph` where there is no GPU: each replay runs `body`."""

    replays = 0

    def __init__(self, body) -> None:
        self._body = body

    def replay(self) -> None:
        StandIn.replays += 1
        self._body()


@pytest.fixture
def capturing(monkeypatch):
    monkeypatch.setattr(setup, "refuses_capture", lambda accelerator: "")
    monkeypatch.setattr(step, "CUDAGraph", StandIn)
    monkeypatch.setattr(StandIn, "replays", 0)


def place(self: ResidentPipeline, placement: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Place all images on the device, which is the CPU here."""
    return torch.from_numpy(self._images.copy()), torch.from_numpy(self._labels)


@pytest.fixture
def batches(request, monkeypatch) -> str:
    if request.param == "made by the step":
        monkeypatch.setattr(ResidentPipeline, "_place", place)
    return request.param


def trainer_of(dataset: Path, out: Path, *overrides: str) -> training.Trainer:
    sets = [f"data.path={dataset}", *TINY, *overrides]
    cfg = config.load(ROOT / "configs" / "demo.toml", sets)
    trainer = training.Trainer(cfg, RunDir(out), make_accelerator(cfg))
    trainer.net.train()
    return trainer


@pytest.mark.parametrize("name", SETTINGS)
def test_two_steps_in_a_row_issue_the_same_operators_on_the_same_memory(
    name, synth_dataset, tmp_path, monkeypatch
):
    monkeypatch.setattr(ResidentPipeline, "_place", place)
    trainer = trainer_of(synth_dataset, tmp_path, *SETTINGS[name])
    calls = []
    for number, batch in zip(
        range(4), trainer.step.batches(trainer.train_data, 0, 0, capture=True), strict=False
    ):
        assert batch is None
        with Recorder() as recorder:
            trainer.step._body(batch)
        calls.append(recorder.calls)
        assert int(trainer.step.done) == number + 1
    assert calls[2] == calls[3]
    assert len(calls[3]) > 100
    assert not reads(calls[3])


def test_the_recorder_notices_constants_that_change_and_values_that_are_read():
    value, recorded = torch.ones(3), []
    with Recorder() as recorder:
        for factor in (2.0, 2.0, 3.0):
            recorder.start()
            value.mul_(factor)
            recorded.append(recorder.calls)
        assert recorded[0] == recorded[1] != recorded[2]
        recorder.start()
        value.sum().item()
    assert reads(recorder.calls) == ["aten._local_scalar_dense.default"]


@pytest.mark.parametrize(
    ("name", "batches"),
    [*((name, "made by the step") for name in SETTINGS), (MIXED, "given")],
    indirect=["batches"],
)
def test_a_captured_training_that_was_stopped_and_resumed_has_the_weights_of_an_eager_one(
    name, batches, capturing, synth_dataset, tmp_path, monkeypatch
):
    runs = {kind: tmp_path / kind for kind in ("eager", "captured")}
    sets = SETTINGS[name]
    assert main(["train", *command(synth_dataset, runs["eager"], "train.step=eager", *sets)]) == 0
    assert StandIn.replays == 0
    train_step, taken = training.train_step, []

    def stopping(trainer, batch):
        taken.append(batch)
        if len(taken) == 7:  # in the second epoch of five steps, after the capture
            trainer.watch.signal = signal.SIGTERM
        return train_step(trainer, batch)

    monkeypatch.setattr(training, "train_step", stopping)
    stopped = main(["train", *command(synth_dataset, runs["captured"], *sets)])
    assert stopped == 128 + signal.SIGTERM
    assert main(["train", "--resume", str(runs["captured"])]) == 0
    # Three steps before each capture: in each process, and after the resized images of two epochs.
    assert StandIn.replays == 15 - 3 * (3 if "resized" in name else 2)
    assert_same_run(runs["eager"], runs["captured"])


def test_a_step_that_cannot_be_captured_stays_eager_and_the_reason_is_reported(
    capturing, synth_dataset, tmp_path, monkeypatch, capsys
):
    runs = [tmp_path / name for name in ("eager", "refused")]
    assert main(["train", *command(synth_dataset, runs[0], "train.step=eager")]) == 0

    def refuse(body):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        except RuntimeError:
            raise RuntimeError("capture was invalidated") from None

    monkeypatch.setattr(step, "CUDAGraph", refuse)
    capsys.readouterr()
    assert main(["train", *command(synth_dataset, runs[1])]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "cannot be captured" in line]
    assert len(lines) == 1 and "(operation not permitted when stream is capturing)" in lines[0]
    assert same_weights(*runs)


def test_a_capture_that_runs_out_of_memory_names_a_batch_size(
    capturing, synth_dataset, tmp_path, monkeypatch, capsys
):
    def fail(body):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step, "CUDAGraph", fail)
    assert main(["train", *command(synth_dataset, tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--set train.batch_size=8" in line  # half of what did not fit


def test_steps_are_not_captured_while_a_trace_is_recorded(capturing, synth_dataset, tmp_path):
    """An epoch has five steps. The trace ends with the first epoch; the second captures."""
    sets = ("profile.wait=1", "profile.warmup=2", "profile.active=2", "train.epochs=4")
    assert main(["train", *command(synth_dataset, tmp_path / "run", *sets), "--profile"]) == 0
    assert StandIn.replays == 15 - 3


def test_a_capture_that_is_not_possible_is_reported(synth_dataset, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", *command(synth_dataset, run, "train.step=captured")]) == 0
    assert (
        'train.step = "captured" is not possible here: there is no GPU' in capsys.readouterr().out
    )


def test_a_built_in_model_draws_nothing_from_torchs_generator(synth_dataset, tmp_path):
    """Each step seeds it, for other models."""
    trainer = trainer_of(synth_dataset, tmp_path, "model.name=resnet11")
    for number, batch in enumerate(trainer.step.batches(trainer.train_data, 0, 0, capture=False)):
        trainer.step(batch)
        trainer.watch.refuse_divergence(trainer.model)
        after = torch.get_rng_state()
        trainer.dropout.seed_generators(number)
        assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("name", ["plateau, adam", MIXED])
def test_what_is_compiled_around_a_step_is_one_graph_that_computes_the_same(
    name, synth_dataset, tmp_path, monkeypatch
):
    """With a simpler compiler than a GPU's, which would take minutes here."""
    compile, results = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda f: compile(f, backend="aot_eager", fullgraph=True))
    for compiled in (False, True):
        torch.manual_seed(0)
        trainer = trainer_of(synth_dataset, tmp_path, *SETTINGS[name])
        launched = step.Step(
            lambda batch, trainer=trainer: training.train_step(trainer, batch),
            trainer.optimizer,
            trainer.dropout,
            trainer.rate,
            trainer.average,
            trainer.train_data.steps(),
            trainer.device,
            compile=compiled,
        )
        trainer.step.done = launched.done
        for batch in launched.batches(trainer.train_data, 1, 0, capture=False):
            launched(batch)
        results.append([*trainer.model.state_dict().values(), trainer.sums.values, launched.done])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert results[0][-1] == 10 and results[0][-2][3] == 5 * 16  # images of the five steps


@pytest.mark.parametrize("compiled", [False, True])
def test_the_first_step_whose_loss_is_not_finite_is_remembered(compiled, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compile(f, backend="aot_eager", fullgraph=True))
    end = torch.compile(step._end) if compiled else step._end
    done, diverged = torch.tensor([7]), torch.zeros(1, dtype=torch.int64)
    seen = []
    for loss in (
        1.0,
        2.0,
        float("inf"),
        3.0,
        float("nan"),
    ):  # steps 3 to 5 of an epoch of five, 1 and 2 of the next
        end(done, diverged, torch.tensor(loss), 5)
        seen.append(int(diverged))
    assert seen == [0, 0, 5, 5, 5] and int(done) == 12
