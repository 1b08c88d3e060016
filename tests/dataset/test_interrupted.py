"""Commands that write, ended by signals, and originals that change while they are converted."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from fastlab import files
from fastlab.cli import main
from fastlab.dataset import convert as conversion
from fastlab.dataset.convert import Options, convert
from fastlab.dataset.formats import Settings
from fastlab.files import move_into_place, partial_directory
from tests.packages import has

ROOT = Path(__file__).parents[2]

# The command, but `function` reports that it was reached and waits for a byte of standard input.
STOPPED = """
import importlib, os, sys
module, name = sys.argv.pop(1), sys.argv.pop(1)
module = importlib.import_module(module)
function = getattr(module, name)
def stopped(*args):
    setattr(module, name, function)
    print("reached", flush=True)
    os.read(0, 1)  # not sys.stdin, which is another one in child processes
    return function(*args)
setattr(module, name, stopped)
from fastlab.cli import main
sys.exit(main())
"""
PLACES = {
    "decoding": ("fastlab.dataset.formats.array", "_write_images", "convert", "--workers", "2"),
    "the tar writer": ("fastlab.dataset.formats.tar", "_write_shard", "convert"),
    "the end": ("fastlab.dataset.convert", "_finish", "convert"),
    "synth": ("fastlab.dataset.synth", "_save", "synth"),
}


def start(place: str, source: Path, out: Path, **settings) -> subprocess.Popen[str]:
    """The command, at that place."""
    module, name, command, *options = PLACES[place]
    if command == "convert":
        options = [str(source), str(out), "--formats", "array,tar", *options]
    else:
        options = [str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, module, name, command, *options],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **settings,
    )
    assert process.stdout.readline() == "reached\n"
    return process


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("number", "whole_group"),
    [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGHUP, True)],
)
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_ends_a_command_with_one_line_and_nothing_left(
    place, number, whole_group, synth_source, tmp_path
):
    """A scheduler may signal the command alone, and a terminal signals its whole group."""
    process = start(place, synth_source, tmp_path / "out")
    (os.killpg if whole_group else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=60)  # returns once no process holds these pipes
    assert process.returncode == 128 + number, errors
    assert errors == f"fastlab: ended by {signal.Signals(number).name}\n"
    assert os.listdir(tmp_path) == []


def test_a_second_signal_does_not_interrupt_the_removal(synth_source, tmp_path):
    process = start("the end", synth_source, tmp_path / "out")
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
        os.kill(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (129, 143) and len(errors.splitlines()) == 1
    assert os.listdir(tmp_path) == []


def test_a_hangup_that_is_ignored_ends_nothing(synth_source, synth_dataset, tmp_path):
    """As nohup starts it."""

    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = start("the end", synth_source, tmp_path / "out", preexec_fn=ignore)
    os.killpg(process.pid, signal.SIGHUP)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and not errors
    name = Path("array", "train-images.npy")
    assert (tmp_path / "out" / name).read_bytes() == (synth_dataset / name).read_bytes()


def test_a_signal_ends_a_download_with_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x.zip"
        command = [sys.executable, "-m", "fastlab", "download", str(tmp_path / "x.zip")]
        process = subprocess.Popen(
            [*command, "--url", url], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        connection, _ = server.accept()
        with connection:
            assert connection.recv(4)
            process.terminate()
            _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and errors == "fastlab: ended by SIGTERM\n"
    assert not (tmp_path / "x.zip").exists()


def test_an_interruption_between_two_renames_costs_nothing(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("old")
    rename = Path.rename

    def interrupted(self, target):
        rename(self, target)
        monkeypatch.setattr(Path, "rename", rename)
        raise KeyboardInterrupt(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt), partial_directory(out) as partial:
        (partial / "file").write_text("new")
        monkeypatch.setattr(Path, "rename", interrupted)
        move_into_place(partial, out)
    assert os.listdir(tmp_path) == ["out"] and (out / "file").read_text() == "old"


@pytest.mark.parametrize("command", ["convert", "synth"])
@pytest.mark.parametrize("kind", ["link", "file", "foreign"])
def test_what_has_the_name_of_the_partial_directory_is_kept(
    kind, command, synth_source, tmp_path, monkeypatch, capsys
):
    partial, thesis = tmp_path / ".out.fastlab-partial", tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.tex").write_text("years")
    if kind == "link":
        partial.symlink_to(thesis)
    elif kind == "file":
        partial.write_text("years")
    else:
        thesis.rename(partial)
        monkeypatch.setattr(files.os, "geteuid", lambda: os.getuid() + 1)
    before = sorted(tmp_path.rglob("*"))
    arguments = [str(synth_source)] if command == "convert" else []
    assert main([command, *arguments, str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{partial}: is a link, a file or of another user" in line
    assert sorted(tmp_path.rglob("*")) == before
    assert [p.read_text() for p in before if p.is_file()]


CHANGES = {
    "other bytes": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "another image of the same size and date": lambda path: _with_the_old_date(path),
    "removed": lambda path: path.unlink(),
}


def _with_the_old_date(path: Path) -> None:
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "form",
    ["tar", pytest.param("ffcv", marks=pytest.mark.skipif(not has("ffcv"), reason="needs FFCV"))],
)
def test_an_original_that_changes_after_it_was_decoded_ends_the_conversion(
    form, change, synth_source, tmp_path, monkeypatch, capsys
):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(synth_source, source)
    (path, *_) = (source / "train").glob("*/images/*_3.JPEG")
    write_format = conversion.write_format

    def later(*args):
        CHANGES[change](path)
        write_format(*args)

    monkeypatch.setattr(conversion, "write_format", later)
    formats = ["--formats", f"array,{form}", "--ffcv-encoding", "jpeg"]
    assert main(["convert", str(source), str(out), *formats]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert path.name in line or change == "removed"
    assert os.listdir(tmp_path) == ["source"]


def test_an_archive_that_is_written_over_after_it_was_decoded_ends_the_conversion(
    synth_source, tmp_path, monkeypatch, capsys
):
    source = tmp_path / "source.tar"
    with tarfile.open(source, "w") as archive:
        archive.add(synth_source, "tiny")
    write_format = conversion.write_format

    def later(*args):
        data = source.read_bytes()
        at = data.index(b"\xff\xd8")  # the first JPEG
        with source.open("r+b") as file:
            file.seek(at + 200)
            file.write(b"\0\0\0\0")
        write_format(*args)

    monkeypatch.setattr(conversion, "write_format", later)
    assert main(["convert", str(source), str(tmp_path / "out"), "--formats", "array,tar"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "changed while it was converted" in line
    assert os.listdir(tmp_path) == ["source.tar"]


def test_an_original_that_changes_while_a_format_is_added_ends_the_conversion(
    synth_source, tmp_path, monkeypatch, capsys
):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(synth_source, source)
    convert(source, out, Options(settings=Settings()))
    before = np.load(out / "array" / "train-images.npy")
    (path, *_) = (source / "train").glob("*/images/*_3.JPEG")
    write_format = conversion.write_format

    def later(*args):
        CHANGES["other bytes"](path)
        write_format(*args)

    monkeypatch.setattr(conversion, "write_format", later)
    assert main(["convert", str(source), str(out), "--formats", "array,tar"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path.name} changed while it was converted" in line
    assert sorted(os.listdir(out)) == ["array", "manifest.json"]
    assert np.array_equal(np.load(out / "array" / "train-images.npy"), before)


IGNORED = """
import os, signal, sys, time
from fastlab.console import run_command
from fastlab.processes import interrupted_by_signals

class Signalled:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)  # the handler runs before this ends

def call(args):
    with interrupted_by_signals():
        Signalled()
        {then}

sys.exit(run_command(call, None))
"""


@pytest.mark.parametrize("then", ["time.sleep(50)", "raise ValueError"])
def test_a_signal_that_comes_where_python_ignores_exceptions_is_not_lost(then):
    command = [sys.executable, "-c", IGNORED.format(then=then)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (143, "fastlab: ended by SIGTERM\n")
