"""Made-up studies with known effects: how often what is decided is false."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from fastlab.config import Config
from fastlab.run_records import EPOCH_KEYS, Run
from fastlab.study.folder import State
from fastlab.study.results import Claim, RowResult, RunResult, decide
from fastlab.study.spec import Finding, Row, Task

IMAGES, CLASSES, SEEDS = 500, 10, 7
TASKS = [
    Task(str(seed), replace(Config(), train=replace(Config().train, seed=seed)))
    for seed in range(SEEDS)
]
SUMMARY = {"classes": CLASSES, "counts": {"val": IMAGES}}


def make_row(label: str, tops: np.ndarray) -> RowResult:
    runs = []
    for task, top1 in zip(TASKS, tops, strict=False):
        epoch = {"epoch": 1, **dict.fromkeys(EPOCH_KEYS, None), "val_top1": float(top1)}
        run = Run(label, {}, {}, SUMMARY, [epoch], [])
        runs.append(RunResult(task, State("finished"), run))
    return RowResult(Row(label, tuple(TASKS[: len(tops)])), runs)


def make_claim(rng, seeds: int, planned: int | None, *effects: float) -> Claim:
    """That the first row lies above the others, over which it lies by `effects`; runs of a seed
    share some of their noise, and top-1 is counted in images."""
    means = 0.5 - np.array([0.0, *effects])[:, None]
    noise = rng.normal(0, 0.01, seeds) + rng.normal(0, 0.01, (len(means), seeds))
    tops = np.round((means + noise) * IMAGES) / IMAGES
    rows = [make_row(str(i), of_row) for i, of_row in enumerate(tops)]
    worse = [row.label for row in rows[1:]]
    return Claim(Finding("x", better="0", worse=worse), rows, planned)


def chance_claim(rng, seeds: int, planned: int | None, mean: float) -> Claim:
    tops = np.round(rng.normal(mean, 0.01, seeds) * IMAGES) / IMAGES
    return Claim(Finding("x", chance=["0"]), [make_row("0", tops)], planned)


def make_study(rng, seeds: int, planned: int | None) -> tuple[list[Claim], list[str]]:
    """Claims and what is true of each; "" of those without an effect, which nothing decides."""
    limit = 0.1 + 3 * (0.09 / IMAGES) ** 0.5
    make = [rng, seeds, planned]
    claims = [
        (make_claim(*make, 0.0), ""),
        (make_claim(*make, 0.0), ""),
        (make_claim(*make, 0.0, 0.0, 0.0), ""),
        (make_claim(*make, 0.0, 0.3), ""),
        (chance_claim(*make, limit + 0.001), "does not hold"),
        (make_claim(*make, 0.15), "holds"),
        (make_claim(*make, 0.15, 0.2), "holds"),
        (make_claim(*make, 0.2, -0.15), "does not hold"),
        (chance_claim(*make, 0.1), "holds"),
        (chance_claim(*make, 0.3), "does not hold"),
    ]
    return [claim for claim, _ in claims], [truth for _, truth in claims]


@pytest.mark.parametrize(("seeds", "planned"), [(4, None), (SEEDS, 4)])
def test_false_decisions_stay_within_five_percent_of_studies(seeds, planned):
    """With looks after each added seed too: a decision stays, so the last look holds them all."""
    rng, studies, false, right = np.random.default_rng(1), 150, 0, Counter()
    for _ in range(studies):
        claims, truths = make_study(rng, seeds, planned)
        decisions = [verdict.decision for verdict in decide(claims)]
        wrong = [d not in ("undecided", t) for d, t in zip(decisions, truths, strict=True)]
        false += any(wrong)
        right.update(i for i, t in enumerate(truths) if decisions[i] == t)
    assert false < 0.05 * studies + 3 * (0.05 * 0.95 * studies) ** 0.5
    assert min(right[i] for i in range(5, 10)) > 0.8 * studies, right


def test_five_percent_of_decisions_without_correction_would_be_exceeded():
    """That the simulation could fail: ten claims without an effect, each decided by itself."""
    rng, studies, false = np.random.default_rng(2), 50, 0
    for _ in range(studies):
        claims = [make_claim(rng, 4, None, 0.0) for _ in range(10)]
        false += any(decide([claim])[0].decision != "undecided" for claim in claims)
    assert false > 0.2 * studies
