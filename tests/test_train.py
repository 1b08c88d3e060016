import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
TINY = (
    "model.width=4",
    "train.batch_size=16",
    "train.eval_batch_size=7",
    "train.epochs=3",
    "train.checkpoint_every=2",
    "model.dropout_conv=0.1",
    "train.ema=0.9",
)


def command(dataset: Path, out: Path, *overrides: str) -> list[str]:
    sets = [f"data.path={dataset}", *TINY, *overrides]
    return ["--config", str(ROOT / "configs" / "demo.toml"), "--out", str(out)] + [
        part for value in sets for part in ("--set", value)
    ]


def launch(arguments: list[str], processes: int = 1, **kwargs) -> subprocess.Popen:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*start, str(ROOT / "fastlab" / "train.py"), *arguments],
        env=environment,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **kwargs,
    )


def train(arguments: list[str], processes: int = 1) -> None:
    process = launch(arguments, processes)
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, errors


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "images_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(max((run / "checkpoints").glob("step-*")) / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def whole_run(synth_dataset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(command(synth_dataset, out))
    return out


def test_a_run_leaves_what_reports_read(whole_run):
    records = metrics(whole_run)
    assert [record["epoch"] for record in records] == [1, 2, 3]
    # 4 classes of 20: 5 whole batches of 16; validation: 5 a class.
    assert [record["step"] for record in records] == [5, 10, 15]
    assert all(record["val_images"] == 20 for record in records)
    assert json.loads((whole_run / "summary.json").read_text())["status"] == "finished"
    assert len(json.loads((whole_run / "predictions.json").read_text())) == 12


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_resumes_bit_for_bit(number, whole_run, synth_dataset, tmp_path):
    out = tmp_path / "run"
    process = launch(command(synth_dataset, out))
    deadline = time.monotonic() + 120
    # The first checkpoint within an epoch is that of step 2.
    while not list((out / "checkpoints").glob("step-*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    expected = -signal.SIGKILL if number == signal.SIGKILL else 128 + number
    assert process.returncode in (expected, 0), errors  # 0: it was done already
    if process.returncode == 0:
        pytest.skip("the run ended before the signal arrived")
    train(["--resume", str(out)])
    assert metrics(out) == metrics(whole_run)
    assert_same_weights(out, whole_run)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_processes_train_as_one(synth_dataset, tmp_path):
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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "nowhere.toml"], "nowhere.toml"),
        (["--resume", "nowhere"], "nowhere: not a run directory"),
        ([], "--config FILE is missing"),
        (["--config", "configs/demo.toml", "--set", "optim.lrr=1"], "optim.lr"),
        (["--config", "configs/demo.toml", "--set", "data.path=nowhere"], "fastlab convert"),
    ],
)
def test_mistakes_get_one_line_and_status_2(arguments, said, capsys, monkeypatch):
    from fastlab.cli import main

    monkeypatch.chdir(ROOT)
    assert main(["train", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0]


def test_a_finished_run_is_not_overwritten(whole_run, synth_dataset, capsys):
    from fastlab.cli import main

    before = (whole_run / "metrics.jsonl").read_bytes()
    assert main(["train", *command(synth_dataset, whole_run)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert (whole_run / "metrics.jsonl").read_bytes() == before


def test_evaluate_agrees_with_training(whole_run, capsys):
    from fastlab.cli import main

    assert main(["evaluate", str(whole_run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    best = max(metrics(whole_run), key=lambda record: record["val_top1"])
    assert found["images"] == 20
    assert found["top1"] == best["val_top1"]
    assert found["loss"] == pytest.approx(best["val_loss"], abs=1e-5)
