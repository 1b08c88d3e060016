"""Studies of real trainings, tiny ones: whole, stopped, killed and resumed."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastlab import config as configs
from fastlab.study.folder import StudyDir, look
from fastlab.study.spec import Task
from tests.study.studies import ROOT, TINY, Page, write_study

STUDY = """
seeds = [0]
[[rows]]
optim.lr = 0.01
[[rows]]
label = "fails"
train.batch_size = 9999
"""


def command(path: Path, dataset: Path, out: Path, *options: str) -> list[str]:
    sets = [part for value in (f"data.path={dataset}", *TINY) for part in ("--set", value)]
    base = [sys.executable, "-m", "fastlab", "study", str(path), "--out", str(out)]
    return [*base, "--jobs", "2", "--no-calibration", *sets, *options]


def launch(arguments: list[str], limit: int = resource.RLIM_INFINITY) -> subprocess.Popen[str]:
    """Start a command whose files may have `limit` bytes."""
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )


def finish(arguments: list[str], limit: int = resource.RLIM_INFINITY) -> tuple[int, str]:
    """Exit status, and everything printed."""
    process = launch(arguments, limit)
    try:
        printed, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, printed


def wait_for_step(process: subprocess.Popen[str], out: Path, step: int) -> None:
    """Wait until a training has written the checkpoint of `step` or of a later one."""
    deadline = time.monotonic() + 60
    while process.poll() is None:
        steps = [int(path.name[5:13]) for path in out.glob("runs/*/checkpoints/step-*")]
        if max(steps, default=0) >= step:
            return
        assert time.monotonic() < deadline
        time.sleep(0.005)


def untimed_table(out: Path) -> list[list[str]]:
    """The report's table without the columns that measure time."""
    lines = [line.split("|") for line in (out / "report.md").read_text().splitlines()]
    return [line[1:5] + line[7:] for line in lines if len(line) == 10]


def task_in(run: Path) -> Task:
    return Task(run.name, configs.load(run / "config.toml"))


@pytest.fixture(scope="module")
def whole(synth_dataset, tmp_path_factory) -> Path:
    """An undisturbed study."""
    folder = tmp_path_factory.mktemp("whole")
    path = write_study(folder, STUDY)
    status, printed = finish(command(path, synth_dataset, folder / "out"))
    assert status == 1, printed
    assert "1 of 2 runs finished, 1 failed" in printed
    assert "split train of" in printed and "take a smaller batch" in printed
    return folder / "out"


@pytest.mark.slow
def test_a_failed_run_is_recorded_and_the_others_continue(whole):
    records = [json.loads(file.read_text()) for file in whole.glob("records/*.json")]
    assert sorted(record["state"] for record in records) == ["failed", "finished"]
    [failed] = [record for record in records if record["state"] == "failed"]
    assert failed["exit_status"] == 2 and failed["reason"].startswith("train.batch_size = 9999")
    [page] = Page((whole / "report.html").read_text()).all("main")
    assert "take a smaller batch" in page["text"]


@pytest.mark.slow
def test_the_report_names_the_command_that_made_it(whole):
    assert "\nMade by `fastlab study mine.toml --out out --jobs 2" in (
        (whole / "report.md").read_text()
    )


def stopped_and_killed(path: Path, dataset: Path, out: Path) -> bool:
    """Whether the study was still training both times."""
    process = launch(command(path, dataset, out))
    wait_for_step(process, out, 3)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    if process.returncode != 130:
        assert process.returncode == 1, printed  # as a whole study ends, with the run that fails
        return False
    assert "stopping" in printed and "the same command resumes" in printed
    assert "Traceback" not in printed
    [run] = (out / "runs").iterdir()
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
    assert (out / "report.html").exists()

    process = launch(command(path, dataset, out))
    wait_for_step(process, out, 9)
    process.kill()
    process.communicate(timeout=60)
    with StudyDir(out).locked():  # until the orphaned training has ended, too
        status = look(StudyDir(out), task_in(run)).status
    assert status in ("interrupted", "finished")
    return status == "interrupted"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_study_whose_terminal_is_closed_saves_its_trainings(synth_dataset, tmp_path):
    """The shell and the kernel each send SIGHUP."""
    out = tmp_path / "out"
    path = write_study(tmp_path, STUDY)
    process = launch(command(path, synth_dataset, out, "--epochs", "1000"))
    wait_for_step(process, out, 1)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGHUP, printed
    [run] = (out / "runs").iterdir()
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
    assert "the same command resumes" in printed


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_study_that_is_stopped_and_killed_ends_as_an_undisturbed_one(
    whole, synth_dataset, tmp_path
):
    path = write_study(tmp_path, STUDY)
    # A signal comes too late where this process has to wait while the training continues.
    attempts = (tmp_path / f"out-{number}" for number in range(3))
    out = next(out for out in attempts if stopped_and_killed(path, synth_dataset, out))
    [run] = (out / "runs").iterdir()
    status, printed = finish(command(path, synth_dataset, out))
    assert status == 1, printed
    assert untimed_table(out) == untimed_table(whole) and len(untimed_table(out)) == 4
    words = (out / "logs" / f"{run.name}.log").read_text().split()
    assert [words.count(f"{number}/6") for number in range(1, 7)] == [1] * 6, "resumed"
    before = {file: file.stat().st_mtime_ns for file in out.glob("runs/*/metrics.jsonl")}
    status, printed = finish(command(path, synth_dataset, out))
    assert status == 1 and "begins" not in printed and "nothing left to train" in printed
    assert before == {file: file.stat().st_mtime_ns for file in out.glob("runs/*/metrics.jsonl")}


FULL = """
seeds = [0]
[[rows]]
optim.lr = 0.01
[[rows]]
model.width = 12
[[rows]]
model.width = 16
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_full_disk_stops_the_study_and_the_same_command_resumes_it(synth_dataset, tmp_path):
    out = tmp_path / "out"
    arguments = command(write_study(tmp_path, FULL), synth_dataset, out, "--jobs", "1")
    arguments += ["--set", "train.epochs=1"]
    status, printed = finish(arguments, limit=300_000)  # room for the first run's checkpoint
    *events, line = printed.splitlines()
    assert status == 2, printed
    assert line.startswith(f"fastlab: {out}: the disk was full for ") and "resumes" in line
    assert not [event for event in events if "fastlab:" in event or "Traceback" in event]
    assert [event.split()[0] for event in events[-4:]] == [
        *("begins", "finished", "begins", "interrupted")
    ]
    [first] = [p.parent for p in out.glob("runs/*/summary.json") if '"finished"' in p.read_text()]
    before = {p: p.read_bytes() for p in first.rglob("*") if p.is_file()}
    status, printed = finish(arguments)
    assert status == 0 and "3 of 3 runs finished" in printed, printed
    assert before == {p: p.read_bytes() for p in first.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_a_record_that_cannot_be_written_stops_the_study_with_one_line(synth_dataset, tmp_path):
    out = tmp_path / "out"
    arguments = command(write_study(tmp_path, STUDY), synth_dataset, out, "--jobs", "1")
    status, printed = finish([*arguments, "--dry-run"])
    names = [word for word in printed.split() if word.startswith("resnet11-")]
    assert status == 0 and len(names) == 2, printed
    for name in names:  # a directory takes the place of the file
        (out / "records" / f"{name}-seed0.json").mkdir(parents=True)
    status, printed = finish(arguments)
    assert status == 2, printed
    assert f"fastlab: {out}: the study had to stop (Is a directory)" in printed
    assert "Traceback" not in printed
