"""What commands print: escaped control characters; and where it cannot be written: a full disk, a
reader that left, a closed stream."""

import argparse
import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastlab.console import run_command

ROOT = Path(__file__).parents[1]
SHORT = "print('a line')"
LONG = "print('a line\\n' * 100_000)"
TO_A_FILE = "open('/dev/full', 'w', buffering=1).write('a line\\n')"


def run(
    body: str, stdout: int, stderr: int = subprocess.PIPE, **settings: Any
) -> tuple[int, list[str]]:
    """Run `body` as a command. Returns its exit status and its lines on standard error."""
    code = (
        "import sys\nfrom fastlab.console import UserError, run_command\n"
        f"def call(args):\n    {body}\nsys.exit(run_command(call, None))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=stdout, stderr=stderr, text=True, **settings
    )
    return done.returncode, str(done.stderr or "").splitlines()


@pytest.fixture
def full() -> Iterator[int]:
    """A descriptor of a full disk."""
    descriptor = os.open("/dev/full", os.O_WRONLY)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize("body", [SHORT, LONG, f"{SHORT}; sys.stdout.flush()"])
def test_a_full_disk_under_the_output_is_reported_in_one_line(body, full):
    status, lines = run(body, full)
    assert status == 2 and len(lines) == 1
    assert lines[0].startswith(
        "fastlab: standard output or a file cannot be written (No space left"
    )


def test_where_errors_cannot_be_written_either_the_status_reports_the_failure(full):
    assert run(SHORT, full, full) == (2, [])
    assert run("raise UserError('bad input')", full, full) == (2, [])


def test_a_full_disk_under_another_file_is_reported_in_one_line():
    status, lines = run(TO_A_FILE, subprocess.DEVNULL)
    assert status == 2 and len(lines) == 1 and "a file cannot be written" in lines[0]


def test_an_unexplained_error_of_a_named_file_keeps_its_traceback():
    status, lines = run("open('/nowhere/at/all')", subprocess.DEVNULL)
    assert status == 1 and lines[0].startswith("Traceback")


@pytest.mark.parametrize("body", [SHORT, LONG])
def test_a_reader_that_left_is_no_error(body):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert run(body, writer) == (141, [])
    finally:
        os.close(writer)


def test_a_command_without_standard_output_works():
    result = run(f"{SHORT}; return 3", subprocess.DEVNULL, preexec_fn=lambda: os.close(1))
    assert result == (3, [])


def test_a_real_command_reports_a_full_disk_in_one_line(synth_dataset, full):
    command = [sys.executable, "-m", "fastlab", "inspect", str(synth_dataset)]
    done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


HOSTILE = "a\x1b]0;owned\x07\x9b2J\r\u202eb"
"""An escape sequence that renames a terminal's window, and others."""
ESCAPED = r"a\x1b]0;owned\x07\x9b2J\r\u202eb"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (HOSTILE, ESCAPED),
        ("no UTF-8: \udcff", r"no UTF-8: \udcff"),
        ("é\u00a0漢\t1\n\n2\r\n3", "é\u00a0漢\t1\n\n2\r\n3"),
    ],
)
def test_control_characters_are_escaped_in_the_output(text, shown):
    def call(args):
        print(text, end="")

    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
    with contextlib.redirect_stdout(out):
        assert run_command(call, argparse.Namespace()) == 0
        assert sys.stdout is out
    assert out.buffer.getvalue().decode() == shown


def test_an_error_is_one_line_without_control_characters():
    status, lines = run(f"raise UserError({HOSTILE + chr(10) + 'x'!a})", subprocess.DEVNULL)
    assert status == 2
    assert lines == [rf"fastlab: {ESCAPED}\nx"]


def test_names_from_outside_command_no_terminal(tmp_path):
    command = [sys.executable, "-m", "fastlab"]
    images = ["--classes", "2", "--per-class", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    made = subprocess.run(
        [*command, "synth", HOSTILE, *images], cwd=tmp_path, env=environment, capture_output=True
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.decode() == f"{ESCAPED}: 2 classes of 2 training images\n"
    failed = subprocess.run(
        [*command, "inspect", HOSTILE], cwd=tmp_path, env=environment, capture_output=True
    )
    assert failed.returncode == 2
    assert failed.stderr.decode().startswith(f"fastlab: {ESCAPED}: not a dataset directory")
    assert failed.stderr.count(b"\n") == 1
