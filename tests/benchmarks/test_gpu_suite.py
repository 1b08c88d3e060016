import json
import os
import signal
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import gpu_running, gpu_steps, gpu_suite, rehearsal
from benchmarks.gpu_running import Running, attempt
from benchmarks.gpu_steps import ON_CPU, Sizes, Step, next_seed
from benchmarks.gpu_suite import STAGES, main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def lease(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for folder in (gpu_steps.LOGS, gpu_steps.RESULTS, gpu_steps.RUNS, gpu_steps.CACHE):
        folder.mkdir(parents=True)
    return tmp_path / "lease"


def step(code: str, seconds: float = 60, beside: bool = False, name: str = "step") -> Step:
    return Step(name, [sys.executable, "-c", code], seconds, beside)


def reported(lease: Path) -> list[dict]:
    return [json.loads(line) for line in (lease / "results/suite.jsonl").read_text().splitlines()]


def in_a_minute() -> float:
    return time.monotonic() + 60


def test_a_failed_step_is_reported_with_its_last_line_and_the_next_one_begins(lease, capsys):
    steps = [step("raise SystemExit('no such kernel')"), step("print('fine')", name="next")]
    assert attempt(steps, in_a_minute(), "measure") == ["failed (1)", "done"]
    assert [(line["step"], line["last_line"]) for line in reported(lease)] == [
        ("step", "no such kernel"),
        ("next", ""),
    ]
    printed = capsys.readouterr().out
    assert "measure/step: failed (1)" in printed and "no such kernel" in printed


def begun(step: Step, file: Path) -> Running:
    """Starts `step` and waits until it has made `file`."""
    running, deadline = Running.start(step), in_a_minute()
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return running


def test_no_argument_of_a_step_is_read_by_a_shell(lease, capsys):
    words = ["$(touch made)", "; touch made", "a b", "'", '"$HOME"', "*"]
    command = [sys.executable, "-c", "import sys; print(sys.argv[1:])", *words]
    assert attempt([Step("step", command, 60)], in_a_minute(), "measure") == ["done"]
    assert str(words) in capsys.readouterr().out
    assert not Path("made").exists()


@pytest.mark.parametrize("beside", [False, True])
def test_a_step_whose_shell_was_killed_has_failed_and_is_not_waited_for(beside, lease):
    code = (
        "import os, time\n"
        "open('partial', 'w').write(str(os.getpid()))\n"
        "os.rename('partial', 'begun')\n"
        "time.sleep(600)"
    )
    running = begun(step(code, beside=beside), Path("begun"))
    os.kill(running.process, signal.SIGKILL)
    assert running.finish("measure", time.monotonic() + 600) == "failed (killed)"
    status, deadline = Path("/proc") / Path("begun").read_text() / "stat", in_a_minute()
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_folders_of_any_name_hold_packed_results(lease):
    out = Path("host:o $(touch made)")
    gpu_suite.pack(out, "measure")
    with tarfile.open(out / "measure.tar.xz") as archive:
        assert "results" in archive.getnames()
    assert not Path("made").exists()


def test_a_rehearsal_takes_folders_of_any_name(tmp_path, capfd):
    (tmp_path / "python3").symlink_to(sys.executable)
    (tmp_path / "benchmarks").mkdir()
    code = "import sys; print(sys.argv[1:])"
    (tmp_path / "benchmarks/gpu_suite.py").write_text(code)
    out = tmp_path / "a b; exit 3"
    command = rehearsal.COMMANDS[0]
    assert rehearsal.rehearse(command, tmp_path, tmp_path, out) == 0
    assert str(["smoke", "--pack", f"{out}/smoke"]) in capfd.readouterr().out


@pytest.mark.parametrize("here", [signal.default_int_handler, signal.SIG_IGN])
def test_a_step_gets_sigint_at_its_time_limit(here, lease):
    """This holds also in the background of a shell, which starts the suite with SIGINT ignored."""
    code = (
        "import time\n"
        "try:\n"
        "    open('begun', 'x').close()\n"
        "    time.sleep(600)\n"
        "except KeyboardInterrupt: open('saved', 'x').close()"
    )
    before = signal.signal(signal.SIGINT, here)
    running = begun(step(code), Path("begun"))
    signal.signal(signal.SIGINT, before)
    assert running.finish("measure", time.monotonic()) == "cut off"
    assert Path("saved").exists()


def test_ctrl_c_stops_the_step_under_way(lease, monkeypatch):
    code = (
        "import time\n"
        "try:\n"
        "    open('begun', 'x').close()\n"
        "    time.sleep(600)\n"
        "except KeyboardInterrupt: open('saved', 'x').close()"
    )
    running, waits = begun(step(code), Path("begun")), iter([KeyboardInterrupt])
    wait = Running._ended_by

    def interrupted(self, deadline):
        if error := next(waits, None):
            raise error
        return wait(self, deadline)

    monkeypatch.setattr(Running, "_ended_by", interrupted)
    with pytest.raises(KeyboardInterrupt):
        running.finish("measure", in_a_minute())
    assert Path("saved").exists()


def test_a_step_that_does_not_stop_is_killed_with_what_it_started(lease, monkeypatch):
    monkeypatch.setattr(gpu_running, "_GRACE", 1.0)
    code = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal, time; "
        "signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)'])\n"
        "open('partial', 'w').write(str(child.pid))\n"
        "os.rename('partial', 'child')\n"
        "time.sleep(600)"
    )
    running = begun(step(code), Path("child"))
    assert running.finish("measure", time.monotonic()) == "cut off"
    status = Path("/proc") / Path("child").read_text() / "stat"
    time.sleep(0.2)
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_a_stage_ends_at_its_own_limit(lease):
    slow = step("import time; time.sleep(600)", seconds=600)
    assert attempt([slow], time.monotonic() + 2, "measure") == ["cut off"]


def test_a_step_beside_outlives_its_stage_and_a_later_stage_waits_for_it(lease):
    """The first step ends only when a step of the later stage has made a file."""
    waiting = "import os, time\nwhile not os.path.exists('made'): time.sleep(0.05)"
    assert attempt([step(waiting, beside=True, name="first")], in_a_minute(), "data") == []
    later = step("open('made', 'x').close()", name="second")
    assert attempt([later], in_a_minute(), "ready", wait=True) == ["done", "done"]
    assert [line["step"] for line in reported(lease)] == ["second", "first"]
    assert attempt([], in_a_minute(), "ready", wait=True) == []


def test_seeds_of_earlier_rentals_add_up(tmp_path):
    def run(folder: str, seed: int, status: str) -> None:
        path = tmp_path / folder / "runs" / f"resnet11-seed{seed}"
        path.mkdir(parents=True)
        (path / "summary.json").write_text(json.dumps({"status": status}))

    assert next_seed("resnet11", tmp_path) == 0
    run("h100-2026-11-26", 0, "finished")
    run("h200-2026-12-01", 2, "finished")
    assert next_seed("resnet11", tmp_path) == 1
    run("h200-2026-12-01", 1, "interrupted")
    assert next_seed("resnet11", tmp_path) == 1
    run("h100-2026-12-02", 1, "finished")
    assert next_seed("resnet11", tmp_path) == 3


def test_packed_results_hold_no_checkpoints_and_the_cache_is_restored(lease, monkeypatch):
    monkeypatch.setattr(gpu_suite, "_PART", 1000)
    run = gpu_steps.RUNS / "resnet11-seed0"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "best.safetensors").write_text("large")
    (run / "metrics.jsonl").write_text("{}\n")
    kernels = bytes(range(256)) * 40
    (gpu_steps.CACHE / "kernel.cubin").write_bytes(kernels)
    gpu_suite.pack(Path("out"), "ready")
    with tarfile.open("out/ready.tar.xz") as archive:
        names = archive.getnames()
    assert "results/runs/resnet11-seed0/metrics.jsonl" in names
    assert not any("checkpoints" in name for name in names)
    (gpu_steps.CACHE / "kernel.cubin").unlink()
    gpu_suite.unpack_cache(Path("out"))
    assert (gpu_steps.CACHE / "kernel.cubin").read_bytes() == kernels


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "--piece", "nowhere.tar.xz"], "--piece nowhere.tar.xz: no such file"),
        (["smoke", "--cache", "."], "--cache .: holds no inductor.tar.xz.0"),
    ],
)
def test_unusable_arguments_are_refused_by_name(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    machine = {"machine": {"gpus": []}}
    monkeypatch.setattr(gpu_suite, "identify", lambda: machine)
    for name in ("PYTHONPATH", "TORCHINDUCTOR_CACHE_DIR", "PYTHONUNBUFFERED"):
        monkeypatch.setenv(name, "")
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("sizes", [Sizes(), ON_CPU])
def test_every_configuration_of_a_step_exists(sizes, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    piece = tmp_path / "piece-1.tar.xz"
    piece.touch()
    steps = [s for stage in STAGES.values() for s in stage.steps(sizes, piece)]
    assert len(steps) > 20
    for word in (word for step in steps for word in step.command):
        names_a_file = word.startswith(("configs/", "benchmarks/"))
        assert not names_a_file or Path(word).is_file(), word


# They run if time is left, or in a rental of their own.
_NOT_COUNTED = ("loaders", "tests", "more", "search", "recipe", "study")


def test_all_stages_fit_into_fifteen_minutes_with_two_starts_of_the_machine():
    stages = [command.split()[3] for command in rehearsal.COMMANDS]
    assert set(stages) == set(STAGES)
    assert sum(STAGES[stage].seconds for stage in stages if stage not in _NOT_COUNTED) <= 780


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(900)
def test_stages_run_in_an_upload_with_the_machines_packages(tmp_path, monkeypatch):
    """The stages that repeat on all images what `smoke` does on a few, or repeat another one with
    other settings, are left to the command itself. pip downloads the wheels, so the package index
    has to be reachable."""
    left_out = ("measure", "reference", "race", "savings", "loaders", "tests")
    left_out += ("more", "search", "recipe", "study")
    shown = [line for line in rehearsal.COMMANDS if not any(name in line for name in left_out)]
    monkeypatch.setattr(rehearsal, "COMMANDS", shown)
    for name in ("PYTHONPATH", "COVERAGE_PROCESS_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    assert main(["--rehearse", "--keep", str(tmp_path / "rehearsal")]) == 0
    lines = (tmp_path / "rehearsal/upload/lease/results/suite.jsonl").read_text().splitlines()
    outcomes = {line["step"]: line["outcome"] for line in map(json.loads, lines)}
    assert set(outcomes.values()) == {"done"}, outcomes
