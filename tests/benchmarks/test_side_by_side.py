from pathlib import Path

import pytest

from benchmarks import side_by_side
from benchmarks.measurements import Record, load, new_session

ROOT = Path(__file__).parents[2]


def test_times_are_relative_to_one_training_with_brief_waits():
    records = [
        Record(f"{count} brief", "images/s", [rate], {"trainings": count, "threads": "brief"})
        for count, rate in ((1, 300.0), (2, 150.0))
    ]
    table = side_by_side.table(new_session("side_by_side", records))
    assert "| 2 | brief | 150 ± 0% | 200.0% (200.0% to 200.0%) |" in table


@pytest.mark.slow
@pytest.mark.multiprocess
def test_one_and_two_trainings_are_measured(synth_dataset, tmp_path, monkeypatch):
    out = tmp_path / "side-by-side.json"
    monkeypatch.chdir(ROOT)
    monkeypatch.delitem(side_by_side.POLICIES, "spinning")  # takes minutes
    sets = (f"data.path={synth_dataset}", "model.width=4", "train.epochs=1", "train.batch_size=16")
    options = [part for value in sets for part in ("--set", value)]
    options += ["--rounds", "1", "--out", str(out)]
    assert side_by_side.main(["--config", "configs/demo.toml", *options]) == 0
    assert [record.case for record in load(out).records] == ["1 brief", "2 brief"]
