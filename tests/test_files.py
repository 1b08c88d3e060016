"""Files and directories that are whole or absent, and locks: what two writers see of each other."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastlab import files
from fastlab.console import UserError
from fastlab.files import (
    inherited_lock,
    move_into_place,
    partial_directory,
    process_lock,
    write_atomically,
    write_json,
)

ROOT = Path(__file__).parent.parent


def test_a_failed_write_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new" * 100_000 + "\udcff")
    assert path.read_text() == "old"


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fill_disk(self, data):
        with open(self, "wb") as file:
            file.write(data[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_bytes", fill_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_reader_never_sees_half_a_write(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "old" * 100)
    with path.open() as reader:
        assert reader.read(3) == "old"
        write_atomically(path, "new" * 50)
        assert reader.read() == "old" * 99
    assert path.read_text() == "new" * 50
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("content", ["é\n", b"\xff\x00"])
def test_text_is_written_as_utf8_and_bytes_unchanged(tmp_path, content):
    write_atomically(tmp_path / "file", content)
    data = content.encode("utf-8") if isinstance(content, str) else content
    assert (tmp_path / "file").read_bytes() == data


def test_the_mode_of_a_file_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", "")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def refuse_constant(name: str):
    raise AssertionError(f"{name} is not JSON")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_holds_null_for_numbers_that_are_not_finite(tmp_path, value):
    path = tmp_path / "file.json"
    write_json(path, {"loss": value, "deep": [{"rates": (value, 0.5)}], "name": "é", "top1": 0})
    assert json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constant) == {
        "loss": None,
        "deep": [{"rates": [None, 0.5]}],
        "name": "é",
        "top1": 0,
    }


def test_a_value_without_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, [1])
    with pytest.raises(TypeError):
        write_json(path, [object()])
    assert json.loads(path.read_text()) == [1] and os.listdir(tmp_path) == ["file.json"]


HOLD = """
import sys
from pathlib import Path
from fastlab import files
with getattr(files, sys.argv[1])(Path(sys.argv[2]), "busy"):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(lock, path) -> subprocess.Popen:
    """Another process that holds the lock until it is killed."""
    command = [sys.executable, "-c", HOLD, lock.__name__, str(path)]
    pipe = subprocess.PIPE
    holder = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe)
    assert holder.stdout.readline() == b"held\n"
    return holder


@pytest.mark.parametrize("lock", [process_lock, inherited_lock])
def test_a_lock_excludes_other_processes_until_they_end(tmp_path, lock):
    holder = hold(lock, tmp_path / "lock")
    try:
        with pytest.raises(UserError, match=r"^it is busy$"), lock(tmp_path / "lock", "it is busy"):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with lock(tmp_path / "lock", "it is busy"):
        pass


@pytest.mark.parametrize("lock", [process_lock, inherited_lock])
def test_a_lock_is_free_after_its_block(tmp_path, lock):
    for _ in range(2):
        with lock(tmp_path / "lock", "it is busy"):
            pass
    holder = hold(lock, tmp_path / "lock")
    holder.kill()
    holder.communicate()


SLEEP = [sys.executable, "-c", "import sys; sys.stdin.read()"]


@pytest.mark.parametrize("lock", [process_lock, inherited_lock])
def test_only_an_inherited_lock_lasts_as_long_as_a_child_that_has_it(tmp_path, lock):
    with lock(tmp_path / "lock", "it is busy") as descriptor:
        passed = [] if descriptor is None else [descriptor]
        child = subprocess.Popen(SLEEP, stdin=subprocess.PIPE, pass_fds=passed)
    try:
        if lock is inherited_lock:
            with (
                pytest.raises(UserError, match="it is busy"),
                lock(tmp_path / "lock", "it is busy"),
            ):
                pass
        else:
            hold(lock, tmp_path / "lock").communicate()
    finally:
        child.communicate()
    with lock(tmp_path / "lock", "it is busy"):
        pass


def test_an_inherited_lock_is_waited_for_as_long_as_asked(tmp_path, monkeypatch):
    holder = hold(inherited_lock, tmp_path / "lock")
    waits = []

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            holder.communicate()  # which ends it

    monkeypatch.setattr(files.time, "sleep", wait)
    with inherited_lock(tmp_path / "lock", "it is busy", patience=60):
        assert len(waits) == 3


def test_a_file_system_without_locks_holds_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(files.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", refuse)
    with process_lock(tmp_path / "lock", "it is busy"):
        pass


def write(out, text: str) -> None:
    with partial_directory(out) as partial:
        (partial / "file").write_text(text)
        move_into_place(partial, out)


def test_a_second_writer_of_a_directory_is_refused(tmp_path):
    with partial_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("first")
        with (
            pytest.raises(UserError, match="out: another command is writing it"),
            partial_directory(tmp_path / "out"),
        ):
            pass
        move_into_place(partial, tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "first"
    assert os.listdir(tmp_path) == ["out"]


def test_nothing_is_left_by_a_failure_or_by_a_killed_writer(tmp_path):
    with pytest.raises(ValueError), partial_directory(tmp_path / "out") as partial:
        (partial / "deep").mkdir()
        shutil.copytree(partial, tmp_path / "killed")
        raise ValueError
    assert os.listdir(tmp_path) == ["killed"]
    (tmp_path / "killed").rename(partial)
    write(tmp_path / "out", "second")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["file"]


def test_the_next_writer_may_begin_while_the_old_directory_is_removed(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, "first")
    rmtree = shutil.rmtree

    def slow_rmtree(path, *args, **options):
        monkeypatch.setattr(files.shutil, "rmtree", rmtree)
        write(out, "third")
        rmtree(path, *args, **options)

    with partial_directory(out) as partial:
        (partial / "file").write_text("second")
        monkeypatch.setattr(files.shutil, "rmtree", slow_rmtree)
        move_into_place(partial, out)
    assert (out / "file").read_text() == "third" and os.listdir(tmp_path) == ["out"]


def test_a_writer_whose_directory_was_moved_before_its_lock_is_refused(tmp_path, monkeypatch):
    """It opened the directory before the first writer moved it: its lock is on the result."""
    out = tmp_path / "out"
    flock = files.fcntl.flock

    def late_flock(descriptor, operation):
        monkeypatch.setattr(files.fcntl, "flock", flock)
        partial = next(tmp_path.iterdir())
        (partial / "file").write_text("first")
        partial.rename(out)
        flock(descriptor, operation)

    monkeypatch.setattr(files.fcntl, "flock", late_flock)
    with pytest.raises(UserError, match="another command is writing it"), partial_directory(out):
        pass
    assert (out / "file").read_text() == "first"
