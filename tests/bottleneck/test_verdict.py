"""What limits: by known costs, and said only where the rounds agree."""

from dataclasses import replace
from statistics import median

import pytest

from fastlab.bottleneck.command import investigate
from fastlab.bottleneck.rounds import Rounds
from fastlab.bottleneck.sentences import verdict_line
from fastlab.bottleneck.verdict import judge

FAST = [0.010, 0.011, 0.010, 0.012, 0.011]
SLOW = [0.020, 0.022, 0.021, 0.024, 0.022]
AMID = [0.010, 0.022, 0.011, 0.021, 0.012]


@pytest.mark.parametrize(
    ("alone", "step", "limit"),
    [
        (SLOW, FAST, "loader"),
        (FAST, SLOW, "step"),
        (FAST, FAST, "balanced"),
        (AMID, FAST, "balanced"),
        (SLOW, AMID, "balanced"),
    ],
)
def test_only_what_was_slower_in_every_round_limits(alone, step, limit):
    both = [max(pair) for pair in zip(alone, step, strict=True)]
    assert judge(Rounds(alone, step, both), start=0.0).limit == limit


def test_the_beginning_of_an_epoch_counts_for_the_loader():
    verdict = judge(Rounds(FAST, SLOW, SLOW), start=0.05)
    assert verdict.limit == "loader"
    assert verdict.times == pytest.approx((0.011 + 0.05) / 0.022)
    assert verdict.gain == pytest.approx((0.022 + 0.05) / 0.022)


def test_a_loader_that_limits_gives_the_rate_of_its_known_cost(look):
    found = look("""
        class Slow(Dataset):
            def __len__(self):
                return 1000

            def __getitem__(self, index):
                time.sleep(0.01)
                return torch.tensor(index)

        def make():
            return DataLoader(Slow(), 2)

        def step(batch):
            time.sleep(0.002)
        """)
    rounds = found["rounds"]
    assert found["verdict"]["limit"] == "loader"
    assert found["verdict"]["line"].startswith("The loader limits: it gives ")
    # A busy machine only adds to what sleeps take, and hardly to all rounds.
    assert median(rounds["alone"]) >= 0.020 and min(rounds["alone"]) < 0.03
    assert median(rounds["step"]) >= 0.002 and min(rounds["step"]) < 0.01
    assert median(rounds["both"]) >= 0.022 and min(rounds["both"]) < 0.04


def test_a_slow_step_limits_whatever_the_loader_does(look):
    found = look("""
        def make():
            return DataLoader(ONES, 4, num_workers=1)

        def step(batch):
            time.sleep(0.02)
        """)
    assert found["verdict"]["limit"] == "step"
    assert "costs most" not in found["verdict"]["line"] and not found["advice"]


def test_a_loader_and_a_step_in_turns_are_told_that_workers_would_help(look):
    found = look("""
        class Slow(Dataset):
            def __len__(self):
                return 1000

            def __getitem__(self, index):
                time.sleep(0.01)
                return torch.tensor(index)

        def make():
            return DataLoader(Slow(), 1)

        def step(batch):
            time.sleep(0.02)
        """)
    assert found["verdict"]["limit"] == "step"
    assert 1.2 < found["verdict"]["apart"] < 1.8  # (10 + 20) / 20
    assert "take turns" in found["verdict"]["line"]
    if found["cores"] > 1:
        assert f"num_workers={found['cores']}" in found["advice"][0]


@pytest.mark.multiprocess
def test_workers_overlap_with_the_step(look):
    found = look("""
        class Slow(Dataset):
            def __len__(self):
                return 1000

            def __getitem__(self, index):
                time.sleep(0.02)
                return torch.tensor(index)

        def make():
            return DataLoader(Slow(), 1, num_workers=2)

        def step(batch):
            time.sleep(0.02)
        """)
    rounds = found["rounds"]
    assert median(rounds["both"]) >= 0.020 and min(rounds["both"]) < 0.030  # not 20 + 10


def test_batches_that_workers_made_ahead_do_not_count(look):
    """While a slow step runs alone, the workers make all batches that they may: they are no sign
    of a fast loader."""
    found = look("""
        class Slow(Dataset):
            def __len__(self):
                return 1000

            def __getitem__(self, index):
                time.sleep(0.03)
                return torch.tensor(index)

        def make():
            return DataLoader(Slow(), 1, num_workers=1, prefetch_factor=8)

        def step(batch):
            time.sleep(0.001)
        """)
    assert median(found["rounds"]["alone"]) >= 0.027
    assert found["verdict"]["limit"] == "loader"


def test_a_short_epoch_counts_with_its_beginning(look):
    found = look("""
        def prepare(worker):
            time.sleep(0.1)

        def make():
            return DataLoader(ONES, 200, num_workers=1, worker_init_fn=prepare)
        """)
    assert found["length"] == 2
    assert median(found["rounds"]["alone"]) >= 0.1 / 2
    assert found["stages"][0]["name"] == "worker start" and found["start"] == 0


@pytest.mark.parametrize(
    ("both", "workers", "device", "text"),
    [
        (FAST, 2, None, ""),
        (SLOW, 0, None, "take turns"),
        (SLOW, 2, None, "compete for the cores"),
        (SLOW, 2, "cuda", "do not overlap in full"),
    ],
)
def test_a_balance_is_said_with_what_both_reach_together(both, workers, device, text, script):
    found = investigate(f"{script('make = DataLoader(ONES, 20)')}:make", None, 60, 0.1)
    rounds = Rounds(FAST, FAST, both)
    verdict = judge(rounds, 0.0)
    changed = replace(
        found, rounds=rounds, start=0.0, verdict=verdict, workers=workers, device=device
    )
    line = verdict_line(changed)
    assert line.startswith("Balanced: the loader gives 1,818 samples/s and the step takes 1,818")
    assert text in line and ("Together they reach 909" in line) == bool(text)
