"""Directories that appear whole: two writers, and what each finds of the other."""

import os
import shutil

import pytest

from fastlab import files as place
from fastlab.console import UserError
from fastlab.files import move_into_place, partial_directory


def write(out, text: str) -> None:
    with partial_directory(out) as partial:
        (partial / "file").write_text(text)
        move_into_place(partial, out)


def test_a_second_writer_is_turned_away(tmp_path):
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


def test_nothing_is_left_of_a_failure_or_of_a_killed_writer(tmp_path):
    with pytest.raises(ValueError), partial_directory(tmp_path / "out") as partial:
        (partial / "deep").mkdir()
        shutil.copytree(partial, tmp_path / "killed")
        raise ValueError
    assert os.listdir(tmp_path) == ["killed"]
    (tmp_path / "killed").rename(partial)
    write(tmp_path / "out", "second")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["file"]


def test_the_next_writer_may_begin_while_the_old_directory_goes(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, "first")
    rmtree = shutil.rmtree

    def slow(path, *args, **options):
        monkeypatch.setattr(place.shutil, "rmtree", rmtree)
        write(out, "third")
        rmtree(path, *args, **options)

    with partial_directory(out) as partial:
        (partial / "file").write_text("second")
        monkeypatch.setattr(place.shutil, "rmtree", slow)
        move_into_place(partial, out)
    assert (out / "file").read_text() == "third" and os.listdir(tmp_path) == ["out"]


def test_a_writer_that_finds_the_directory_moved_is_turned_away(tmp_path, monkeypatch):
    """It opened it before the other was done: its lock is of what is the result now."""
    out = tmp_path / "out"
    flock = place.fcntl.flock

    def late(descriptor, operation):
        monkeypatch.setattr(place.fcntl, "flock", flock)
        partial = next(tmp_path.iterdir())
        (partial / "file").write_text("first")
        partial.rename(out)
        flock(descriptor, operation)

    monkeypatch.setattr(place.fcntl, "flock", late)
    with pytest.raises(UserError, match="another command is writing it"), partial_directory(out):
        pass
    assert (out / "file").read_text() == "first"
