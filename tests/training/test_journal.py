"""What a training prints: its first and last lines, the table of epochs and the progress bar."""

import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastlab import train as training
from fastlab.cli import main
from fastlab.config import Config, TrainConfig
from fastlab.training.guards import StopRequested
from fastlab.training.journal import Bar, Journal
from fastlab.training.metrics import Figures
from fastlab.training.state import Progress
from tests.trainings import ROOT, command


def test_the_first_line_names_model_device_data_and_output(synth_dataset, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", *command(synth_dataset, run, "train.epochs=1")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        f"resnet11: 11,712 parameters; fp32 on cpu; data: {synth_dataset}, 4 classes, 80 training "
        f"and 20 validation images; output: {run}"
    )
    assert lines[1].startswith("computing with ")
    assert lines[2].split()[-1] == "seconds" and lines[3].split()[0] == "1/1"


def test_a_stopped_run_prints_the_command_that_resumes_it(
    synth_dataset, tmp_path, monkeypatch, capsys
):
    """A shell takes it, though the path has a space and is relative."""
    monkeypatch.chdir(tmp_path)

    def stopped(trainer):
        raise StopRequested(15)

    with monkeypatch.context() as patch:
        patch.setattr(training, "epoch", stopped)
        arguments = command(synth_dataset, "my run", "train.epochs=1")
        assert main(["train", *arguments]) == 143
    _, _, advised = capsys.readouterr().out.partition("; resume with: ")
    program, *words = shlex.split(advised)
    assert (program, words) == ("fastlab", ["train", "--resume", "my run"])
    assert main(words) == 0
    assert "look at it: fastlab report 'my run' --out report.html\n" in capsys.readouterr().out


def journal(epochs: int, progress: Progress) -> Any:
    state = SimpleNamespace(progress=progress, wall=lambda: 0.0)
    run = SimpleNamespace(append_metrics=lambda record: None)
    cfg = Config(train=TrainConfig(epochs=epochs))
    accelerator = SimpleNamespace(is_main_process=True, log=lambda values, step: None)
    values: list[Any] = [run, cfg, None, None, state, accelerator]
    return Journal(*values)


def test_lines_of_epochs_fit_into_100_columns(capsys):
    widest = Figures(-1.2345e-300, 10**9, 10**9, 10**9)
    for progress, epochs in ((Progress(epoch=99_999, lr=1.25e-300), 99_999), (Progress(1), 1)):
        journal(epochs, progress).record(1, widest, widest, 99_999_999.0, 604_800.0)
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= 100


@pytest.fixture
def terminal() -> Any:
    """Both ends of a terminal of 100 columns."""
    ends = pty.openpty()
    fcntl.ioctl(ends[1], termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    yield ends
    os.close(ends[0])


def shown(process: subprocess.Popen[bytes], end: int) -> str:
    """All that `process` writes to its terminal."""
    content = b""
    while True:
        try:
            content += os.read(end, 65536)
        except OSError:  # the terminal's last user closed it
            break
    assert process.wait(timeout=60) == 0, content
    return content.decode()


def test_a_bar_on_a_terminal_moves_though_no_step_looks_at_the_device(
    synth_dataset, tmp_path, terminal
):
    sets = ("train.epochs=2", "train.batch_size=1", "train.log_every=1000", "train.ema=0")
    sets += ("model.batch_norm=false", "train.checkpoint_every=0")
    arguments = command(synth_dataset, tmp_path / "run", *sets)
    start = [sys.executable, "-m", "fastlab", "train", *arguments]
    with subprocess.Popen(start, cwd=ROOT, stdout=terminal[1], stderr=terminal[1]) as process:
        os.close(terminal[1])
        content = shown(process, terminal[0])
    bars = re.findall(r"epoch (\d)/2 +(\d+)%\|.*?\| ([\d,]+) images/s, (\d\d:\d\d) left", content)
    # Its share is that of the whole run: the second epoch begins at half.
    assert {number for number, *_ in bars} == {"1", "2"}
    assert max(int(share) for number, share, *_ in bars if number == "1") <= 50
    assert min(int(share) for number, share, *_ in bars if number == "2") >= 50
    assert len({share for _, share, *_ in bars}) >= 4


def test_there_is_no_bar_where_standard_error_is_no_terminal(synth_dataset, tmp_path, terminal):
    arguments = command(synth_dataset, tmp_path / "run", "train.epochs=1")
    start = [sys.executable, "-m", "fastlab", "train", *arguments]
    with subprocess.Popen(start, cwd=ROOT, stdout=terminal[1], stderr=subprocess.PIPE) as process:
        os.close(terminal[1])
        content = shown(process, terminal[0])
        assert process.stderr and process.stderr.read() == b""
    assert "left" not in content and "1/1" in content


def test_the_time_left_includes_the_validations(monkeypatch):
    """A step of 10 images takes 0.5 s, and a validation 7 s; two of three epochs are left."""
    clock = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    monkeypatch.setattr("fastlab.training.journal.time.perf_counter", lambda: clock[0])
    bar = Bar(3, 40, 0, disable=False)
    bar._time = lambda: clock[0]
    bar.start_t = bar.last_print_t = 0.0
    for epoch in range(2):
        bar.begin(epoch)
        for _ in range(4 if epoch == 0 else 2):
            clock[0] += 0.5
            bar.update(10)
        if epoch == 0:
            bar.pause()
            clock[0] += 7.0
    values = bar.format_dict
    bar.close()
    assert values["images"] == "20"
    assert values["left"] == bar.format_interval((2 + 4) * 0.5 + 2 * 7)


def test_a_step_that_updates_the_bar_reads_no_tensor(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "item", lambda *_: pytest.fail("a tensor was read"))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda *_: pytest.fail("a tensor was read"))
    bar = Bar(1, 10, 0, disable=False)
    bar.begin(0)
    bar.update(10)
    bar.close()
