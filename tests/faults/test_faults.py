"""The short, seeded version of ``python -m tests.faults``; ``make faults`` runs the full one. It
leaves out the stages that take longest."""

from pathlib import Path

import pytest

from tests.faults.__main__ import run, stages
from tests.faults.endurance import Sample, compare
from tests.faults.outcomes import CLEAR, CORRECT, Tally, judge
from tests.faults.prepare import prepare

STAGES = [name for name in stages(0, False) if name not in ("compiling", "endurance")]
pytestmark = pytest.mark.usefixtures("without_coverage")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "base"
    prepare(path)
    return path


@pytest.mark.timeout(900)  # many trainings, on a machine that may be busy
@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", STAGES)
def test_a_fault_leads_to_the_correct_result_or_one_clear_line(stage, base, tmp_path):
    if stage == "streams":
        pytest.importorskip("moto.server")
        pytest.importorskip("s3fs")
    tally = run(base, tmp_path, 0, full=False, only=[stage])
    assert tally.counts and not tally.unaccepted, "\n".join(tally.unaccepted)


def test_only_the_correct_result_and_one_clear_line_are_accepted():
    def fine():
        return ""

    def bad():
        return "bad"

    assert judge(0, "", fine, fine) == CORRECT
    assert judge(2, "fastlab: no\n", fine, fine) == CLEAR
    for outcome in (
        judge(0, "", bad, fine),
        judge(2, "fastlab: no\n", fine, bad),
        judge(2, "fastlab: no\nfastlab: more\n", fine, fine),
        judge(2, "Traceback\n", fine, fine),
        judge(2, "", fine, fine),
        judge(1, "fastlab: no\n", fine, fine),
        judge(-11, "", fine, fine),
    ):
        tally = Tally()
        tally.add("fault", outcome)
        assert tally.unaccepted


def test_growth_of_memory_descriptors_or_time_is_noticed():
    level = [Sample(100 * 2**20, 5, 9, 1)] * 40
    rising = [Sample((100 + n) * 2**20, 5, 9, 1) for n in range(40)]
    assert not compare(level, [0.1] * 40)[0]
    assert "memory" in compare(rising, [0.1] * 40)[0]
    assert "descriptors" in compare(level[:20] + [Sample(0, 5, 10, 1)] * 20, [0.1] * 40)[0]
    in_flight = [Sample(0, 5, 9, 1), Sample(0, 5, 11, 1)]  # two descriptors come and go
    assert not compare(in_flight * 10 + in_flight[1:] * 19 + in_flight[:1], [0.1] * 40)[0]
    assert "time" in compare(level, [0.1] * 20 + [0.2] * 20)[0]
