"""What the command takes, what it refuses in a line, and what it leaves behind."""

import multiprocessing
import sys
import time

import pytest
import torch

from fastlab.cli import main

SLOW_WORKERS = """
    class Stuck(Dataset):
        def __len__(self):
            return 100

        def __getitem__(self, index):
            time.sleep(60 if index >= FIRST else 0)
            return torch.tensor(index)

    def make():
        return DataLoader(Stuck(), 2, num_workers=1)
    """


def test_the_report_ends_with_the_verdict(script, capsys):
    path = script("""
        def make():
            print("a line of the script")
            return DataLoader(ONES, 20)
        """)
    assert main(["bottleneck", f"{path}:make", "--seconds", "0.3"]) == 0
    out, err = capsys.readouterr()
    assert "20 batches an epoch, batches of 20 samples, num_workers=0" in out
    assert "no transfer: there is no accelerator" in out or torch.accelerator.is_available()
    assert "engines were not measured: TensorDataset holds no list of image files" in out
    assert out.split("\n\n")[-1].startswith("The loader gives ")
    assert "a line of the script" in err and "a line of the script" not in out


def test_a_module_is_found_from_the_working_directory(script, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "some_package_of_a_test"
    folder.mkdir()
    (folder / "data.py").write_text("loader = [[1, 2], [3, 4], [5, 6]]\n")
    monkeypatch.chdir(tmp_path)
    assert main(["bottleneck", "some_package_of_a_test.data:loader", "--seconds", "0.1"]) == 0
    assert "3 batches an epoch" in capsys.readouterr().out


@pytest.mark.parametrize(
    "loader",
    [
        "loader = DataLoader(ONES, 20)",
        "def loader():\n    return (torch.ones(2) for _ in range(50))",
        "def loader():\n    for _ in range(50):\n        yield {'x': torch.ones(2)}",
        "class loader:\n    def __iter__(self):\n        return iter([torch.ones(2)])",
        "class loader:\n    num_workers = 8  # threads, say\n\n    def __iter__(self):\n"
        "        return iter([torch.ones(2)] * 3)",
    ],
)
def test_loaders_of_any_kind_begin_anew_after_their_end(loader, script, capsys):
    assert main(["bottleneck", f"{script(loader)}:loader", "--seconds", "0.2"]) == 0
    assert "The loader gives " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("make = 3", "make: is an object of int; name a function that returns the loader"),
        ("def make():\n    return 3", "make() returned an object of int; expected a loader"),
        ("def other():\n    pass", "has no 'make'; it has: other"),
        ("def make(path):\n    pass", "make() failed: TypeError: make() missing 1 required"),
        ("def make():\n    return []", "make: the loader is empty"),
        ("make = iter([1, 2, 3])", "ended after 3 batches and gives no more; name a function"),
        ("def make():\n    raise OSError('no disk')", "make() failed: OSError: no disk (script"),
        ("import nothing_of_that_name", "failed: ModuleNotFoundError: No module named 'nothing"),
        ("def make(:\n    pass", "failed: SyntaxError: "),
        ("raise SystemExit(3)", "failed: SystemExit: 3 (script"),
        (
            "def collate(_):\n    raise ValueError('bad')\n\n"
            "def make():\n    return DataLoader(ONES, 2, num_workers=1, collate_fn=collate)",
            "make: batch 0 failed: ValueError: bad (script",
        ),
    ],
)
def test_a_mistake_gives_one_line_that_says_what_and_where(source, text, refusal):
    assert text in refusal(source)


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("nope.py:make", "nope.py: no such file"),
        ("nope.py", "expected FILE.py:NAME or package.module:NAME"),
        ("no_such_module_anywhere:make", "No module named 'no_such_module_anywhere'"),
    ],
)
def test_a_target_that_is_not_there_is_refused(target, text, capsys):
    assert main(["bottleneck", target]) == 2
    err = capsys.readouterr().err
    assert text in err and len(err.splitlines()) == 1


def test_a_file_with_the_name_of_a_loaded_module_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "json.py").write_text("make = []\n")
    assert main(["bottleneck", f"{tmp_path}/json.py:make"]) == 2
    assert "another module has the name 'json'; rename the file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("step", "text"),
    [
        ("def step(batch):\n    raise ValueError('bad shape')", "the step failed: ValueError: bad"),
        ("step = 3", "is an object of int; name a function"),
        ("def step(batch):\n    time.sleep(60)", "the step: not done after 0.5 s"),
    ],
)
def test_a_step_that_cannot_be_measured_is_refused(step, text, script, capsys):
    path = script(f"make = DataLoader(ONES, 2)\n\n{step}")
    options = ["--step", f"{path}:step", "--timeout", "0.5", "--seconds", "0.1"]
    assert main(["bottleneck", f"{path}:make", *options]) == 2
    err = capsys.readouterr().err
    assert text in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("first", [0, 9])
def test_a_loader_that_hangs_ends_in_a_line_and_leaves_no_process(first, refusal, monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    before = set(multiprocessing.active_children())
    err = refusal(SLOW_WORKERS.replace("FIRST", str(first)), "--timeout", "0.5")
    assert "not done after 0.5 s; give it longer with --timeout SECONDS" in err
    for worker in set(multiprocessing.active_children()) - before:
        worker.join(5)  # torch 2.11 ends its workers without waiting for them
    assert set(multiprocessing.active_children()) == before


def test_code_that_repeats_on_every_error_is_stopped_as_well(refusal):
    err = refusal(
        """
        def make():
            while True:
                try:
                    time.sleep(60)
                    yield 1
                except Exception:
                    pass
        """,
        "--timeout",
        "0.3",
    )
    assert "make: batch 0: not done after 0.3 s" in err


@pytest.mark.multiprocess
def test_persistent_workers_are_ended(look):
    before = set(multiprocessing.active_children())
    look("""
        LOADER = DataLoader(ONES, 20, num_workers=2, persistent_workers=True)

        def make():
            return LOADER
        """)
    assert set(multiprocessing.active_children()) == before


def test_the_time_is_about_what_was_asked_for(look):
    """Where it is far too short, three rounds are taken; the conversion comes on top."""
    started = time.perf_counter()
    found = look("make = DataLoader(ONES, 20)", seconds=0.01)
    assert len(found["rounds"]["alone"]) >= 3
    assert time.perf_counter() - started < 60  # of the default, far from a hang
