"""Everything that is counted runs in new processes: a faked GPU leaves traces in torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import kernel_counts, tables
from benchmarks.measurements import Record, Session, load, save

ROOT = Path(__file__).parents[2]

# At batch 128: generated kernels forward and backward, custom kernels, MB an image. Measured with
# torch 2.14, which generates more than torch 2.11. Lower these whenever the models save some.
LIMITS = {"resnet11": (21, 24, 67, 11.5), "cnn8": (14, 12, 46, 9.8)}

SMALL = """
import json
import torch
from benchmarks import faked_gpu, kernel_counts
from benchmarks.faked_gpu import CountError

class Residual(torch.nn.Module):
    def forward(self, x):
        assert x.is_cuda
        return torch.relu(x) + x

class Sum(torch.nn.Module):
    def forward(self, x):
        return x.sum(dim=0)

@torch.library.custom_op("fastlab::double", mutates_args=())
def double(x: torch.Tensor, times: int) -> torch.Tensor:
    raise NotImplementedError

double.register_fake(lambda x, times: torch.empty_like(x))
double.register_autograd(lambda ctx, gradient: (double(gradient, 3), None))

class Custom(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(64))

    def forward(self, x):
        weighted = x * self.weight
        return double(weighted, 5) if x.is_cuda else weighted

def counted(model, *inputs):
    return [kernel_counts.count_pass(graph) for graph in faked_gpu.generate(model, *inputs)]

def message(call):
    try:
        call()
    except CountError as error:
        return str(error)

def rows_of(passes):
    return [[(k.name[:12], k.kernels, k.bytes) for k in each.kernels] for each in passes]

rows = torch.zeros(512, 64)
with faked_gpu.faked_gpu():
    results = {"residual": rows_of(counted(Residual(), rows)), "sum": rows_of(counted(Sum(), rows))}
    results["unknown operator"] = message(lambda: counted(Custom(), rows))
    kernel_counts.OPERATORS["fastlab::double"] = lambda x, times: kernel_counts.Traffic(
        times, 2 * x.numel() * x.element_size()
    )
    results["custom"] = rows_of(counted(Custom(), rows))
    [graph] = faked_gpu.generate(Residual(), rows)
    for name, old, new in (
        ("wrong type", "'*fp32'", "'*bf16'"),
        ("no tensor", ".run(arg0_1", ".run(None"),
        ("unknown role", "in_ptr0", "some_ptr0"),
    ):
        assert old in graph.code
        changed = graph._replace(code=graph.code.replace(old, new))
        results[name] = message(lambda: kernel_counts.count_pass(changed))
print(json.dumps(results))
"""


def python(*arguments: str) -> str:
    """What Python prints."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def small():
    return json.loads(python("-c", SMALL).splitlines()[-1])


def test_a_fused_kernel_reads_its_input_and_writes_its_output_once(small):
    assert small["residual"] == [[["triton_poi_f", 1, 2 * 512 * 64 * 4]]]


def test_a_sum_in_two_kernels_moves_its_partial_sums_too(small):
    rows, partial, total = 512 * 64 * 4, 4 * 64 * 4, 64 * 4
    assert small["sum"] == [
        [["triton_red_f", 1, rows + partial], ["triton_per_f", 1, partial + total]]
    ]


def test_an_operator_of_the_project_counts_its_traffic_in_both_passes(small):
    forward, backward = small["custom"]
    rows, weight = 512 * 64 * 4, 64 * 4
    assert forward == [["triton_poi_f", 1, 2 * rows + weight], ["fastlab::dou", 5, 2 * rows]]
    assert backward[-1] == ["fastlab::dou", 3, 2 * rows]


def test_an_operator_of_the_project_without_known_traffic_is_an_error(small):
    assert small["unknown operator"] == "fastlab::double: its traffic is not in OPERATORS"


@pytest.mark.parametrize("case", ["wrong type", "no tensor", "unknown role"])
def test_an_argument_of_unknown_size_is_an_error(small, case):
    assert small[case].startswith("triton_poi_fused")


@pytest.mark.slow
def test_kernels_and_bytes_of_a_step_do_not_grow(tmp_path):
    out = tmp_path / "counts.json"
    files = [f"configs/{model}.toml" for model in LIMITS]
    arguments = ["--config", *files, "--batch", "128", "--out", str(out)]
    printed = python("-m", "benchmarks.kernel_counts", *arguments)
    session = load(out)
    assert kernel_counts.table(session) in printed and session.machine["gpus"] == []
    for model, limits in LIMITS.items():
        record = session[model]
        passes = record.details["forward"], record.details["backward"]
        generated, custom = ([each[kind] for each in passes] for kind in ("generated", "custom"))
        counted = (*generated, sum(custom), record.median / 1e6)
        assert all(a <= b for a, b in zip(counted, limits, strict=True)), (model, counted)


def session_of(generated: int, moved: float) -> Session:
    counts = {
        "generated": generated,
        "custom": 1,
        "library": {"aten::mm": 2},
        "small": 3,
        "bytes": 0,
    }
    details = {"batch": 128, "forward": counts, "backward": counts}
    machine = {"cpu": "a CPU", "cores": 2, "gpus": []}
    records = [Record("resnet11", "bytes/image", [moved], details)]
    return Session("kernel_counts", records, "python …", "2026-11-26T", machine, {"torch": "2.14"})


def test_one_table_shows_several_records(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    for name, session in (("before", session_of(110, 28e6)), ("after", session_of(70, 14e6))):
        save(session, tmp_path / f"benchmarks/results/{name}.json")
    row = (
        "| resnet11 | 128 | 110 + 110 = 220 → 70 + 70 = 140 | 2 → 2 | 4 → 4 | 6 → 6 | 28.0 → 14.0 |"
    )
    shown = tables.render("before", "after")
    origin = "`python …`; 2 cores of a CPU, no GPU; 2026-11-26; torch 2.14."
    assert row in shown and shown.endswith(f"\n\n{origin}\n\n{origin}")
