"""Which images a batch holds: the order, the shares of processes, the padding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlab.orders import epoch_order
from pipelines.base import BatchPlan, Shard

QUICK = settings(max_examples=100, deadline=None, database=None, derandomize=True)
SEEDS = st.integers(0, 2**31 - 1)
EPOCHS = st.integers(0, 10_000)


@QUICK
@given(images=st.integers(0, 3000), seed=SEEDS, epoch=EPOCHS)
def test_the_order_is_a_permutation_and_a_pure_function(images, seed, epoch):
    order = epoch_order(images, seed, epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(images))
    np.random.seed(epoch)  # it depends on no hidden state
    np.testing.assert_array_equal(epoch_order(images, seed, epoch), order)


@QUICK
@given(first=st.tuples(SEEDS, EPOCHS), second=st.tuples(SEEDS, EPOCHS))
def test_the_order_differs_by_seed_and_by_epoch(first, second):
    same = np.array_equal(epoch_order(500, *first), epoch_order(500, *second))
    assert same == (first == second)


def test_orders_of_neighbouring_seeds_and_epochs_are_unrelated():
    """Two unrelated permutations agree in one position on average."""
    pairs = [(seed, epoch) for seed in range(8) for epoch in range(8)]
    orders = [epoch_order(1000, *pair) for pair in pairs]
    agreeing = [
        np.count_nonzero(a == b) for i, a in enumerate(orders) for b in orders[:i]
    ]  # 2016 Poisson counts of mean 1
    assert abs(np.mean(agreeing) - 1) < 0.2
    assert max(agreeing) < 12


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_every_image_is_as_likely_at_every_position(seed):
    """Chi-square of 20 x 20 counts over 4000 epochs: 361 degrees of freedom, deviation 27."""
    counts = np.zeros((20, 20))
    for epoch in range(4000):
        counts[np.arange(20), epoch_order(20, seed, epoch)] += 1
    chi_square = ((counts - 200) ** 2 / 200).sum()
    assert 361 - 6 * 27 < chi_square < 361 + 6 * 27


def train_rows(images: int, batch: int, shard: Shard, seed: int, epoch: int, start: int = 0):
    """int64 [steps, b]; every image of a training batch counts."""
    plan = BatchPlan(images, batch, shard, seed, train=True)
    rows, mask = plan.rows(epoch, start)
    assert rows.dtype == np.int64 and mask.dtype == bool and mask.shape == rows.shape
    assert mask.all()
    assert len(rows) == plan.steps() - start
    return rows


def eval_plan(images: int, batch: int, shard: Shard) -> BatchPlan:
    return BatchPlan(images, batch, shard, seed=0, train=False)


@QUICK
@given(images=st.integers(1, 400), each=st.integers(1, 16), world=st.integers(1, 8))
def test_the_shares_of_all_processes_make_the_global_batch(images, each, world):
    batch, order = each * world, epoch_order(images, 3, 4)
    whole = train_rows(images, batch, Shard(), 3, 4)
    parts = [train_rows(images, batch, Shard(rank, world), 3, 4) for rank in range(world)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    np.testing.assert_array_equal(whole.reshape(-1), order[: images // batch * batch])
    assert {part.shape for part in parts} == {(images // batch, each)}


@QUICK
@given(images=st.integers(1, 300), batch=st.integers(1, 64), world=st.integers(1, 7))
def test_evaluation_takes_each_image_once_and_masks_padding(images, batch, world):
    shares = [eval_plan(images, batch, Shard(rank, world)).rows(0) for rank in range(world)]
    # One shape in every step, on every process.
    assert len({part.shape for share in shares for part in share}) == 1
    for rows, mask in shares:
        assert rows.dtype == np.int64 and mask.dtype == bool
        assert ((rows >= 0) & (rows < images)).all()
    by_step = [np.stack(parts, axis=1) for parts in zip(*shares, strict=True)]
    rows, mask = by_step
    assert rows[mask].tolist() == list(range(images))


@QUICK
@given(images=st.integers(1, 300), batch=st.integers(1, 64), world=st.integers(1, 7))
def test_every_process_takes_the_same_number_of_steps_and_none_is_empty(images, batch, world):
    plans = [eval_plan(images, batch, Shard(rank, world)) for rank in range(world)]
    assert len({plan.steps() for plan in plans}) == 1
    _, mask = plans[0].rows(0)
    assert len(mask) == plans[0].steps() and mask.any(axis=1).all()


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@QUICK
@given(
    images=st.integers(1, 400), batch=st.integers(1, 48), seed=SEEDS, epoch=EPOCHS, data=st.data()
)
def test_a_resumed_epoch_is_the_rest_of_the_whole_on_any_number_of_processes(
    images, batch, seed, epoch, data
):
    steps = images // batch
    whole = train_rows(images, batch, Shard(), seed, epoch)
    taken = whole.reshape(-1).tolist()
    assert len(taken) == len(set(taken)) == steps * batch
    start = data.draw(st.integers(0, steps))
    for world in divisors(batch):
        parts = [
            train_rows(images, batch, Shard(rank, world), seed, epoch, start)
            for rank in range(world)
        ]
        assert np.concatenate(parts, axis=1).tolist() == whole.tolist()[start:]
        assert BatchPlan(images, batch, Shard(0, world), seed, train=True).steps() == steps


@QUICK
@given(
    images=st.integers(1, 300), batch=st.integers(1, 64), world=st.integers(1, 7), data=st.data()
)
def test_a_resumed_evaluation_is_the_rest_of_the_whole(images, batch, world, data):
    plan = eval_plan(images, batch, Shard(data.draw(st.integers(0, world - 1)), world))
    start = data.draw(st.integers(0, plan.steps()))
    for whole, rest in zip(plan.rows(0), plan.rows(0, start), strict=True):
        assert rest.tolist() == whole.tolist()[start:]
