"""Trainings on several machines, which here are launchers side by side on one, and the launchers
that start fewer processes than they were asked for."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fastlab.cli import main
from tests.trainings import ROOT, command, metrics, train

pytestmark = pytest.mark.usefixtures("without_coverage")
SAME = ("train.precision=fp64", "model.sync_batch_norm=true", "model.dropout_conv=0")
SAME += ("model.dropout_fc=0", "train.checkpoint_every=0")
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
MULTI_CPU = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
num_machines: 1
num_processes: 2
use_cpu: true
mixed_precision: 'no'
"""

# In the seventh step, the second machine's process sends its launcher the signal that is named.
SIGNALLED = """
import os, signal, sys, time
from fastlab import train
from fastlab.processes import die_with_launcher

die_with_launcher()
step, seen = train.train_step, []

def signalling(trainer, batch):
    seen.append(batch)
    if len(seen) == 7 and trainer.accelerator.process_index == 1:
        os.kill(os.getppid(), signal.{name})
        while not trainer.watch.signal:  # which the launcher passes on
            time.sleep(0.01)
    return step(trainer, batch)

train.train_step = signalling
raise SystemExit(train.main(sys.argv[1:]))
"""


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


def launched(launcher: list[str], script: Path, arguments: list[str], cwd: Path = ROOT):
    """A launcher that knows of no GPU, and of nothing else than its own options."""
    environment = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*launcher, str(script), *arguments],
        env=environment,
        cwd=cwd,
        text=True,
        stdout=pipe,
        stderr=pipe,
    )


def two_machines(
    arguments: list[str],
    script: Path = ROOT / "fastlab" / "train.py",
    folders: tuple[Path, Path] = (ROOT, ROOT),
) -> list[tuple[int, str, str]]:
    """Train on two machines, to their end. Returns exit status, output and errors of each."""
    port, nodes = free_port(), []
    try:
        for rank, folder in enumerate(folders):
            launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
            launcher += [f"--node_rank={rank}", "--nproc_per_node=1"]
            launcher += ["--master_addr=127.0.0.1", f"--master_port={port}"]
            nodes.append(launched(launcher, script, arguments, folder))
        texts = [node.communicate(timeout=200) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    return [(node.returncode, *text) for node, text in zip(nodes, texts, strict=True)]


def lines(errors: str) -> list[str]:
    """What fastlab itself reported among the errors of a launcher."""
    assert f'File "{ROOT / "fastlab"}' not in errors, errors
    return [line for line in errors.splitlines() if line.startswith("fastlab: ")]


@pytest.fixture
def signalled(tmp_path):
    def write(name: str) -> Path:
        script = tmp_path / "script.py"
        script.write_text(SIGNALLED.format(name=name))
        return script

    return write


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_machines_stop_together_resume_and_give_the_figures_of_one(
    synth_dataset, tmp_path, signalled, capsys
):
    one, two = tmp_path / "one", tmp_path / "two"
    train(command(synth_dataset, one, *SAME))
    arguments = command(synth_dataset, two, *SAME)
    (_, output, errors), other = two_machines(arguments, signalled("SIGTERM"))
    assert "stopped by signal 15 after epoch 2, step 0" in output, errors
    assert other[0] != 0 and not lines(errors) and not lines(other[2])
    assert [path.name for path in (two / "checkpoints").glob("step-*")] == ["step-00000010"]
    for status, _, errors in two_machines(["--resume", str(two)]):
        assert status == 0, errors
    assert json.loads((two / "environment.json").read_text())["processes"] == 2
    assert len(metrics(two)) == len(metrics(one)) == 3
    for expected, record in zip(metrics(one), metrics(two), strict=True):
        assert record["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-4)
        for count in ("val_images", "val_correct1", "val_correct5"):
            assert record[count] == expected[count]
    for run in (one, two):
        assert main(["evaluate", str(run), "--json"]) == 0
    first, second = (json.loads(text) for text in capsys.readouterr().out.splitlines())
    assert second["loss"] == pytest.approx(first["loss"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_machine_that_dies_ends_the_other_with_one_line(synth_dataset, tmp_path, signalled):
    run = tmp_path / "run"
    arguments = command(synth_dataset, run, "train.epochs=30")
    first, second = two_machines(arguments, signalled("SIGKILL"))
    assert second[0] == -signal.SIGKILL
    (line,) = lines(first[2])
    assert line == (
        f"fastlab: another process of this training ended; resume with the launcher as before, "
        f"and --resume {run}"
    )


@pytest.mark.slow
@pytest.mark.multiprocess
def test_machines_without_a_common_run_directory_are_refused(synth_dataset, tmp_path):
    folders = (tmp_path / "a", tmp_path / "b")
    for folder in folders:
        folder.mkdir()
    arguments = command(synth_dataset, Path("run"))
    nodes = two_machines(arguments, folders=folders)
    (line,) = [line for _, _, errors in nodes for line in lines(errors)]
    assert "run: is not the same directory on every machine" in line


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("configured", [True, False])
def test_one_process_of_two_is_refused(configured, synth_dataset, tmp_path):
    file, run = tmp_path / "multi-cpu.yaml", tmp_path / "run"
    file.write_text(MULTI_CPU)
    options = ["--config_file", str(file)] if configured else ["--cpu", "--num_processes=2"]
    script = ROOT / "fastlab" / "train.py"
    process = launched([*ACCELERATE, *options], script, command(synth_dataset, run))
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    (line,) = lines(errors)
    assert "but started one" in line and "torchrun --nproc_per_node" in line
    assert not run.exists()
