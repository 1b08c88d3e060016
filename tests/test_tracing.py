"""Recording: the traces of real trainings, and what recording must not change."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastlab import tracing
from fastlab.cli import main
from fastlab.config import ProfileConfig
from fastlab.traces.events import read_trace
from fastlab.traces.intervals import covered_by
from fastlab.traces.review import review_run

ROOT = Path(__file__).parents[1]
NAME = re.compile(r"rank(\d+)\.\d{19}\.pt\.trace\.json")
# Two steps of 40 images (the generated dataset has 80), both of them recorded.
TWO_STEPS = (
    "model.width=4",
    "train.batch_size=40",
    "train.eval_batch_size=20",
    "train.epochs=1",
    "augment.translate=0",
    "profile.wait=0",
    "profile.warmup=0",
    "profile.active=2",
)


def command(dataset: Path, out: Path, *overrides: str) -> list[str]:
    sets = [f"data.path={dataset}", *TWO_STEPS, *overrides]
    return ["--config", str(ROOT / "configs" / "demo.toml"), "--out", str(out)] + [
        part for value in sets for part in ("--set", value)
    ]


def launch(arguments: list[str], code: str = "", processes: int = 1) -> subprocess.Popen:
    """Start a training. `code` runs first, in the same process, where `train` is the module."""
    script = f"import sys, time\nfrom fastlab import train\n{code}\nsys.exit(train.main())"
    start = [sys.executable, "-c", script]
    if processes > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        start += [f"--nproc_per_node={processes}", str(ROOT / "fastlab" / "train.py")]
    return subprocess.Popen(
        [*start, *arguments],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def train(arguments: list[str], code: str = "", processes: int = 1) -> str:
    process = launch(arguments, code, processes)
    try:
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return output


def traces(run: Path) -> list[Path]:
    return sorted((run / "traces").glob("*.pt.trace.json"))


@pytest.fixture(scope="module")
def run(synth_dataset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "two-steps"
    assert f"fastlab trace {out}" in train([*command(synth_dataset, out), "--profile"])
    return out


def test_two_steps_leave_one_trace_with_all_ranges(run):
    (path,) = traces(run)
    assert NAME.fullmatch(path.name)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    trace = read_trace(path)
    assert trace.numbers() == [1, 2]
    names = [event.name for event in trace.ranges]
    for name in ("data_wait", "augmentation", "forward", "backward", "optimizer"):
        assert names.count(name) == 2, name
    assert any(event.name == "aten::convolution_backward" for event in trace.ops)


def test_parts_and_shares_of_a_real_step_add_up(run, capsys):
    assert main(["trace", str(run)]) == 0
    output = capsys.readouterr().out
    assert "compute on the CPU" in output and "images/s" in output and "ui.perfetto.dev" in output
    review = review_run(run).main
    assert sum(part.host_ms for part in review.parts) == pytest.approx(review.step_ms, rel=0.05)
    assert sum(review.shares.values()) == pytest.approx(1)
    assert (run / "traces" / "review.html").exists()


def test_recording_changes_no_weight(run, synth_dataset, tmp_path):
    train(command(synth_dataset, tmp_path / "plain"))
    assert not (tmp_path / "plain" / "traces").exists()
    recorded, plain = (
        load_file(next((r / "checkpoints").glob("step-*")) / "model.safetensors")
        for r in (run, tmp_path / "plain")
    )
    assert all(torch.equal(recorded[name], plain[name]) for name in recorded)


def test_a_checkpoint_is_recorded_but_left_out_of_its_step(synth_dataset, tmp_path):
    out = tmp_path / "run"
    train([*command(synth_dataset, out, "train.checkpoint_every=1"), "--profile"])
    (path,) = traces(out)
    trace = read_trace(path)
    saves = [event for event in trace.ranges if event.name == "checkpoint"]
    recorded = [event for event in trace.ranges if event.name == "ProfilerStep#1"]
    assert saves and recorded[0].end >= saves[-1].end  # it is written within the loop
    assert len(trace.steps) == 1 and not covered_by(trace.steps).common(covered_by(saves))


# Planted problems in real trainings

SLOW_PIPELINE = """
from fastlab.training import setup
make = setup.make_pipeline
def slow(*arguments, **settings):
    pipeline = make(*arguments, **settings)
    epoch = pipeline.epoch
    def wait(*which):
        for batch in epoch(*which):
            time.sleep(0.2)
            yield batch
    pipeline.epoch = wait
    return pipeline
setup.make_pipeline = slow
"""
ITEM = """
step = train.train_step
def step_with_item(trainer, batch):
    loss = step(trainer, batch)
    batch.images.sum().item()
    return loss
train.train_step = step_with_item
"""


def test_a_slow_pipeline_is_named_a_data_stall(synth_dataset, tmp_path):
    out = tmp_path / "run"
    train([*command(synth_dataset, out), "--profile"], SLOW_PIPELINE)
    run = review_run(out)
    assert run.findings[0].name == "data stall"
    assert {part.name: part.host_ms for part in run.main.parts}["data_wait"] > 190


def test_item_in_the_loop_is_reported_with_its_line(run, synth_dataset, tmp_path):
    assert not review_run(run).main.syncs  # reads of the optimizer's counters do not count
    out = tmp_path / "run"
    arguments = [*command(synth_dataset, out, "profile.stacks=true"), "--profile"]
    planted = tmp_path / "planted_problem.py"
    planted.write_text(f"from fastlab import train\n{ITEM}")
    train(arguments, f"sys.path.append({str(tmp_path)!r})\nimport planted_problem")
    profiled = review_run(out)
    line = 1 + planted.read_text().splitlines().index("    batch.images.sum().item()")
    (sync,) = profiled.main.syncs
    assert (sync.call, sync.calls) == ("aten::item", 1)
    # torch 2.11 records which function is called, but not the line of each call.
    known = (f"planted_problem.py:{line}", "planted_problem.py(4): step_with_item")
    assert sync.place.endswith(known)
    assert "host synchronisation" in [finding.name for finding in profiled.findings]


# The schedule


class Loop:
    """A training loop that contains only what is traced."""

    def __init__(self, folder: Path, **settings) -> None:
        config = ProfileConfig(enabled=True, **settings)
        self.tracer = tracing.Tracer(config, folder, 0, torch.device("cpu"))
        self.done = 0

    def epoch(self, steps: int) -> None:
        for batch in self.tracer.steps(iter(range(steps)), self.done):
            with tracing.span("forward"):
                torch.ones(batch + 1).sum()
            self.done += 1
            if batch == steps - 1:
                break  # as training does
        self.tracer.end_epoch()


@pytest.mark.parametrize(
    ("wait", "warmup", "active", "epochs", "recorded"),
    [
        (0, 0, 1, [1], [1]),
        (2, 1, 3, [20], [4, 5, 6]),
        (2, 1, 3, [6], [4, 5, 6]),
        (1, 1, 4, [3, 3, 3], [3, 4, 5, 6]),
        (1, 0, 9, [2, 2], [2, 3, 4]),  # the run ends before the schedule does
    ],
)
def test_the_schedule_is_kept(wait, warmup, active, epochs, recorded, tmp_path, capsys):
    loop = Loop(tmp_path / "traces", wait=wait, warmup=warmup, active=active)
    with loop.tracer:
        for steps in epochs:
            loop.epoch(steps)
    (path,) = traces(tmp_path)
    content = json.loads(path.read_text())["traceEvents"]
    steps = [e["name"] for e in content if e["name"].startswith("ProfilerStep#")]
    assert sorted(steps) == [f"ProfilerStep#{number}" for number in recorded]
    assert not tracing._recording
    assert capsys.readouterr().out.count("trace:") == 1


@pytest.mark.parametrize("warmup", [0, 5])
def test_a_run_that_is_too_short_reports_that_it_left_no_trace(warmup, tmp_path, capsys):
    loop = Loop(tmp_path / "traces", wait=10 - 2 * warmup, warmup=2 * warmup, active=1)
    with loop.tracer:
        loop.epoch(7)
    assert not (tmp_path / "traces").exists()
    assert "no trace: the process ended after 7 steps" in capsys.readouterr().out
    again = Loop(tmp_path / "traces", wait=0, warmup=1, active=1)  # the profiler is usable again
    with again.tracer:
        again.epoch(2)
    assert len(traces(tmp_path)) == 1


def test_steps_that_make_their_batches_themselves_are_recorded(tmp_path):
    loop = Loop(tmp_path / "traces", wait=0, warmup=1, active=2)
    with loop.tracer:
        assert list(loop.tracer.steps([None] * 4, 0)) == [None] * 4
    assert len(traces(tmp_path)) == 1


def test_an_error_in_the_loop_propagates_and_leaves_a_trace(tmp_path):
    loop = Loop(tmp_path / "traces", wait=0, warmup=0, active=5)
    with pytest.raises(ZeroDivisionError), loop.tracer:
        for batch in loop.tracer.steps(iter(range(5)), 0):
            1 / (2 - batch)
    assert len(traces(tmp_path)) == 1


def test_an_error_in_the_first_recorded_wait_propagates(tmp_path):
    loop = Loop(tmp_path / "traces", wait=0, warmup=0, active=5)
    with pytest.raises(ZeroDivisionError), loop.tracer:
        list(loop.tracer.steps((1 / number for number in range(3)), 0))
    assert not tracing._recording


def test_a_disabled_tracer_does_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tracing, "record_function", None)
    monkeypatch.setattr(tracing, "profile", None)
    tracer = tracing.Tracer(ProfileConfig(), tmp_path, 0, torch.device("cpu"))
    batches = iter(range(3))
    with tracer:
        assert tracer.steps(batches, 0) is batches
        assert tracing.span("forward") is tracing.span("backward")
        tracer.end_epoch()
    assert list(tmp_path.iterdir()) == []


def test_allocations_are_recorded_on_request(synth_dataset, run, tmp_path):
    out = tmp_path / "run"
    train([*command(synth_dataset, out, "profile.memory=true"), "--profile"])
    assert review_run(out).main.peak_bytes > 100_000
    assert review_run(run).main.peak_bytes is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_kernels_and_a_memory_snapshot_are_recorded(tmp_path):
    device = torch.device("cuda")
    config = ProfileConfig(enabled=True, wait=1, warmup=1, active=3, memory=True, stacks=True)
    tracer = tracing.Tracer(config, tmp_path / "traces", 0, device)
    weights = torch.randn(2048, 2048, device=device)
    with tracer:
        for _ in tracer.steps(iter(range(9)), 0):
            with tracing.span("forward"):
                (weights @ weights).sum().item()
    review = review_run(tmp_path).main
    assert review.gpu and review.kernels and review.syncs and review.peak_bytes
    assert len(list((tmp_path / "traces").glob("*.memory.pickle"))) == 1


# Resumption and several processes


@pytest.mark.slow
def test_a_resumed_run_keeps_older_traces(synth_dataset, tmp_path):
    out = tmp_path / "run"
    overrides = ("train.epochs=30", "train.checkpoint_every=1", "profile.enabled=true")
    process = launch(command(synth_dataset, out, *overrides))
    deadline = time.monotonic() + 120
    while not list((out / "checkpoints").glob("step-*")) or not traces(out):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (old,) = traces(out)
    before = old.read_bytes()
    train(["--resume", str(out)])
    assert len(traces(out)) == 2 and old.read_bytes() == before
    assert review_run(out).main.numbers[0] > review_run(old).main.numbers[0]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_every_process_leaves_a_trace(synth_dataset, tmp_path):
    train([*command(synth_dataset, tmp_path / "run"), "--profile"], processes=2)
    assert [NAME.fullmatch(path.name)[1] for path in traces(tmp_path / "run")] == ["0", "1"]
    ranks = review_run(tmp_path / "run").ranks
    assert [review.rank for review in ranks] == [0, 1]
    assert all(review.comm_ms > 0 and 0 <= review.hidden <= 1 for review in ranks)


# TensorBoard


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


# 127.0.0.1 and ::1 in the kernel's notation.
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}


def listening(port: int) -> set[str]:
    """The addresses on which a process listens at this port."""
    rows = [
        line.split()
        for family in ("tcp", "tcp6")
        for line in Path("/proc/net", family).read_text().splitlines()[1:]
    ]
    sockets = [row[1].split(":") for row in rows if row[3] == "0A"]
    return {address for address, number in sockets if int(number, 16) == port}


def ask(port: int, path: str) -> object:
    address = f"http://localhost:{port}/data/plugin/pytorch_profiler/{path}"
    with urllib.request.urlopen(address, timeout=10) as answer:
        return json.loads(answer.read())


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("torch_tb_profiler"), reason="needs the extra profile")
def test_tensorboards_profiler_opens_the_trace(run, tmp_path):
    port = free_port()
    fastlab = [sys.executable, "-c", "from fastlab.cli import main; main()"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*fastlab, "trace", str(run), "--tensorboard", "--port", str(port)],
            stdout=log,
            stderr=log,
        )
        try:
            answer = wait_for_run(port)
            name = answer["runs"][0]
            views = ask(port, f"views?run={name}")
            worker = ask(port, f"workers?run={name}&view=Overview")[0]
            assert worker == "rank0"
            assert listening(port) and listening(port) <= LOOPBACK
            span = ask(port, f"spans?run={name}&worker={worker}")[0]
            overview = ask(port, f"overview?run={name}&worker={worker}&span={span}&view=Overview")
        finally:
            process.terminate()
            assert process.wait(timeout=30) is not None
    assert name == "traces" and "Overview" in json.dumps(views)
    assert [row[0] for row in overview["steps"]["rows"]] == ["1", "2"]
    with pytest.raises(OSError):
        ask(port, "runs")  # no process stays behind


def wait_for_run(port: int) -> dict:
    """Wait until the plugin, which reads traces in the background, lists a run."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        try:
            answer = ask(port, "runs")
            if answer["runs"] and not answer["loading"]:
                return answer
        except OSError:
            pass
        time.sleep(0.3)
    raise AssertionError("TensorBoard lists no run")


def test_a_missing_plugin_is_reported_in_one_line(run, monkeypatch, capsys):
    from fastlab.traces import page as trace_page

    monkeypatch.setattr(trace_page.importlib.util, "find_spec", lambda name: None)
    assert main(["trace", str(run), "--tensorboard"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and 'pip install -e ".[profile]"' in lines[0]
