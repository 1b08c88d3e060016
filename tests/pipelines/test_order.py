"""Which images a batch holds: order, shares of processes, padding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.base import Schedule, Shard, epoch_order, eval_rows, eval_steps, train_rows

QUICK = settings(max_examples=100, deadline=None, database=None, derandomize=True)
SEEDS = st.integers(0, 2**31 - 1)
EPOCHS = st.integers(0, 10_000)


@QUICK
@given(images=st.integers(0, 3000), seed=SEEDS, epoch=EPOCHS)
def test_order_is_a_permutation_and_a_pure_function(images, seed, epoch):
    order = epoch_order(images, seed, epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(images))
    np.random.seed(epoch)  # no hidden state takes part
    np.testing.assert_array_equal(epoch_order(images, seed, epoch), order)


@QUICK
@given(first=st.tuples(SEEDS, EPOCHS), second=st.tuples(SEEDS, EPOCHS))
def test_order_differs_by_seed_and_by_epoch(first, second):
    same = np.array_equal(epoch_order(500, *first), epoch_order(500, *second))
    assert same == (first == second)


def test_orders_of_neighbouring_seeds_and_epochs_are_unrelated():
    """Of two unrelated permutations, about one position holds the same image in both."""
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


@QUICK
@given(
    images=st.integers(1, 400),
    each=st.integers(1, 16),
    world=st.integers(1, 8),
    data=st.data(),
)
def test_shares_of_all_processes_make_the_one_global_batch(images, each, world, data):
    batch = each * world
    order = epoch_order(images, 3, 4)
    step = data.draw(st.integers(0, max(0, images // batch - 1)))
    whole = train_rows(order, step, batch, Shard())
    parts = [train_rows(order, step, batch, Shard(rank, world)) for rank in range(world)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(whole, order[step * batch :][:batch])
    if images >= batch:
        assert {len(part) for part in parts} == {each}


@QUICK
@given(images=st.integers(1, 300), batch=st.integers(1, 64), world=st.integers(1, 7))
def test_evaluation_takes_each_image_once_and_masks_padding(images, batch, world):
    seen, sizes = [], set()
    for step in range(eval_steps(images, batch, Shard(0, world))):
        for rank in range(world):
            rows, mask = eval_rows(images, step, batch, Shard(rank, world))
            assert mask.dtype == bool
            assert ((rows >= 0) & (rows < images)).all()
            sizes.add((len(rows), len(mask)))
            seen += rows[mask].tolist()
    assert seen == list(range(images))
    assert len(sizes) == 1  # one shape in every step, on every process


@QUICK
@given(images=st.integers(1, 300), batch=st.integers(1, 64), world=st.integers(1, 7))
def test_every_process_makes_the_same_number_of_steps_and_none_is_empty(images, batch, world):
    steps = {eval_steps(images, batch, Shard(rank, world)) for rank in range(world)}
    assert len(steps) == 1
    _, mask = eval_rows(images, steps.pop() - 1, batch, Shard(0, world))
    assert mask.any()


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@QUICK
@given(
    images=st.integers(1, 400), batch=st.integers(1, 48), seed=SEEDS, epoch=EPOCHS, data=st.data()
)
def test_resumed_epoch_is_the_rest_of_the_whole_on_any_number_of_processes(
    images, batch, seed, epoch, data
):
    steps = images // batch
    order = epoch_order(images, seed, epoch)
    whole = [train_rows(order, step, batch, Shard()).tolist() for step in range(steps)]
    taken = [row for rows in whole for row in rows]
    assert len(taken) == len(set(taken)) == steps * batch
    start = data.draw(st.integers(0, steps))
    for world in divisors(batch):
        shards = [Shard(rank, world) for rank in range(world)]
        fresh = epoch_order(images, seed, epoch)
        assert [
            [row for shard in shards for row in train_rows(fresh, step, batch, shard).tolist()]
            for step in range(start, steps)
        ] == whole[start:]
        for shard in shards:
            schedule = Schedule(images, batch, shard, seed, train=True)
            all_rows, _ = schedule.rows(epoch, 0)
            rows, mask = schedule.rows(epoch, start)
            assert schedule.steps() == steps
            assert rows.tolist() == all_rows.tolist()[start:]
            assert mask.shape == rows.shape and mask.all()


@QUICK
@given(
    images=st.integers(1, 300), batch=st.integers(1, 64), world=st.integers(1, 7), data=st.data()
)
def test_resumed_evaluation_is_the_rest_of_the_whole(images, batch, world, data):
    shard = Shard(data.draw(st.integers(0, world - 1)), world)
    schedule = Schedule(images, batch, shard, seed=0, train=False)
    start = data.draw(st.integers(0, schedule.steps()))
    for whole, rest in zip(schedule.rows(0, 0), schedule.rows(0, start), strict=True):
        assert rest.tolist() == whole.tolist()[start:]
