"""Whole trainings: what they write, how they stop and resume, and what they refuse."""

import base64
import fcntl
import io
import json
import os
import re
import shutil
import signal
import termios
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastlab import config, models, predict
from fastlab import train as training
from fastlab.cli import main
from fastlab.dataset.convert import Options, convert
from fastlab.dataset.manifest import read_manifest
from fastlab.runs import RunDir
from fastlab.training import checkpoint, setup, state
from fastlab.training import metrics as training_metrics
from fastlab.training.evaluate import evaluate
from fastlab.training.guards import StopRequested
from fastlab.training.review import review
from fastlab.training.setup import make_accelerator, torch_settings
from tests.trainings import (
    ROOT,
    TINY,
    assert_same_run,
    checkpoints,
    command,
    launch,
    metrics,
    train,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("without_coverage")


@pytest.fixture(scope="module")
def whole_run(synth_dataset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(command(synth_dataset, out))
    return out


def test_a_run_writes_what_reports_read(whole_run):
    records = metrics(whole_run)
    assert [record["epoch"] for record in records] == [1, 2, 3]
    # 80 training images make 5 whole batches of 16; 20 validation images, 5 of each class.
    assert [record["step"] for record in records] == [5, 10, 15]
    assert all(record["val_images"] == 20 for record in records)
    assert json.loads((whole_run / "summary.json").read_text())["status"] == "finished"
    assert len(json.loads((whole_run / "predictions.json").read_text())) == 12


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_resumes_bit_for_bit(number, whole_run, synth_dataset, tmp_path):
    out = tmp_path / "run"
    process = launch(command(synth_dataset, out))
    assert wait_until(lambda: checkpoints(out), process)  # that of step 2, in the first epoch
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    expected = -signal.SIGKILL if number == signal.SIGKILL else 128 + number
    assert process.returncode in (expected, 0), errors
    if process.returncode == 0:
        pytest.skip("the run ended before the signal arrived")
    train(["--resume", str(out)])
    assert_same_run(out, whole_run)


@pytest.mark.slow
def test_a_training_whose_terminal_is_closed_saves_a_checkpoint(synth_dataset, tmp_path):
    """It has no other checkpoint. The shell and the kernel each send SIGHUP."""
    run, (ours, terminal) = tmp_path / "run", os.openpty()
    never = ("train.checkpoint_every=0", "train.checkpoint_seconds=1e9", "train.epochs=1000")
    process = launch(
        command(synth_dataset, run, *never),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(terminal)
    try:
        # Read what it prints, or it would wait for room.
        assert wait_until(
            lambda: os.read(ours, 65536) and (run / "metrics.jsonl").exists(), process
        )
        os.close(ours)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=60) == 128 + signal.SIGHUP
    finally:
        process.kill()
    assert checkpoints(run)
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
def test_a_training_under_nohup_outlives_its_terminal(whole_run, synth_dataset, tmp_path):
    out = tmp_path / "run"
    ignore = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    process = launch(command(synth_dataset, out), preexec_fn=ignore)
    assert wait_until(lambda: checkpoints(out), process)
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert_same_run(out, whole_run)


@pytest.mark.slow
def test_a_run_resumes_with_its_own_number_of_threads(synth_dataset, tmp_path, monkeypatch, capsys):
    """Sums on a CPU depend on how many threads share them."""
    whole, run, step, steps = tmp_path / "whole", tmp_path / "run", training.train_step, []

    def stopping(trainer, batch):
        steps.append(torch.get_num_threads())
        if len(steps) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, batch)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert main(["train", *command(synth_dataset, whole, "model.width=8")]) == 0
        assert "computing with 3 threads, which" in capsys.readouterr().out
        monkeypatch.setattr(training, "train_step", stopping)
        assert main(["train", *command(synth_dataset, run, "model.width=8")]) == 143
        torch.set_num_threads(1)
        assert main(["train", "--resume", str(run)]) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert steps == [3] * 15
    assert "threads: 3, as at the run's start" in capsys.readouterr().out
    assert_same_run(run, whole)


@pytest.mark.parametrize("threads", ["many", 0, True, 2.5, 10**6])
def test_a_damaged_number_of_threads_is_refused(threads, whole_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    record = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps({**record, "threads": threads}))
    assert main(["train", "--resume", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "environment.json: damaged" in line


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(synth_dataset, tmp_path):
    same = (
        "train.precision=fp64",
        "model.sync_batch_norm=true",
        "model.dropout_conv=0",
        "model.dropout_fc=0",
        "augment.flip=true",
    )
    train(command(synth_dataset, tmp_path / "one", *same))
    train(command(synth_dataset, tmp_path / "two", *same), processes=2)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [r["train_loss"] for r in two] == pytest.approx([r["train_loss"] for r in one], abs=1e-4)
    for count in ("val_images", "val_correct1", "val_correct5"):
        assert [r[count] for r in one] == [r[count] for r in two]
    assert len(list((tmp_path / "two" / "tensorboard").glob("events*"))) == 1  # of the main process


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere.toml"], "nowhere.toml"),
        (["--resume", "nowhere"], "nowhere: not a run directory"),
        ([], "--config FILE is missing"),
        (["--config", "configs/demo.toml", "--set", "optim.lrr=1"], "optim.lr"),
        (["--config", "configs/demo.toml", "--set", "data.path=nowhere"], "fastlab convert"),
    ],
)
def test_a_mistake_is_reported_in_one_line_with_status_2(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["train", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_a_finished_run_is_not_overwritten(whole_run, synth_dataset, capsys):
    before = (whole_run / "metrics.jsonl").read_bytes()
    assert main(["train", *command(synth_dataset, whole_run)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert (whole_run / "metrics.jsonl").read_bytes() == before


def test_an_evaluation_batch_may_be_larger_than_any_split(synth_dataset, tmp_path, capsys):
    """No memory is allocated for images that the split does not have."""
    sets = ("train.epochs=1", "train.eval_batch_size=1000000000000")
    assert main(["train", *command(synth_dataset, tmp_path / "run", *sets)]) == 0
    capsys.readouterr()
    assert len(json.loads((tmp_path / "run" / "predictions.json").read_text())) == 12
    (record,) = metrics(tmp_path / "run")
    figures = evaluated(tmp_path / "run", capsys)
    assert figures["images"] == record["val_images"] == 20
    assert figures["loss"] == pytest.approx(record["val_loss"], abs=1e-5)


def evaluated(run: Path, capsys, *arguments: str) -> dict:
    """The figures that `fastlab evaluate` prints."""
    assert main(["evaluate", str(run), "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("which", ["best", "last"])
def test_evaluate_gives_the_figures_of_the_training(which, whole_run, capsys):
    """Both use the moving average of the weights. The last checkpoint holds it next to them."""
    records = metrics(whole_run)
    trained = max(records, key=lambda r: r["val_top1"]) if which == "best" else records[-1]
    figures = evaluated(whole_run, capsys, "--checkpoint", which)
    assert figures["images"] == 20
    assert figures["top1"] == trained["val_top1"]
    assert figures["loss"] == pytest.approx(trained["val_loss"], abs=1e-5)


def test_a_run_whose_metrics_are_lost_is_not_resumed(whole_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    (run / "metrics.jsonl").write_text("")
    assert main(["train", "--resume", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the epochs 1 to 3 " in line


def test_evaluate_compiles_what_training_compiled(whole_run, tmp_path, capsys, monkeypatch):
    """In bf16, a compiled model rounds differently from an eager one."""
    run, compiled = tmp_path / "run", []
    shutil.copytree(whole_run, run)
    text = (run / "config.toml").read_text()
    assert "\ncompile = false\n" in text
    (run / "config.toml").write_text(text.replace("\ncompile = false\n", "\ncompile = true\n"))

    def compile(function, **settings):
        compiled.append(settings)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    evaluated(run, capsys)
    assert compiled == [{"dynamic": False}] * 2  # the model and the normalisation of images


def test_images_per_second_leave_out_the_first_steps_of_each_process(
    synth_dataset, tmp_path, monkeypatch
):
    """Only steps advance the clock. The first step of each process, which compiles, takes 800 times
    as long as the others. The run is interrupted in the second epoch and resumed after two of its
    steps."""
    clock, processes, step = [0.0], [[], []], training.train_step

    def train_step(trainer, batch):
        steps = processes[0]
        if len(steps) == 7 and len(processes) == 2:
            raise KeyboardInterrupt
        clock[0] += 1 / 8 if steps else 100.0
        steps.append(batch)
        return step(trainer, batch)

    monkeypatch.setattr(training_metrics, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(training, "train_step", train_step)
    run = tmp_path / "run"
    assert main(["train", *command(synth_dataset, run, "train.epochs=2")]) == 130
    del processes[0]
    assert main(["train", "--resume", str(run)]) == 0
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["images_per_second"] for line in lines] == [16 * 8] * 2
    assert len(processes[0]) == 10 - 7


@pytest.mark.parametrize("channels_last", [True, False])
def test_activations_have_the_memory_format_of_the_run(channels_last, synth_dataset, tmp_path):
    sets = [
        f"data.path={synth_dataset}",
        *TINY,
        f"train.channels_last={str(channels_last).lower()}",
    ]
    cfg = config.load(ROOT / "configs" / "demo.toml", sets)
    trainer = training.Trainer(cfg, RunDir(tmp_path), make_accelerator(cfg))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    kept_layout = []
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda *rest: kept_layout.append(rest[2].is_contiguous(memory_format=layout))
            )
    training.train_step(trainer, next(iter(trainer.train_data.epoch(0))))
    evaluate(trainer.net, trainer.val_data, trainer.accelerator)
    assert kept_layout and all(kept_layout)


def tf32() -> tuple[bool, bool]:
    """Whether fp32 matrix products, and fp32 convolutions, may use TF32."""
    return torch.get_float32_matmul_precision() != "highest", torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16", "fp16"])
def test_tf32_is_used_only_with_mixed_precision(precision, before, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
    outside = tf32()
    with torch_settings(config.load(None, [f"train.precision={precision}"])):
        assert tf32() == (precision in ("bf16", "fp16"),) * 2
    assert tf32() == outside


def test_evaluate_and_predict_keep_the_precision_of_the_run(whole_run, synth_source, monkeypatch):
    """The run is in fp32; the process allowed TF32 before."""
    inside = []
    for module, name in ((predict, "evaluate"), (predict, "most_probable")):
        work = getattr(module, name)
        seen = lambda *rest, work=work: inside.append(tf32()) or work(*rest)  # noqa: E731
        monkeypatch.setattr(module, name, seen)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    predict.evaluate_run(whole_run, "val", "best")
    image = next((synth_source / "val" / "images").iterdir())
    assert len(list(predict.predict_images(whole_run, [image], "best"))) == 1
    assert inside == [(False, False)] * 2


def test_a_loss_that_is_not_finite_stops_the_run(synth_dataset, tmp_path, capsys, monkeypatch):
    """The third step of the second epoch diverges, after the checkpoint of the second."""
    step, seen = training.train_step, []

    def diverging(trainer, batch):
        seen.append(step(trainer, batch))
        return seen[-1] * float("nan") if len(seen) >= 8 else seen[-1]

    monkeypatch.setattr(training, "train_step", diverging)
    out = tmp_path / "run"
    assert main(["train", *command(synth_dataset, out)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "step 3 of epoch 2" in lines[0] and "step-00000007" in lines[0]
    assert [path.name for path in (out / "checkpoints").glob("step-*")] == ["step-00000007"]
    assert len(metrics(out)) == 1
    assert json.loads((out / "summary.json").read_text())["status"] == "diverged"


def test_a_loss_that_is_not_finite_stops_the_run_within_two_looks(
    synth_dataset, tmp_path, capsys, monkeypatch
):
    """The third of an epoch's 80 steps diverges, and every second step looks."""
    step, seen = training.train_step, []

    def diverging(trainer, batch):
        seen.append(step(trainer, batch))
        return seen[-1] * float("nan") if len(seen) == 3 else seen[-1]

    monkeypatch.setattr(training, "train_step", diverging)
    sets = ("train.batch_size=1", "train.log_every=2", "train.checkpoint_every=0")
    sets += ("model.batch_norm=false",)
    assert main(["train", *command(synth_dataset, tmp_path / "run", *sets)]) == 2
    assert "at step 3 of epoch 1" in capsys.readouterr().err
    assert len(seen) == 6


def saves(monkeypatch) -> list[int]:
    """The step of every checkpoint that is written from now on."""
    steps, save = [], checkpoint.save

    def counted(folder, step, *rest):
        steps.append(step)
        save(folder, step, *rest)

    monkeypatch.setattr(checkpoint, "save", counted)
    return steps


@pytest.mark.parametrize(("seconds", "steps"), [("0", [5, 10, 15]), ("1e9", [15])])
def test_checkpoints_are_written_by_the_clock_and_at_the_end(
    seconds, steps, synth_dataset, tmp_path, monkeypatch
):
    saved = saves(monkeypatch)
    sets = (f"train.checkpoint_seconds={seconds}", "train.checkpoint_every=0")
    assert main(["train", *command(synth_dataset, tmp_path / "run", *sets)]) == 0
    assert saved == steps
    assert (tmp_path / "run" / "checkpoints" / "best.safetensors").exists()


def test_a_long_epoch_writes_checkpoints_by_the_clock(synth_dataset, tmp_path, monkeypatch):
    """A step takes ten seconds and is followed by a look. A checkpoint is due after the third step,
    and the look after the fourth returns that."""
    clock, step = [0.0], training.train_step

    def slow_step(trainer, batch):
        clock[0] += 10
        return step(trainer, batch)

    monkeypatch.setattr(state, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(training, "train_step", slow_step)
    saved = saves(monkeypatch)
    sets = ("train.checkpoint_seconds=25", "train.log_every=1", "train.epochs=1")
    sets += ("train.checkpoint_every=0", "train.batch_size=8")
    assert main(["train", *command(synth_dataset, tmp_path / "run", *sets)]) == 0
    assert saved == [4, 8, 10]


def test_wall_time_includes_training_time_and_continues_in_a_resumed_run(
    synth_dataset, tmp_path, monkeypatch
):
    run, epoch = tmp_path / "run", training.epoch

    def interrupted(trainer):
        if trainer.progress.epoch == 1:
            raise StopRequested(signal.SIGINT)
        epoch(trainer)

    monkeypatch.setattr(training, "epoch", interrupted)
    assert main(["train", *command(synth_dataset, run)]) == 130
    monkeypatch.setattr(training, "epoch", epoch)
    assert main(["train", "--resume", str(run)]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    walls = [line["wall_seconds"] for line in lines]
    assert walls[0] > lines[0]["seconds"]
    # The second process adds its own start-up time to all the time of the first.
    assert walls[1] > 2 * walls[0] and walls[2] > walls[1] + lines[2]["seconds"]


def algorithms() -> tuple[bool, bool, bool]:
    """Whether cuDNN chooses by trial, whether it is deterministic, and whether torch is."""
    cudnn = torch.backends.cudnn
    return cudnn.benchmark, cudnn.deterministic, torch.are_deterministic_algorithms_enabled()


def test_deterministic_algorithms_replace_those_chosen_by_trial(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    outside = algorithms()
    with torch_settings(config.load(None, ["train.deterministic=true"])):
        assert algorithms() == (False, True, True)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    with torch_settings(config.load(None, ["train.deterministic=false"])):
        assert algorithms() == (True, False, False)
    assert algorithms() == outside


def test_a_rate_that_makes_a_training_diverge_is_reported(synth_dataset, tmp_path, capsys):
    wild = ("optim.name=sgd", "optim.lr=1e30", "model.batch_norm=false", "schedule.name=constant")
    assert main(["train", *command(synth_dataset, tmp_path / "run", *wild)]) == 2
    assert "not a finite number at step" in capsys.readouterr().err


# Weights of about 1e37, which are finite; their products are not.
SGD = ("optim.name=sgd", "optim.lr=1e38")
# Weights of 1e40, which are infinite in fp32.
DECAY = ("optim.name=adamw", "optim.lr=1e38", "optim.weight_decay=100")


@pytest.mark.parametrize(
    ("every", "optimizer", "message"),
    [
        ("0", SGD, "the validation loss is not a finite number at the end of epoch 1"),
        ("0", DECAY, "the weights are not finite numbers after step 1 of epoch 1"),
        ("1", DECAY, "the weights are not finite numbers after step 1 of epoch 1"),
    ],
)
def test_weights_that_are_not_finite_are_not_saved(
    every, optimizer, message, synth_dataset, tmp_path, capsys
):
    """The update that spoils them is the only one of an epoch, or one within it. Its loss was still
    finite."""
    batch = "80" if every == "0" else "16"
    sets = (f"train.checkpoint_every={every}", f"train.batch_size={batch}", "train.epochs=1")
    wild = ("train.ema=0", "schedule.name=constant", *optimizer)
    assert main(["train", *command(synth_dataset, tmp_path / "run", *sets, *wild)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and "no checkpoint yet" in line
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "diverged"


def test_checkpoints_change_nothing_in_a_training(whole_run, synth_dataset, tmp_path):
    train(command(synth_dataset, tmp_path / "run", "train.checkpoint_every=0"))
    assert_same_run(tmp_path / "run", whole_run)


def test_bf16_is_slow_only_on_a_cpu_without_instructions_for_it(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(setup, "has_bf16", lambda: False)
    assert setup.slow_bf16(cpu, "bf16")
    assert not setup.slow_bf16(cpu, "fp32") and not setup.slow_bf16(gpu, "bf16")
    monkeypatch.setattr(setup, "has_bf16", lambda: True)
    assert not setup.slow_bf16(cpu, "bf16")


@pytest.mark.parametrize("compiled", [True, False])
def test_compiling_on_a_cpu_is_announced(compiled, synth_dataset, tmp_path, capsys, monkeypatch):
    def stopped(trainer):
        raise StopRequested(signal.SIGINT)

    monkeypatch.setattr(training, "epoch", stopped)
    monkeypatch.setattr(torch, "compile", lambda forward, **kwargs: forward)
    sets = [f"train.compile={str(compiled).lower()}"]
    assert main(["train", *command(synth_dataset, tmp_path / "run", *sets)]) == 130
    assert ("compiling the first step" in capsys.readouterr().out) == compiled


def test_a_dataset_without_arrays_is_enough_for_a_training(synth_source, tmp_path):
    """Sample predictions, too, are read by the engine of the run."""
    convert(synth_source, tmp_path / "data", Options(formats=("tar",)))
    sets = ("data.pipeline=torchvision", "data.workers=1", "train.epochs=1")
    assert main(["train", *command(tmp_path / "data", tmp_path / "run", *sets)]) == 0
    samples = json.loads((tmp_path / "run" / "predictions.json").read_text())
    files = sorted((synth_source / "val" / "images").iterdir())
    rows = np.linspace(0, len(files) - 1, 12).astype(int)
    for sample, row in zip(samples, rows, strict=True):
        shown = Image.open(io.BytesIO(base64.b64decode(sample["png"])))
        assert np.array_equal(np.asarray(shown), np.asarray(Image.open(files[row]).convert("RGB")))


def test_sample_predictions_compile_nothing(synth_dataset):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    cfg = config.load(None, [f"data.path={synth_dataset}", *TINY])
    manifest = read_manifest(synth_dataset)
    model = models.build(cfg.model, len(manifest.classes))
    model.forward = torch.compile(model.forward, backend=backend, dynamic=False)
    samples, _ = review(model, cfg, manifest, torch.device("cpu"))
    assert len(samples) == 12 and not graphs


# The main process sends itself a signal in its seventh step.
SIGNALLED = """
import os, signal, sys
from fastlab import train

step, seen = train.train_step, []

def signalling(trainer, batch):
    seen.append(trainer.progress.epoch)
    if len(seen) == 7 and trainer.accelerator.is_main_process:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(trainer, batch)

train.train_step = signalling
code = train.main(sys.argv[1:])
# In one piece: the other process prints, too.
os.write(1, f"exit {code} in epoch {seen[-1] + 1};".encode())
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_signal_to_one_of_two_processes_stops_both_at_the_end_of_a_short_epoch(
    synth_dataset, tmp_path
):
    """They look at the signals every fifty steps, and after each epoch of five."""
    script = tmp_path / "script.py"
    script.write_text(SIGNALLED)
    arguments = command(synth_dataset, tmp_path / "run", "train.epochs=30")
    output, errors = launch(arguments, 2, script=script).communicate(timeout=200)
    assert output.count("exit 143 in epoch 2;") == 2, errors
    assert (tmp_path / "run" / "checkpoints" / "step-00000010").is_dir()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_what_one_of_two_processes_refuses_ends_both_and_is_reported_once(synth_dataset, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    _, errors = launch(command(synth_dataset, tmp_path), 2).communicate(timeout=200)
    lines = [line for line in errors.splitlines() if line.startswith("fastlab: ")]
    assert len(lines) == 1 and "is not empty" in lines[0], errors
    assert f'File "{ROOT / "fastlab"}' not in errors, errors
    # -15: the launcher ended the process whose partner had already exited.
    assert {"2"} <= set(re.findall(r"exitcode *: (-?\d+)", errors)) <= {"2", "-15"}, errors
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("seconds", [0, 1])  # as Python starts; while modules are imported
def test_processes_that_are_starting_die_with_torchruns_agent(seconds, synth_dataset, tmp_path):
    """Without its store they would wait for each other for half an hour."""
    agent = launch(command(synth_dataset, tmp_path / "run"), 2)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    try:
        assert wait_until(lambda: len(children.read_text().split()) >= 2, agent)
        assert agent.poll() is None
        time.sleep(seconds)
    finally:
        agent.kill()
    agent.communicate(timeout=60)  # returns when the workers, too, have closed its pipes


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_killed_within_an_epoch_resume_bit_for_bit(synth_dataset, tmp_path):
    """Within an epoch, the moving averages of running statistics differ between the processes."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(command(synth_dataset, whole), 2)
    agent = launch(command(synth_dataset, run), 2)
    try:
        assert wait_until((run / "checkpoints" / "step-00000002").exists, agent)
    finally:
        agent.kill()
    agent.communicate(timeout=60)
    train(["--resume", str(run)], 2)
    assert_same_run(run, whole)
