import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import (
    scaling,
)
from benchmarks.measurements import (
    Record,
    load,
    new_session,
)

ROOT = Path(__file__).parents[2]


def test_efficiency_is_the_rate_divided_by_that_of_ideal_scaling():
    records = [
        Record(f"{n} processes", "images/s", [rate], {"processes": n})
        for n, rate in ((1, 100.0), (4, 300.0))
    ]
    assert "| 4 | 300 ± 0% | 75.0% (75.0% to 75.0%) |" in scaling.table(
        new_session("scaling", records)
    )


@pytest.mark.slow
@pytest.mark.multiprocess
def test_scaling_measures_each_number_of_processes(dataset, tmp_path):
    out = tmp_path / "scaling.json"
    command = [sys.executable, "-m", "benchmarks.scaling", "--config", "configs/demo.toml"]
    command += ["--set", f"data.path={dataset}", "--set", "model.width=4", "--batch", "16"]
    command += ["--processes", "1,2", "--seconds", "0.2", "--rounds", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    one, two = load(out).records
    assert (one.details["processes"], two.details["processes"]) == (1, 2)
    assert one.details["cores"] == two.details["cores"]  # else it is no comparison
    assert len(one.rounds) == len(two.rounds) == 1 and min(one.rounds + two.rounds) > 0
    assert scaling.table(load(out)) in done.stdout
