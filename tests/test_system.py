"""What the system takes away from a command: streams, memory, its directory, the data it reads."""

import argparse
import errno
import multiprocessing
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastlab.console import UserError, run_command
from fastlab.dataset.convert import Options, convert
from tests.packages import has
from tests.trainings import ROOT, command, launch, wait_until

# Measuring coverage takes memory, which some commands here do not have.
_WITHOUT_COVERAGE = {
    name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_PROCESS")
}


def fastlab(*arguments: object, cwd: Path = ROOT, before: Callable[[], None] | None = None):
    """Run the command, after `before` in its process."""
    return subprocess.run(
        [sys.executable, "-m", "fastlab", *map(os.fspath, arguments)],
        env={**_WITHOUT_COVERAGE, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=cwd,
        preexec_fn=before,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("descriptors", [(2,), (0, 1, 2)])
def test_closed_streams_neither_stop_a_training_nor_give_a_file_their_descriptor(
    descriptors, synth_dataset, tmp_path
):
    def close() -> None:
        for descriptor in descriptors:
            os.close(descriptor)

    run = tmp_path / "run"
    sets = ("train.compile=false", "train.epochs=1")
    assert fastlab("train", *command(synth_dataset, run, *sets), before=close).returncode == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
    written = b"".join(p.read_bytes() for p in run.rglob("*") if p.is_file())
    assert b"best validation top-1" not in written


def test_an_error_without_standard_error_is_not_printed_elsewhere(tmp_path):
    done = fastlab("inspect", tmp_path / "nothing", before=lambda: os.close(2))
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize("arguments", [["inspect"], ["train", "--resume"]])
def test_a_working_directory_that_is_gone_is_reported_in_one_line(arguments, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    done = fastlab(*arguments, tmp_path, cwd=gone, before=gone.rmdir)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "the working directory no longer exists" in done.stderr


def test_a_path_that_is_no_utf8_is_refused_in_one_line(tmp_path):
    run = tmp_path / os.fsdecode(b"caf\xe9")
    done = fastlab("train", "--config", "configs/demo.toml", "--out", run)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert r"caf\udce9: is no UTF-8" in done.stderr and not run.exists()


@pytest.mark.parametrize("mebibytes", [60, 100, 140])
def test_little_address_space_is_reported_in_one_line(mebibytes, synth_source, tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (mebibytes << 20, mebibytes << 20))

    done = fastlab("convert", synth_source, tmp_path / "out", before=limit)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "ulimit -v" in done.stderr and not (tmp_path / "out").exists()


def test_memory_that_runs_out_within_an_import_is_reported_in_one_line(capsys):
    """What Python says then, once in a while."""

    def call(args: argparse.Namespace) -> None:
        raise SystemError("error return without exception set")

    assert run_command(call, argparse.Namespace()) == 2
    assert "ulimit -v" in capsys.readouterr().err


def test_a_training_without_address_space_is_reported_in_one_line(synth_dataset, tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))

    done = fastlab("train", *command(synth_dataset, tmp_path / "run"), before=limit)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "ulimit -v" in done.stderr


def test_a_conversion_that_gets_only_some_of_its_processes_ends(
    synth_source, tmp_path, monkeypatch
):
    """The first worker would wait for ever, and the command for it."""
    fork, results = os.fork, iter([None, BlockingIOError(errno.EAGAIN, "no more processes")])

    def limited() -> int:
        if error := next(results):
            raise error
        return fork()

    before = multiprocessing.active_children()  # workers of other tests, which it leaves alone
    monkeypatch.setattr(os, "fork", limited)
    with pytest.raises(UserError, match="no more processes"):
        convert(synth_source, tmp_path / "out", Options(workers=2))
    assert set(multiprocessing.active_children()) <= set(before)
    assert not (tmp_path / "out").exists()


def test_a_conversion_without_room_for_its_threads_ends(synth_source, tmp_path):
    """Python would wait for ever for a thread that finds no memory while it starts."""
    code = (
        "import resource, sys; from fastlab import cli; from fastlab.dataset import blocks;"
        "check = blocks.check_address_space;"
        "taken = lambda: int(open('/proc/self/statm').read().split()[0]) * 4096;"
        "limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (taken() + (16 << 20),) * 2);"
        "blocks.check_address_space = lambda: (limit(), check());"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", synth_source, tmp_path / "out"],
        env={**_WITHOUT_COVERAGE, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "MiB of address space are too few" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        "resident",
        pytest.param("ffcv", marks=pytest.mark.skipif(not has("ffcv"), reason="needs FFCV")),
        pytest.param("dali", marks=pytest.mark.skipif(not has("nvidia.dali"), reason="needs DALI")),
    ],
)
def test_a_data_file_that_shrinks_while_it_is_read_is_reported_in_one_line(
    engine, synth_source, tmp_path
):
    formats = ("array", "tar", "ffcv") if engine == "ffcv" else ("array", "tar")
    convert(synth_source, tmp_path / "data", Options(formats=formats))
    run = tmp_path / "run"
    sets = ("train.epochs=100000", "train.compile=false", f"data.pipeline={engine}")
    sets += ("data.workers=1",)  # two threads at once may end the process before it can report
    process = launch(command(tmp_path / "data", run, *sets), stdout=subprocess.DEVNULL)
    try:
        lines = run / "metrics.jsonl"
        assert wait_until(lambda: lines.exists() and lines.stat().st_size, process)
        for path in (tmp_path / "data").rglob("train*"):
            if path.suffix in (".npy", ".beton", ".tar") and "labels" not in path.name:
                os.truncate(path, 4096)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode != 0 and len(errors.splitlines()) == 1, errors
    assert errors.startswith("fastlab: a data file became shorter while it was read")
