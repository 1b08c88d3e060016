"""Which images a batch holds: the order, the shares of processes, the padding."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastlab.orders import epoch_order
from pipelines.base import BatchPlan, Shard
from pipelines.windows import WindowedOrder

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


def windowed(sizes: list[int], window: int, lanes: int = 1) -> WindowedOrder:
    """Shards whose images lie in an order of their own, as the converter mixes them."""
    rows = epoch_order(sum(sizes), 1, 1)
    return WindowedOrder(rows, np.array(sizes), window, lanes)


def shards_of(order: WindowedOrder, rows: np.ndarray) -> np.ndarray:
    """The shard of each image in `rows`."""
    shard = np.empty(len(order.rows), dtype=np.int64)
    shard[order.rows] = np.repeat(np.arange(len(order.sizes)), order.sizes)
    return shard[rows]


SHARD_SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=20)


@QUICK
@given(
    sizes=SHARD_SIZES,
    window=st.integers(1, 8),
    lanes=st.integers(1, 4),
    each=st.integers(1, 4),
    seed=SEEDS,
    epoch=EPOCHS,
)
def test_a_windowed_order_is_a_permutation_and_a_pure_function(
    sizes, window, lanes, each, seed, epoch
):
    order = windowed(sizes, window, lanes)
    assume(sum(sizes) >= lanes * each)
    rows = order.epoch(seed, epoch, lanes * each)
    assert rows.dtype == np.int64 and sorted(rows.tolist()) == list(range(sum(sizes)))
    np.testing.assert_array_equal(order.epoch(seed, epoch, lanes * each), rows)


@QUICK
@given(sizes=SHARD_SIZES, window=st.integers(1, 8), seed=SEEDS, epoch=EPOCHS)
def test_the_images_of_a_window_come_before_those_of_other_shards(sizes, window, seed, epoch):
    order = windowed(sizes, window)
    shards = shards_of(order, order.epoch(seed, epoch, 1)).tolist()
    sequence = {shard: sizes[shard] for shard in dict.fromkeys(shards)}
    assert len(sequence) == len(sizes)
    for _ in range(0, len(sizes), window):
        # A shard is complete before any beyond its window begins.
        taken = []
        while len(taken) < window and shards:
            taken += [shards[0]] if shards[0] not in taken else []
            head = [shard for shard in shards if shard in taken]
            shards = [shard for shard in shards if shard not in taken]
            assert head
        assert not set(taken) & set(shards)


@QUICK
@given(
    sizes=st.lists(st.integers(5, 30), min_size=4, max_size=20),
    window=st.integers(1, 4),
    lanes=st.sampled_from([2, 4]),
    seed=SEEDS,
    epoch=EPOCHS,
)
def test_ranks_with_their_own_lanes_share_only_the_shard_at_the_cut(
    sizes, window, lanes, seed, epoch
):
    order = windowed(sizes, window, lanes)
    plans = [
        BatchPlan(sum(sizes), lanes * 2, Shard(rank, 2), seed, True, order) for rank in range(2)
    ]
    read = [set(shards_of(order, plan.rows(epoch)[0]).ravel().tolist()) for plan in plans]
    assert len(read[0] & read[1]) <= 1


def test_equal_shards_are_each_read_by_one_rank():
    order = windowed([25] * 16, 2, lanes=4)
    for epoch in range(20):
        plans = [BatchPlan(400, 20, Shard(rank, 4), 3, True, order) for rank in range(4)]
        read = [np.unique(shards_of(order, plan.rows(epoch)[0])) for plan in plans]
        assert sorted(np.concatenate(read).tolist()) == list(range(16))


def test_the_batches_of_lanes_do_not_depend_on_the_number_of_ranks():
    order = windowed([11, 8, 9, 14, 3, 20], 2, lanes=2)
    whole, _ = BatchPlan(65, 12, Shard(), 3, True, order).rows(1)
    for world in (2, 3, 4):
        shares = [
            BatchPlan(65, 12, Shard(rank, world), 3, True, order).rows(1, 2)[0]
            for rank in range(world)
        ]
        np.testing.assert_array_equal(np.concatenate(shares, axis=1), whole[2:])


def test_the_images_left_over_differ_by_epoch():
    order = windowed([11] * 10, 3)
    left = [order.epoch(0, epoch, 30)[90:].tolist() for epoch in range(5)]
    assert len({tuple(each) for each in left}) == 5


def test_evaluation_takes_the_images_of_one_shard_after_another():
    order = windowed([10, 20, 7], 1)
    rows, mask = BatchPlan(37, 8, Shard(), 0, False, order).rows(0)
    assert rows[mask].tolist() == order.rows.tolist() and mask.sum() == 37


MIXED = WindowedOrder(epoch_order(19_200, 9, 9), np.full(96, 200), 8, 1)
"""96 shards, filled at random as the converter fills them, in 12 windows."""


def test_a_batch_of_a_window_holds_as_many_classes_as_one_of_a_full_shuffle():
    """Of 100 classes, 64 images drawn at random hold 100 (1 - 0.99^64) = 47.4 on average."""
    labels = np.arange(19_200) % 100
    batches = np.concatenate([MIXED.epoch(0, epoch, 64).reshape(-1, 64) for epoch in range(4)])
    assert abs(np.mean([len(set(labels[batch])) for batch in batches]) - 47.4) < 0.3


def test_pairs_of_a_batch_meet_again_in_the_next_epoch_as_often_as_their_windows_do():
    """A window holds 8 shards and 32 batches of 50. Two images of one shard are in one window
    again for certain, two of different shards with a probability of 7 in 95. So of the 1225 pairs
    in a batch, 7.2 share one of the next epoch too; with a full shuffle, 3.2."""
    expected = 1225 * (199 / 1599 + 1400 / 1599 * 7 / 95) / 32
    meeting = []
    for epoch in range(6):
        one, other = (MIXED.epoch(0, each, 50).reshape(-1, 50) for each in (epoch, epoch + 1))
        batch = np.empty(19_200, dtype=np.int64)
        batch[other] = np.arange(384)[:, None]
        counts = [np.bincount(batch[rows]) for rows in one]
        meeting += [(count * (count - 1) / 2).sum() for count in counts]
    assert abs(np.mean(meeting) - expected) < 0.5
