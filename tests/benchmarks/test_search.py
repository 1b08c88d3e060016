import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from benchmarks import search
from benchmarks.measurements import Results, load
from benchmarks.records import clock, reference
from benchmarks.search_spec import read_search
from fastlab import config as configs
from fastlab.console import UserError

ROOT = Path(__file__).parents[2]
SPECS = ROOT / "benchmarks" / "searches"
SPACE = "optim.lr = [0.1, 0.2, 0.3]"
SPEC = f"""
title = "Rates"
base = "{ROOT}/configs/demo.toml"
candidates = 4
rungs = [1, 2]
keep = 0.5

[set]
model.width = 4
optim.lr = 0.5

[space]
{SPACE}
"""
SMALL = ("train.batch_size=16", "train.eval_batch_size=16", "train.precision=fp32")


@pytest.fixture
def make(tmp_path, synth_dataset):
    """Reads `SPEC` after a replacement."""

    def read(before: str = "", after: str = "", *sets: str):
        (tmp_path / "spec.toml").write_text(SPEC.replace(before, after))
        return read_search(tmp_path / "spec.toml", [f"data.path={synth_dataset}", *SMALL, *sets])

    return read


@pytest.fixture
def trained(monkeypatch) -> list[tuple[float, int, int]]:
    """What was trained: (rate, epochs, seed). Instead of training, the top-1 is the rate: but 0.2
    is worse than 0.1 after the first rung, and 0.5 diverges."""
    calls = []

    def train(config, accelerator, deadline):
        epochs, seed, lr = config.train.epochs, config.train.seed, config.optim.lr
        calls.append((lr, epochs, seed))
        top1 = lr + seed / 100 - (0.15 if lr == 0.2 and epochs > 1 else 0)
        return clock.Race(2.0, False, False, lr == 0.5, None, [top1], [2.0])

    monkeypatch.setattr(search, "train", train)
    return calls


def rates(search) -> list[float]:
    return [candidate.config.optim.lr for candidate in search.candidates]


def test_the_best_candidates_train_longer_and_a_diverged_one_counts_as_zero(make, trained):
    results = Results("search", None)
    plan = make("keep = 0.5", "keep = 0.5\nseeds = [0, 2]")
    search.successive_halving(plan, results)
    assert {rate for rate, epochs, _ in trained if epochs == 1} == {0.1, 0.2, 0.3, 0.5}
    longer = [call for call in trained if call[1] == 2]
    assert sorted(longer) == [(0.2, 2, 0), (0.2, 2, 2), (0.3, 2, 0), (0.3, 2, 2)]
    rows = [row.split("|")[2:5] for row in search.table(results.session).splitlines()[2:6]]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["0.3", "30.00%", "31.00% ± 1.41%"],
        ["0.2", "20.00%", "6.00% ± 1.41%"],
        ["0.1", "10.00%", ""],
        ["0.5", "diverged", ""],
    ]


def test_an_interrupted_search_trains_the_rest_and_gives_the_same_table(
    make, trained, tmp_path, monkeypatch
):
    whole = Results("search", None)
    search.successive_halving(make(), whole)
    expected = trained.copy()
    trained.clear()
    train, out = search.train, tmp_path / "x.json"

    def cut(*arguments):
        if len(trained) == 5:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(search, "train", cut)
    with pytest.raises(KeyboardInterrupt):
        search.successive_halving(make(), Results("search", out))
    monkeypatch.setattr(search, "train", train)
    resumed = Results("search", out)
    search.check_results(make(), resumed)
    search.successive_halving(make(), resumed)
    assert trained == expected
    assert search.table(load(out)) == search.table(whole.session)
    others = (("keep = 0.5", "keep = 0.6"), ("0.3]", "0.4]"), ("width = 4", "width = 5"))
    for before, after in others:
        with pytest.raises(UserError, match="holds another search"):
            search.check_results(make(before, after), resumed)


def test_nothing_is_compiled_twice_where_shapes_agree(make, monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))

    head, _, rest = SPEC.partition("keep = 0.5")
    space = rest.replace(SPACE, "train.batch_size = [32]\noptim.lr = [0.02, 0.03]")
    head = head.replace("candidates = 4", "candidates = 3")
    sets = ("train.compile=true", "model.name=cnn8", "train.batch_size=64")
    search.successive_halving(
        make(SPEC, f"{head}keep = 0.7{space}", *sets), Results("search", None)
    )
    # Of both batch sizes the forward pass of training and the loss, and the one of evaluation.
    assert counter.frame_count == 5


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("title", "tilte", "'tilte': unknown key"),
        ("keep = 0.5", "keep = 1.5", "keep: expected a number above 0 and below 1"),
        ("keep = 0.5", 'keep = "half"', "keep: expected a value of type float"),
        ("rungs = [1, 2]", "rungs = [2, 1]", "rungs: expected ascending"),
        ("rungs = [1, 2]", "", "rungs is missing"),
        ("keep = 0.5", "seeds = [1, 1]", "seeds: expected different"),
        ("candidates = 4", "candidates = 5", "the base and .space. have only 4"),
        ("0.3]", "0.3, 0.1]", "listed twice"),
        (SPACE, "optim.lr = 0.1", "expected a list"),
        ("optim.lr = [", '"optim.lr" = [', "without quotes"),
        ("optim.lr = [", "optim.rate = [", r".space. optim.rate: no such setting"),
        ("0.3]", "-0.3]", "optim.lr: expected a number above 0"),
        ("optim.lr = [", "train.seed = [", "give seeds"),
        ("optim.lr = [", "train.precision = [", r"give \[set\]"),
        ("optim.lr = 0.5", "train.epochs = 5", "give rungs"),
        ("optim.lr = 0.5", "optim.lr = 2026-01-01", "optim.lr: expected a number"),
    ],
)
def test_an_invalid_file_is_refused_in_one_line(before, after, message, make):
    with pytest.raises(UserError, match=message) as refused:
        make(before, after)
    assert "\n" not in str(refused.value) and "spec.toml: " in str(refused.value)


def test_images_that_a_candidate_cannot_have_are_refused_before_a_training(make, trained):
    plan = make(SPACE, "augment.translate = [2, 3, 40]")
    refused = r"candidate \d \(augment.translate = 40\): augment.translate = 40: expected less"
    with pytest.raises(UserError, match=refused):
        search.successive_halving(plan, Results("search", None))
    assert not trained


def test_candidates_are_the_base_and_different_points_of_the_space(make):
    plan = make("candidates = 4", "candidates = 3")
    assert rates(plan)[0] == 0.5 and len(set(rates(plan))) == 3
    assert rates(plan) == rates(make("candidates = 4", "candidates = 3"))
    # Here the base is a point of the space: no other candidate repeats it.
    assert sorted(rates(make("0.3]", "0.3, 0.5]"))) == [0.1, 0.2, 0.3, 0.5]


def test_equal_shapes_come_one_after_the_other(make):
    plan = make(SPACE, "train.batch_size = [4, 8]\noptim.lr = [0.1, 0.2]")
    sizes = [each.config.train.batch_size for each in search.shapes_together(plan.candidates)]
    assert len(set(sizes)) == sum(a != b for a, b in zip(sizes, [0, *sizes], strict=False))


def test_the_search_of_the_records_recipe_has_it_as_its_base():
    plan = read_search(SPECS / "reference.toml", [])
    recipe = {**reference.RECIPE, "train.epochs": 3}
    record = configs.load(ROOT / "configs" / "resnet11.toml", clock.overrides(recipe))
    assert plan.candidates[0].config == record and plan.budgets() == [(3, 0), (6, 0), (12, 0)]
    assert len({each.label for each in plan.candidates}) == 30


def command(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments)])
    return search.main()


def test_a_search_stops_at_its_limit_and_the_same_command_continues(
    synth_dataset, trained, tmp_path, monkeypatch, capsys
):
    sets = [word for text in SMALL for word in ("--set", text)]
    arguments = (SPECS / "rehearsal.toml", "--data", synth_dataset, "--out", tmp_path / "x.json")
    assert command(monkeypatch, *arguments, *sets, "--limit", "1e-9") == 2
    assert "ended before the first training did" in capsys.readouterr().err and not trained
    assert command(monkeypatch, *arguments, *sets) == 0
    assert len(trained) == 5  # three candidates, of which two stay
    assert "3 of 3 candidates" in capsys.readouterr().out
    assert command(monkeypatch, *arguments, *sets) == 0 and len(trained) == 5


def test_a_training_that_the_limit_stops_is_not_counted(make, monkeypatch):
    stopped = clock.Race(1.0, False, True, False, None, [0.2], [1.0])
    monkeypatch.setattr(search, "train", lambda *rest: stopped)
    results = Results("search", None)
    search.successive_halving(make(), results, math.inf)
    assert not results.session.records
