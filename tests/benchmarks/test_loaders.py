import pytest

from benchmarks import (
    loaders,
)
from benchmarks.measurements import (
    Record,
    child_result,
    new_session,
)


@pytest.mark.multiprocess
@pytest.mark.parametrize("case", ["fastlab resident", "fastlab torchvision", "DataLoader + PIL"])
def test_a_loader_is_measured(originals, dataset, case):
    arguments = [str(dataset), "--originals", str(originals), "--cores", "1"]
    result = child_result("benchmarks.loaders", [*arguments, "--seconds", "0.1", "--case", case])
    assert result["rate"] > 0 and result["batch"] == 256 and result["memory"] > 1e8
    assert 0 < result["cpu"] < 3


def test_the_table_of_loaders_shows_what_was_not_measured():
    def record(name, cores, rate):
        details = {"cores": cores, "cpu": 1.0, "memory": 1e9}
        return Record(f"{name}, {cores}", "images/s", [rate], details)

    limit = "memory gather, no augmentation"
    made = new_session(
        "loaders", [record(limit, 1, 50.0), record(limit, 2, 100.0), record("x", 2, 25.0)]
    )
    rows = loaders.table(made).splitlines()
    assert rows[2].startswith(f"| {limit} | 50 ± 0% | 100 ± 0% | 100.0% |")
    assert rows[3].startswith("| x | not measured | 25 ± 0% | 25.0% |")
