"""Reviews of traces with planted problems. They need no GPU: the traces are made here, in the form
in which torch.profiler writes them."""

import gzip
import json
import random
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlab.cli import main
from fastlab.traces.events import read_trace
from fastlab.traces.intervals import Event, Intervals, enclosing, self_times
from fastlab.traces.page import tables
from fastlab.traces.review import review_run

GEMM = "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1"
CONV = "void cudnn::cnn::implicit_convolve_sgemm<float, 1024, 5, 5>(int, int, float const*)"
RELU = "void at::native::vectorized_elementwise_kernel<4, at::native::clamp_scalar(float&)>(int)"
FUSED = "triton_poi_fused__native_batch_norm_convolution_relu_3"
NCCL = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
ON_HOST = ("user_annotation", "cpu_op", "cuda_runtime")
LINE = "/home/some/fastlab/train.py:371"


class Recording:
    """Simulates a host that launches work and a GPU that runs each stream in order; times in µs."""

    def __init__(self, rank: int = 0, world: int = 1, stacks: bool = False) -> None:
        self.rank, self.world, self.stacks = rank, world, stacks
        self.now = 4_635_978_000_000.0  # traces count from a large, arbitrary origin
        self.free: dict[int, float] = {}
        self.events: list[dict] = []
        self.correlation = 100

    def add(self, cat: str, name: str, start: float, end: float, thread=1, **args) -> None:
        dur = round(end - start, 3)
        event = {
            "ph": "X",
            "cat": cat,
            "name": name,
            "pid": 1,
            "tid": thread,
            "ts": round(start, 3),
        }
        self.events.append({**event, "dur": dur, "args": args})

    @contextmanager
    def range(self, name: str):
        start = self.now
        yield
        self.add("user_annotation", name, start, self.now, **{"External id": 1})

    def kernel(self, name: str, us: float, host: float = 10, op="aten::op", stream=7) -> None:
        """An operator of `host` µs that ends with a launch, then `us` µs on the GPU."""
        self.correlation += 1
        start, self.now = self.now, self.now + host
        ids = {"External id": self.correlation, "correlation": self.correlation}
        self.add("cpu_op", op, start, self.now, **{"External id": self.correlation})
        self.add("cuda_runtime", "cudaLaunchKernel", self.now - 4, self.now - 1, cbid=211, **ids)
        self.on_gpu("kernel", name, us, stream, **ids, grid=[8, 1, 1], block=[128, 1, 1])

    def on_gpu(self, cat: str, name: str, us: float, stream: int = 7, **args) -> None:
        start = max(self.now + 1, self.free.get(stream, 0) + 0.5)
        self.free[stream] = start + us
        place = {"device": self.rank, "context": 1, "stream": stream}
        self.add(cat, name, start, start + us, thread=stream, **place, **args)
        flow = {"id": args["correlation"], "pid": 1, "cat": "ac2g", "name": "ac2g"}
        self.events.append({"ph": "s", "tid": 1, "ts": self.now, **flow})
        self.events.append({"ph": "f", "tid": stream, "ts": start, "bp": "e", **flow})

    def item(self) -> None:
        """What `.item()` does: copy to the host and wait for the copy."""
        self.correlation += 2
        start = self.now
        ids = {"External id": self.correlation}
        copy = {**ids, "correlation": self.correlation}
        self.add("cuda_runtime", "cudaMemcpyAsync", start + 2, start + 8, cbid=41, **copy)
        self.now += 8
        self.on_gpu("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 1.2, bytes=4, **copy)
        waited, self.now = self.now, max(self.now, self.free[7]) + 3
        copy["correlation"] -= 1
        self.add("cuda_runtime", "cudaStreamSynchronize", waited, self.now, cbid=131, **copy)
        for depth, name in enumerate(("aten::item", "aten::_local_scalar_dense")):
            self.add("cpu_op", name, start + depth, self.now + 1 - depth / 2, **ids)
        self.now += 1
        if self.stacks:
            item = "<built-in method item of Tensor object at 0x7f0000000000>"
            self.add("python_function", item, start - 0.5, self.now, CallFrom=LINE)
            inner = "torch/utils/_contextlib.py(124): decorate_context"
            self.add("python_function", inner, start - 0.4, self.now, CallFrom="torch/x.py:9")

    def python(self, us: float) -> None:
        """Time on the host that no event records."""
        self.now += us

    def save(self, path: Path, seed: int = 0) -> Path:
        random.Random(seed).shuffle(self.events)  # the events of a file are in no order
        meta = {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "ts": 0, "args": {}}
        content = {"schemaVersion": 1, "deviceProperties": [{"id": 0, "name": "NVIDIA H100"}]}
        if self.world > 1:
            content["distributedInfo"] = {"rank": self.rank, "world_size": self.world}
        if self.stacks:
            content["with_stack"] = 1
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**content, "traceEvents": [meta, *self.events]}))
        return path


def step(gpu: Recording, number: int, wait: float, work, each: int = 20, save=False) -> None:
    """A step that waits `wait` µs for data and calls `work` `each` times in each part. With `save`
    it ends with a checkpoint of 50 ms."""
    with gpu.range(f"ProfilerStep#{number}"):
        with gpu.range("data_wait"):
            gpu.python(wait)
            with gpu.range("augmentation"):
                gpu.kernel("triton_poi_fused_index_select_0", 5)
        for part in ("forward", "backward", "optimizer"):
            with gpu.range(part):
                for _ in range(each):
                    work(gpu)
        if save:
            with gpu.range("checkpoint"):
                gpu.item()
                gpu.python(50_000)


def record(folder: Path, wait: float, work, each: int = 20, name="rank0.1", **kwargs) -> Path:
    gpu = Recording(**kwargs)
    for number in range(11, 15):
        step(gpu, number, wait, work, each)
    return gpu.save(folder / f"{name}.pt.trace.json")


def verdict(path: Path) -> str:
    return review_run(path).findings[0].name


def compute(gpu: Recording) -> None:
    gpu.kernel(GEMM, 100, op="aten::mm")


def move(gpu: Recording) -> None:
    gpu.kernel(RELU, 60, op="aten::relu")
    gpu.kernel(FUSED, 60, op="aten::relu")
    gpu.kernel(CONV, 60, op="aten::cudnn_convolution")


def tiny(gpu: Recording) -> None:
    gpu.kernel(RELU, 2.5, host=12)


def with_item(gpu: Recording) -> None:
    gpu.kernel(GEMM, 300)
    gpu.item()
    gpu.python(200)  # what Python does before it launches again


@pytest.mark.parametrize(
    ("wait", "work", "expected"),
    [
        (20_000, compute, "data stall"),
        (20, with_item, "host synchronisation"),
        (20, tiny, "launch-bound"),
        (20, move, "memory-bound"),
        (20, compute, "compute-bound"),
        # The host waits for data, but the GPU has work for longer, so there is no stall.
        (3_000, compute, "compute-bound"),
    ],
)
def test_a_planted_problem_is_named(wait, work, expected, tmp_path):
    path = record(tmp_path, wait, work)
    assert verdict(path) == expected
    shares = review_run(path).main.shares.values()
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    assert all(share >= -1e-9 for share in shares)


def test_the_figures_are_those_that_were_planted(tmp_path):
    review = review_run(record(tmp_path, 20_000, compute)).main
    # The host waits 20 ms and launches for 0.61 ms; the GPU computes for 6 ms, mostly meanwhile.
    assert review.step_ms == pytest.approx(20.61, abs=0.01)
    assert review.busy == pytest.approx(6 / 20.61, abs=0.001)
    assert review.shares["data"] == pytest.approx((20 - 5.45) / 20.61, abs=0.002)
    parts = {name: (host, device) for name, host, device in review.parts}
    assert parts["data_wait"][0] == pytest.approx(20)
    assert parts["augmentation"] == (pytest.approx(0.010), pytest.approx(0.005))
    assert parts["forward"] == (pytest.approx(0.2), pytest.approx(2.0))
    assert review.launches == 61
    assert review.kernels[0].name == GEMM and review.kernels[0].calls == 60
    assert review.ops[0].name == "aten::mm" and review.ops[0].gpu_ms == pytest.approx(6)
    assert review.numbers == [11, 12, 13, 14]


@pytest.mark.parametrize("stacks", [True, False])
def test_a_synchronisation_is_reported_with_its_place(stacks, tmp_path, capsys):
    path = record(tmp_path, 20, with_item, each=2, stacks=stacks)
    syncs = review_run(path).main.syncs
    assert {sync.call for sync in syncs} == {"aten::item"}
    assert sum(sync.calls for sync in syncs) == 6
    places = {sync.place for sync in syncs}
    assert places == ({"fastlab/train.py:371"} if stacks else {"forward", "backward", "optimizer"})
    assert main(["trace", str(path)]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert ("fastlab/train.py:371" in output) == stacks
    assert ("profile.stacks = true" in output) != stacks


def test_a_trace_of_older_torch_names_the_function_instead_of_the_line(tmp_path):
    path = record(tmp_path, 20, with_item, each=2, stacks=True)
    content = json.loads(path.read_text())
    start, end = 4_635_978_000_000.0, 4_635_999_000_000.0
    for event in content["traceEvents"]:
        event.get("args", {}).pop("CallFrom", None)
    outer = {"ph": "X", "cat": "python_function", "name": "fastlab/train.py(360): train_step"}
    outer |= {"pid": 1, "tid": 1, "ts": start - 5, "dur": end - start, "args": {}}
    content["traceEvents"].append(outer)
    path.write_text(json.dumps(content))
    places = {sync.place for sync in review_run(path).main.syncs}
    assert places == {"below fastlab/train.py(360): train_step"}


def test_validation_between_steps_is_left_out(tmp_path):
    gpu = Recording()
    for number in range(1, 7):
        if number == 3:  # validation
            for _ in range(5000):
                gpu.kernel(RELU, 3)
        step(gpu, number, 20, compute)
    path = gpu.save(tmp_path / "rank0.1.pt.trace.json")
    assert review_run(path).main.numbers == [3, 4, 5, 6]
    assert verdict(path) == "compute-bound"


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_checkpoint_within_a_step_is_left_out(on_gpu, tmp_path):
    reviews = []
    for saves in ((), (2, 6)):
        recording = Recording()
        for number in range(1, 7):
            step(recording, number, 20, move, save=number in saves)
        if not on_gpu:
            recording.events = [e for e in recording.events if e.get("cat") in ON_HOST]
        path = recording.save(tmp_path / f"saves-{len(saves)}" / "rank0.1.pt.trace.json")
        reviews.append(review_run(path).main)
    plain, saved = reviews
    assert plain.numbers == [1, 2, 3, 4, 5, 6] and saved.numbers == [3, 4, 5, 6]
    assert saved.step_ms == pytest.approx(plain.step_ms, rel=0.02)
    assert saved.shares == pytest.approx(plain.shares, abs=0.02)
    assert saved.slowest_ms == pytest.approx(plain.slowest_ms, rel=0.02)


def communicating(folder: Path, hidden: bool, late: int | None = None) -> None:
    for rank in range(2):
        gpu = Recording(rank, world=2)
        for number in range(1, 5):
            with gpu.range(f"ProfilerStep#{number}"), gpu.range("backward"):
                for _ in range(20):
                    gpu.kernel(GEMM, 100)
                length = 200 if late == rank else 1000
                if not hidden:
                    gpu.free[20] = gpu.free[7]
                gpu.kernel(NCCL, length, stream=20)
                if not hidden:
                    gpu.free[7] = gpu.free[20]
        gpu.save(folder / "traces" / f"rank{rank}.{10**18 + rank}.pt.trace.json", rank)


@pytest.mark.parametrize(("hidden", "share"), [(True, 1.0), (False, 0.0)])
def test_the_overlap_of_communication_is_measured(hidden, share, tmp_path):
    communicating(tmp_path, hidden)
    run = review_run(tmp_path)
    assert [review.rank for review in run.ranks] == [0, 1]
    for review in run.ranks:
        assert review.hidden == pytest.approx(share, abs=0.02)
        assert review.comm_ms == pytest.approx(1.0, rel=0.01)
    assert run.late is None
    assert run.findings[0].name == ("compute-bound" if hidden else "communication-bound")


def test_the_rank_that_the_others_wait_for_is_named(tmp_path, capsys):
    communicating(tmp_path, hidden=True, late=1)
    assert main(["trace", str(tmp_path)]) == 0
    assert "rank 1 spends the least time in communication" in capsys.readouterr().out


def test_the_newest_recording_of_all_ranks_is_reviewed(tmp_path):
    communicating(tmp_path, hidden=True)
    old = sorted((tmp_path / "traces").iterdir())
    record(tmp_path / "traces", 20, tiny, name=f"rank0.{2 * 10**18}", world=2)
    run = review_run(tmp_path)
    assert [review.numbers[0] for review in run.ranks] == [11]  # the other rank lacks these steps
    assert run.findings[0].name == "launch-bound"
    assert review_run(old[1]).ranks[0].rank == 1


def test_cuda_calls_without_kernels_are_reported(tmp_path):
    path = record(tmp_path, 20, tiny)
    content = json.loads(path.read_text())
    content["traceEvents"] = [
        e for e in content["traceEvents"] if e.get("cat") not in ("kernel", "gpu_memcpy")
    ]
    path.write_text(json.dumps(content))
    assert verdict(path) == "GPU not recorded"


def test_kernels_of_a_graph_share_one_launch(tmp_path):
    gpu = Recording()
    for number in range(4):
        with gpu.range(f"ProfilerStep#{number}"), gpu.range("forward"):
            gpu.correlation += 1
            ids = {"correlation": gpu.correlation, "External id": 0}
            gpu.add("cuda_runtime", "cudaGraphLaunch", gpu.now, gpu.now + 20, **ids)
            gpu.python(20)
            for _ in range(50):
                gpu.on_gpu("kernel", GEMM, 20, **ids)
    run = review_run(gpu.save(tmp_path / "rank0.1.pt.trace.json"))
    assert run.main.launches == 1
    assert run.findings[0].name == "compute-bound"
    parts = {part.name: part.gpu_ms for part in run.main.parts}
    assert parts["forward"] == pytest.approx(1.0, rel=0.01)


# Traces of other programs. Their events have the form of those in the test data of
# HolisticTraceAnalysis (MIT licence): of an MI250, of a program without steps, of torch 1.10.

FOREIGN = {"cudaLaunchKernel": "hipExtModuleLaunchKernel", GEMM: "Cijk_Ailk_Bjlk_SB_Bias_MT64x16"}
OLD = {"cuda_runtime": "Runtime", "kernel": "Kernel", "cpu_op": "Operator"}


def changed(path: Path, change, compress: bool = False) -> Path:
    """The trace at `path` with `change` made to its content, perhaps compressed."""
    content = json.loads(path.read_text())
    content = change(content) or content
    data = json.dumps(content).encode()
    out = path.with_name(f"changed.json{'.gz' * compress}")
    out.write_bytes(gzip.compress(data) if compress else data)
    return out


def renamed(names: dict[str, str]):
    def change(content):
        for event in content["traceEvents"]:
            event["name"] = names.get(event["name"], event["name"])
            event["cat"] = names.get(event.get("cat"), event.get("cat"))

    return change


def without_steps(content):
    events = [e for e in content["traceEvents"] if not e["name"].startswith("ProfilerStep")]
    return {**content, "traceEvents": events}


def figures(path: Path) -> tuple:
    review = review_run(path).main
    kernels = [kernel._replace(name="") for kernel in review.kernels]
    return review.step_ms, review.shares, review.launches, review.memory_kernels, kernels


@pytest.mark.parametrize("change", [renamed({}), renamed(FOREIGN), renamed(OLD)])
def test_a_compressed_trace_of_any_program_gives_the_same_figures(change, tmp_path):
    path = record(tmp_path, 2000, compute)
    assert figures(changed(path, change, compress=True)) == figures(path)


def test_a_program_that_marks_no_steps_gets_figures_of_the_whole_recording(tmp_path, capsys):
    path = record(tmp_path, 20, compute)
    whole, steps = review_run(changed(path, without_steps)), review_run(path)
    assert whole.main.numbers == []
    # Four steps of 60 kernels of 100 µs and one of 5 µs, and at the start the wait for a launch.
    assert whole.main.step_ms == pytest.approx(4 * 6.005 + 0.03, rel=0.01)
    assert whole.main.launches == 4 * steps.main.launches
    assert whole.findings[0].name == "compute-bound"
    assert main(["trace", str(tmp_path / "changed.json")]) == 0
    assert "the whole recording as one step" in capsys.readouterr().out


def test_the_empty_step_after_the_last_one_is_left_out(tmp_path):
    gpu = Recording()
    for number in range(11, 15):
        step(gpu, number, 20, compute)
    with gpu.range("ProfilerStep#15"):
        gpu.python(3)
    review = review_run(gpu.save(tmp_path / "rank0.1.pt.trace.json")).main
    assert review.numbers == [11, 12, 13, 14]


def test_a_folder_of_the_traces_of_all_ranks_gives_one_page(tmp_path, capsys):
    communicating(tmp_path, hidden=False, late=1)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for rank, path in enumerate(sorted((tmp_path / "traces").iterdir())):
        (folder / f"rank-{rank}.json.gz").write_bytes(gzip.compress(path.read_bytes()))
    (folder.parent / "config.toml").write_text("[another_program]\n")
    assert main(["trace", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 ranks" in printed and "rank 1 spends the least time" in printed
    assert (folder / "review.html").exists()


def first_kernel(content):
    return next(event for event in content["traceEvents"] if event.get("cat") == "kernel")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: first_kernel(content).update(dur=str(first_kernel(content)["dur"])),
        lambda content: content.update(distributedInfo=None, deviceProperties=[]),
        lambda content: content["traceEvents"].append({"ph": "s", "id": 1, "cat": "fwdbwd"}),
        lambda content: content["traceEvents"].append({"name": "Trace", "args": None}),
        lambda content: content.update(displayTimeUnit="ms", baseTimeNanoseconds=1735632360),
        lambda content: next(e for e in content["traceEvents"] if "args" in e).update(args=None),
    ],
)
def test_what_other_programs_leave_out_or_add_does_not_matter(change, tmp_path, capsys):
    path = changed(record(tmp_path, 20, compute), change)
    assert main(["trace", str(path)]) == 0
    assert "compute-bound" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        lambda content: first_kernel(content).pop("dur"),
        lambda content: first_kernel(content).pop("ts"),
        lambda content: first_kernel(content).update(dur=-3),
        lambda content: first_kernel(content).update(dur="long"),
        lambda content: first_kernel(content).update(args=[1]),
        lambda content: first_kernel(content)["args"].update(correlation=[1]),
        lambda content: content.update(traceEvents=[], schema="1.0.1"),
    ],
)
def test_an_event_without_a_meaning_is_refused(change, tmp_path, capsys):
    path = record(tmp_path, 20, compute)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    complaint(path, capsys)


def test_a_compressed_trace_that_is_cut_short_is_refused(tmp_path, capsys):
    whole = changed(record(tmp_path, 20, compute), renamed({}), compress=True).read_bytes()
    path = tmp_path / "cut.json.gz"
    for data in (whole[: len(whole) // 2], whole[:12], whole[:-6] + b"123456", whole[:2]):
        path.write_bytes(data)
        assert "damaged or cut short" in complaint(path, capsys)


# Advice, and how figures are written


def test_compilation_is_not_advised_on_a_cpu(tmp_path):
    """It was measured to be slower there (benchmarks/README.md)."""
    path = record(tmp_path / "traces", 20, tiny)
    content = json.loads(path.read_text())
    events = [e for e in content["traceEvents"] if e.get("cat") in ("cpu_op", "user_annotation")]
    path.write_text(json.dumps({**content, "traceEvents": events}))
    for config in (None, "[train]\ncompile = false\n", "[train]\ncompile = true\n"):
        if config:
            (tmp_path / "config.toml").write_text(config)
        for finding in review_run(path).findings:
            assert "compile" not in finding.advice


def test_no_figure_is_a_negative_zero(tmp_path, capsys):
    for name, wait in (("slow", 20_000.2), ("fast", 20_000)):
        record(tmp_path / name / "traces", wait, compute)
    out = tmp_path / "both.html"
    runs = [str(tmp_path / "slow"), "--compare", str(tmp_path / "fast")]
    assert main(["trace", *runs, "--out", str(out)]) == 0
    shown = capsys.readouterr().out + out.read_text()
    assert not re.search(r"[-−]0(\.0*)?(?![\d.])( ?%| points| ms)", shown)
    assert "+0.0%" in shown


# The page


def test_the_page_is_self_contained_and_escapes_names(tmp_path, capsys):
    path = record(tmp_path / "run" / "traces", 20, move)
    assert main(["trace", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "traces" / "review.html").read_text()
    assert str(tmp_path / "run" / "traces" / "review.html") in capsys.readouterr().out
    assert not re.search(r'(src|href)="(?!#)', page) and "@import" not in page
    assert "<script" not in page
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    assert "memory-bound" in page
    assert "vectorized_elementwise_kernel&lt;4" in page.replace("<wbr>", "")
    assert path.exists()


def test_tables_show_the_figure_that_sorts_them_next_to_the_names(tmp_path):
    record(tmp_path / "run" / "traces", 20, with_item, each=2)
    heads = {title: head for title, head, _ in tables(review_run(tmp_path / "run"))}
    assert heads["Operators, by GPU time"][1] == "GPU ms per step"
    assert heads["Kernels, by GPU time"][1] == "GPU ms per step"
    assert heads["Synchronisations of host and device"][1] == "waited, ms"
    for _, head, rows in tables(review_run(tmp_path / "run")):
        times = [float(row[1].replace(",", "")) for row in rows]
        assert times == sorted(times, reverse=True), head


def test_names_break_only_between_their_words(tmp_path, capsys):
    record(tmp_path / "run" / "traces", 20, move)
    assert main(["trace", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "traces" / "review.html").read_text()
    assert "vectorized_<wbr>elementwise_<wbr>kernel&lt;4" in page
    assert "at::<wbr>native::<wbr>" in page


def test_two_runs_are_compared_side_by_side(tmp_path, capsys):
    record(tmp_path / "slow" / "traces", 20_000, compute)
    record(tmp_path / "fast" / "traces", 20, compute)
    out = tmp_path / "both.html"
    command = ["trace", str(tmp_path / "slow"), "--compare", str(tmp_path / "fast")]
    assert main([*command, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    busy = [line for line in lines if line.strip().startswith("GPU busy  ")]
    steps = [line.split() for line in lines if line.strip().startswith("step, ms")]
    before, after, change = steps[-1][2:]
    assert float(before) > 20 > float(after) and float(change.rstrip("%")) < -70
    assert busy[-1].endswith("points")
    assert not (tmp_path / "slow" / "traces" / "review.html").exists()
    assert "Side by side" in out.read_text()


def test_the_rate_follows_from_the_batch_size_in_the_configuration(tmp_path, capsys):
    record(tmp_path / "traces", 20_000, compute)
    (tmp_path / "config.toml").write_text("[train]\nbatch_size = 206\ncompile = true\n")
    assert main(["trace", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rate = next(line for line in lines if "images/s" in line).split()[-1]
    assert float(rate.replace(",", "")) == pytest.approx(10_000, rel=0.001)


def test_settings_that_are_in_use_are_not_advised(tmp_path):
    path = record(tmp_path / "traces", 20, tiny)
    advice = [review_run(path).findings[0].advice]
    for step in ("eager", "auto"):
        text = f'[train]\ncompile = true\nstep = "{step}"\n'
        (tmp_path / "config.toml").write_text(text)
        advice.append(review_run(path).findings[0].advice)
    assert "train.compile = true" in advice[0]
    assert 'train.step = "auto"' in advice[1]
    assert "nothing on one GPU" in advice[2]


# Damage


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    return record(tmp_path_factory.mktemp("whole"), 20, tiny, each=2).read_bytes()


def complaint(path: Path, capsys) -> str:
    assert main(["trace", str(path)]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and len(lines[0]) < 500 and str(path) in lines[0] and not captured.out
    return lines[0]


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_trace_cut_short_is_refused(share, whole, tmp_path, capsys):
    path = tmp_path / "rank0.1.pt.trace.json"
    path.write_bytes(whole[: int(share * len(whole))])
    assert "damaged or cut short" in complaint(path, capsys)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\x00",
        b'["\xff' + b"a" * 2000,
        b"[" * 100_000,
        b"[]",
        b"{}",
        b'{"traceEvents": {}}',
        b'{"traceEvents": [1]}',
        b'{"traceEvents": [{}]}',
        b'{"traceEvents": []}',
        b'{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "k", "ts": "x", "dur": 1}]}',
        b'{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "k", "ts": 1}]}',
        b'{"distributedInfo": [], "traceEvents": []}',
        b'{"traceEvents": [{"ph": "X", "cat": "cpu_op", "name": 1, "ts": 1, "dur": 1, "args": 2}]}',
    ],
)
def test_a_file_that_is_not_a_trace_is_refused(content, tmp_path, capsys):
    path = tmp_path / "rank0.1.pt.trace.json"
    path.write_bytes(content)
    complaint(path, capsys)


def parts_of(content: dict) -> dict[str, dict]:
    """Keep one step in `content`; return it, and one event of each category."""
    events = [event for event in content["traceEvents"] if event["ph"] == "X"]
    steps = [event for event in events if event["name"].startswith("ProfilerStep")]
    content["traceEvents"] = [event for event in events if event not in steps[1:]]
    return {"step": steps[0]} | {event["cat"]: event for event in events if event not in steps}


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("step", {"dur": 0}),
        ("step", {"dur": float("nan")}),
        ("step", {"name": f"ProfilerStep#{'9' * 5000}"}),
        ("cpu_op", {"dur": 10**400}),
        ("cpu_op", {"dur": float("inf")}),
    ],
)
def test_damaged_events_are_refused(part, changes, whole, tmp_path, capsys):
    content, path = json.loads(whole), tmp_path / "rank0.1.pt.trace.json"
    events = parts_of(content)
    path.write_text(json.dumps(content))
    assert main(["trace", str(path)]) == 0
    capsys.readouterr()
    events[part].update(changes)
    path.write_text(json.dumps(content))
    complaint(path, capsys)


def test_a_source_line_that_is_not_text_is_shown_unchanged(tmp_path, capsys):
    path = record(tmp_path, 5, with_item, each=2, stacks=True)
    path.write_text(path.read_text().replace(json.dumps(LINE), "[371]"))
    assert main(["trace", str(path)]) == 0
    assert "[371]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("train = 3", "train: expected a section"),
        ("data = 3", "data: expected a section"),
        ('[train]\nbatch_size = "x"', "train.batch_size: expected a whole number at least 1"),
        ("[train]\nbatch_size = 0", "train.batch_size: expected a whole number at least 1"),
        ("a = " + "[" * 9000, "not valid TOML"),
    ],
)
def test_a_damaged_configuration_is_refused(config, reason, whole, tmp_path, capsys):
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "rank0.1.pt.trace.json").write_bytes(whole)
    (tmp_path / "config.toml").write_text(config)
    assert f"config.toml: {reason}" in complaint(tmp_path, capsys)


def test_a_run_without_a_trace_is_refused_with_the_way_to_record_one(tmp_path, capsys):
    assert "fastlab train --profile" in complaint(tmp_path, capsys)
    assert "no such run" in complaint(tmp_path / "nowhere", capsys)


def test_bytes_changed_at_random_never_cause_a_traceback(whole, tmp_path, capsys):
    path, draw = tmp_path / "rank0.1.pt.trace.json", random.Random(3)
    for _ in range(60):
        changed = bytearray(whole)
        for _ in range(draw.randrange(1, 6)):
            changed[draw.randrange(len(changed))] = draw.randrange(32, 127)
        path.write_bytes(changed)
        assert main(["trace", str(path)]) in (0, 2)
    capsys.readouterr()


# Sets of intervals, against a grid of whole microseconds

INTERVALS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=12)
GRID = np.arange(60) + 0.5


def on_grid(intervals) -> np.ndarray:
    inside = np.zeros(60, dtype=bool)
    for start, end in intervals:
        inside |= (start < GRID) & (end > GRID)
    return inside


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(first=INTERVALS, second=INTERVALS, low=st.integers(0, 30), length=st.integers(1, 30))
def test_interval_arithmetic_agrees_with_a_grid(first, second, low, length):
    a, b, high = Intervals(first), Intervals(second), low + length
    window = (low < GRID) & (high > GRID)
    assert a.total() == on_grid(first).sum()
    assert a.common(b) == (on_grid(first) & on_grid(second)).sum()
    assert a.overlap(low, high) == (on_grid(first) & window).sum()
    assert np.array_equal(on_grid(a.without(b)), on_grid(first) & ~on_grid(second))
    assert np.array_equal(on_grid(a.clipped(low, high)), on_grid(first) & window)
    assert np.array_equal(on_grid(a.gaps(low, high)), ~on_grid(first) & window)


def event(name: str, start: float, end: float, thread: str = "1") -> Event:
    return Event(name, start, end, thread, {})


def test_enclosing_events_and_self_times():
    events = [event("b", 2, 5), event("a", 0, 10), event("c", 6, 8), event("a", 0, 9, thread="2")]
    inner = [event("x", 3, 4), event("y", 7, 7.5), event("z", 9, 9.5), event("w", 3, 4, thread="2")]
    names = [[outer.name for outer in chain] for chain in enclosing(inner, events)]
    assert names == [["a", "b"], ["a", "c"], ["a"], ["a"]]
    own = self_times(events)
    assert sorted(own["a"]) == [5, 9] and own["b"] == [3] and own["c"] == [2]


def test_reading_keeps_nanoseconds(tmp_path):
    trace = read_trace(record(tmp_path, 20, tiny, each=1))
    assert trace.ranges and max(abs(e.start) for e in trace.ranges) < 1e6
    assert {round(e.duration, 6) for e in trace.device} == {2.5, 5}
