import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gpu_suite
from benchmarks.gpu_suite import STAGES, Step, Suite, attempt, by_turn, main

ROOT = Path(__file__).parents[2]


def step(tmp_path, code, result="result"):
    return Step("step", [sys.executable, "-c", code], tmp_path / result)


def log(tmp_path):
    return [json.loads(line) for line in (tmp_path / "suite.jsonl").read_text().splitlines()]


def test_a_step_that_ended_is_not_run_again(tmp_path):
    once = step(tmp_path, f"open({str(tmp_path / 'result')!r}, 'x').close()")
    for _ in range(2):
        assert attempt(once, "stage", tmp_path, time.monotonic() + 60) == 0
    assert [line["outcome"] for line in log(tmp_path)] == ["done"]


def test_a_failing_step_is_recorded_and_the_rest_goes_on(tmp_path):
    assert attempt(step(tmp_path, "raise SystemExit(3)"), "s", tmp_path, time.monotonic() + 60) == 1
    assert log(tmp_path)[0]["outcome"] == "failed (3)"


def test_a_step_without_a_result_has_failed(tmp_path):
    assert attempt(step(tmp_path, "pass"), "s", tmp_path, time.monotonic() + 60) == 1


def test_failing_tests_are_named_in_the_log_and_run_again(tmp_path):
    tests, result = tmp_path / "test_sample.py", tmp_path / "gpu-tests.xml"
    tests.write_text("def test_that_fails():\n    assert 1 == 2\n")
    options = ["-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", f"--junitxml={result}"]
    failing = Step("step", [sys.executable, "-m", "pytest", str(tests), *options], result)
    for _ in range(2):
        assert attempt(failing, "s", tmp_path, time.monotonic() + 60) == 1
    assert [line["outcome"] for line in log(tmp_path)] == ["failed (1)"] * 2
    assert "test_that_fails" in (tmp_path / "step.log").read_text() and not result.exists()


def test_a_report_of_failed_runs_is_a_result_too(tmp_path):
    code = f"open({str(tmp_path / 'result')!r}, 'w').close(); raise SystemExit(1)"
    study = replace(step(tmp_path, code), codes=(0, 1))
    assert attempt(study, "s", tmp_path, time.monotonic() + 60) == 0
    assert log(tmp_path)[0]["outcome"] == "done" and study.result.exists()
    (stage,) = gpu_suite.ablations(gpu_suite.Suite(tmp_path, tmp_path, tiny=False))
    assert stage.codes == (0, 1)


def test_a_torn_line_of_the_log_is_passed_over(tmp_path):
    line = json.dumps({"stage": "a", "outcome": "cut off", "seconds": 9.0})
    (tmp_path / "suite.jsonl").write_text(line + "\n" + line[:20])
    assert by_turn(["a", "b"], tmp_path) == ["b", "a"]


def test_a_step_is_asked_to_stop_at_the_end_of_the_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "_LEAST", 0.0)
    monkeypatch.setattr(gpu_suite, "_GRACE", 2.0)
    saved = tmp_path / "saved"
    code = (
        "import signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (open({str(saved)!r}, 'x'), sys.exit(143)))\n"
        "time.sleep(600)"
    )
    assert attempt(step(tmp_path, code), "s", tmp_path, time.monotonic() + 3) == 0
    assert saved.exists() and log(tmp_path)[0]["outcome"] == "cut off"


def test_a_step_that_does_not_stop_is_killed_with_what_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "_LEAST", 0.0)
    monkeypatch.setattr(gpu_suite, "_GRACE", 1.0)
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal, time; "
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)'])\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)"
    )
    assert attempt(step(tmp_path, code), "s", tmp_path, time.monotonic() + 2.5) == 0
    child = Path("/proc") / (tmp_path / "child").read_text() / "stat"
    time.sleep(0.2)
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_a_long_step_goes_on_but_does_not_take_all_calls(tmp_path):
    """Each call has ten minutes; a and b take thirty, c fails after one and d needs one."""
    steps = {"a": 30, "b": 30, "c": 1, "d": 1}

    def call() -> list[str]:
        left, begun = 10, []
        for stage in by_turn(list(steps), tmp_path):
            minutes = min(left, steps[stage])
            if not minutes:
                continue
            begun.append(stage)
            left -= minutes
            if stage != "c":
                steps[stage] -= minutes
            outcome = "failed (1)" if stage == "c" else "cut off" if steps[stage] else "done"
            line = {"stage": stage, "outcome": outcome, "seconds": 60 * minutes}
            with (tmp_path / "suite.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        return begun

    assert [call() for _ in range(4)] == [["a"], ["b"], ["c", "d", "a"], ["c", "b"]]
    for _ in range(4):
        call()
    assert steps == {"a": 0, "b": 0, "c": 1, "d": 0}


def test_nothing_starts_when_no_time_is_left(tmp_path):
    assert attempt(step(tmp_path, "pass"), "s", tmp_path, time.monotonic() + 1) == 0
    assert not (tmp_path / "suite.jsonl").exists()


@pytest.mark.parametrize("tiny", [False, True])
def test_every_step_names_files_that_exist(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(ROOT)
    suite = Suite(tmp_path / "data", tmp_path, tiny)
    steps = [step for stage in STAGES.values() for step in stage(suite)]
    assert len({step.result for step in steps}) == len(steps) >= 7
    for step in steps:
        for word in " ".join(step.command).split():
            if word.startswith("configs/"):
                assert Path(word).is_file(), word


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "loaders", "speed"], "--only speed: expected some of environment"),
        ([], "not a dataset directory"),
    ],
)
def test_unusable_arguments_are_named(tmp_path, capsys, arguments, message):
    data = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--budget", "60"]
    assert main([*data, *arguments]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(900)
def test_the_tiny_suite_runs_whole_on_a_cpu(tmp_path, monkeypatch):
    from fastlab.dataset.convert import Options, convert
    from fastlab.dataset.synth import synthesise

    monkeypatch.chdir(ROOT)
    synthesise(tmp_path / "originals", classes=10, per_class=60)
    convert(tmp_path / "originals", tmp_path / "data", Options(formats=("array", "tar")))
    arguments = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--tiny"]
    status = main([*arguments, "--budget", "840"])
    outcomes = {line["step"]: line["outcome"] for line in log(tmp_path / "out")}
    assert set(outcomes.values()) == {"done"} and status == 0, outcomes
    suite = Suite(tmp_path / "data", tmp_path / "out", True)
    assert all(step.result.exists() for stage in STAGES.values() for step in stage(suite))
