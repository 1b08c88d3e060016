"""Studies, and a training on two nodes, on a SLURM that runs on this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastlab.study.folder import StudyDir, look
from tests.study.slurm import MISSING, call, running, wait_until
from tests.study.studies import ROOT, write_study
from tests.study.test_pool import command, launch, task_in
from tests.trainings import command as training

pytestmark = [
    pytest.mark.slow,
    pytest.mark.multiprocess,
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
    pytest.mark.usefixtures("without_coverage"),
]
LONG = 12
ROW = """
[[rows]]
train.epochs = {}
optim.lr = {}
"""
EIGHT = "seeds = [0]" + "".join(ROW.format(LONG if n < 3 else 1, n / 100) for n in range(1, 9))
TWO = """
factor = "optim.lr"
values = [0.01, 0.02]
seeds = [0]
"""


@pytest.fixture(scope="module", autouse=True)
def slurm(tmp_path_factory):
    with running(tmp_path_factory.mktemp("slurm")):
        yield


@pytest.fixture(autouse=True)
def clean_cluster():
    """A test that fails leaves no jobs and no lost nodes to the next."""
    yield
    call("scancel", "--me", "--signal=KILL", "--full")
    call("scancel", "--me")
    for node in call("sinfo", "-h", "-N", "-t", "down", "-o", "%N").split():
        call("scontrol", "update", f"NodeName={node}", "State=RESUME")
    wait_until(lambda: not jobs())


@contextmanager
def launched(arguments: list[str]) -> Generator[subprocess.Popen[str]]:
    """A command that ends with the block at the latest."""
    with launch(arguments) as process:
        try:
            yield process
        finally:
            process.kill()


def jobs(*options: str) -> list[list[str]]:
    """The index, state and node of each job that waits or runs."""
    lines = call("squeue", "-h", "--array", "-o", "%K %T %N", *options).splitlines()
    return [line.split() for line in lines]


def epochs_of(run: Path) -> list[int]:
    """The whole epochs that a run has trained."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)["epoch"] for line in lines]


def begun(out: Path) -> list[Path]:
    """The runs that have trained an epoch."""
    return [run for run in (out / "runs").glob("*") if epochs_of(run)]


def test_eight_runs_finish_two_at_a_time_through_a_requeue_and_the_loss_of_a_node(
    synth_dataset, tmp_path
):
    out = tmp_path / "out"
    path = write_study(tmp_path, EIGHT)
    with launched(command(path, synth_dataset, out, "--cluster", "slurm")) as process:
        wait_until(lambda: len(begun(out)) == 2)
        array = call("squeue", "-h", "-o", "%F").split()[0]
        node = call("squeue", "-h", "-j", f"{array}_1", "-o", "%N").strip()
        call("scontrol", "requeue", f"{array}_0")
        call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
        most = 0
        while process.poll() is None:
            most = max(most, len(jobs("-t", "RUNNING")))
            time.sleep(0.1)
        printed, _ = process.communicate()
    assert process.returncode == 0 and "8 of 8 runs finished" in printed, printed
    assert most == 2
    trained = [epochs_of(run) for run in (out / "runs").iterdir()]
    whole = [list(range(1, count + 1)) for count in [1] * 6 + [LONG] * 2]
    assert sorted(trained, key=len) == whole
    logs = [path.read_text() for path in (out / "logs").iterdir()]
    assert sum("stopped by signal 15" in log for log in logs) == 2, "each resumed a checkpoint"


def test_a_time_limit_leads_to_a_checkpoint_and_a_requeue_and_a_signal_cancels_the_array(
    synth_dataset, tmp_path
):
    out = tmp_path / "out"
    path = write_study(tmp_path, TWO)
    options = ["--cluster", "slurm", "--epochs", "100000", "--jobs", "1"]
    options += ["--cluster-set", "time=1", "--cluster-set", "signal=B:USR1@55"]
    with launched(command(path, synth_dataset, out, *options)) as process:
        wait_until(lambda: begun(out))
        [run] = begun(out)  # the other one, where SLURM requeued the first as it started
        log = StudyDir(out).log(task_in(run))
        wait_until(lambda: "stopped by signal 15" in log.read_text())
        before = len(epochs_of(run))
        wait_until(lambda: len(epochs_of(run)) > before)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, printed
    assert "checkpoints are saved first" in printed and "the same command resumes" in printed
    assert not jobs()
    assert look(StudyDir(out), task_in(run)).status == "interrupted"
    trained = epochs_of(run)
    assert trained == list(range(1, len(trained) + 1)) and len(trained) > before


def test_the_example_trains_one_run_on_two_nodes(synth_dataset, tmp_path, monkeypatch):
    run, log = tmp_path / "run", tmp_path / "log"
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.chdir(ROOT)
    arguments = training(synth_dataset, run, "train.precision=fp32")
    call("sbatch", f"--output={log}", "examples/slurm-train.sh", *arguments)
    wait_until(lambda: not jobs())
    assert json.loads((run / "environment.json").read_text())["processes"] == 2, log.read_text()
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"
    assert epochs_of(run) == [1, 2, 3]
