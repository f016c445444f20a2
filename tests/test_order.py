import collections

import numpy as np
import pytest

from mim.config import ConfigError
from mim.data import order as order_module
from mim.data.order import Order, Plan, permutation, rng, share

COUNTS = (7, 1, 0, 12, 5)  # uneven, one empty: 25 samples


def order(**changes):
    return Order(**{"dataset_id": "d", "counts": COUNTS, "seed": 3} | changes)


def rows(slots):
    return list(zip(*(array.tolist() for array in slots), strict=True))


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize(("lanes", "window"), [(None, None), (1, 4), (3, 4), (4, 100), (25, 1)])
def test_every_sample_comes_once_per_epoch(lanes, window, repeats):
    slots = order(lanes=lanes, window=window, repeats=repeats).locate(range(3 * 25 * repeats))
    for epoch in range(3):
        seen = slots.sample[slots.epoch == epoch]
        assert collections.Counter(seen.tolist()) == dict.fromkeys(range(25), repeats)
    assert (slots.row < np.array(COUNTS)[slots.shard]).all()
    assert (slots.draw == np.arange(len(slots.draw)) % repeats).all()


@pytest.mark.parametrize(("lanes", "window"), [(None, None), (3, 4)])
def test_a_position_leads_to_the_same_sample_whatever_was_asked_before(lanes, window):
    forward = rows(order(lanes=lanes, window=window).locate(range(200)))
    jumping = order(lanes=lanes, window=window)
    for position in permutation(200, "jumps"):
        assert rows(jumping.locate([position])) == [forward[position]]


@pytest.mark.parametrize(("lanes", "window"), [(None, None), (1, 4), (3, 4), (25, 1)])
@pytest.mark.parametrize("epoch", [0, 2])
def test_find_tells_where_locate_found_a_sample(lanes, window, epoch):
    mine = order(lanes=lanes, window=window)
    slots = mine.find(np.arange(25), epoch)
    assert mine.locate(slots).sample.tolist() == list(range(25))
    assert set(mine.locate(slots).epoch.tolist()) == {epoch}


def test_epochs_and_seeds_differ():
    samples = order().locate(range(50)).sample
    assert samples[:25].tolist() != samples[25:].tolist()
    assert samples.tolist() != order(seed=4).locate(range(50)).sample.tolist()
    assert samples.tolist() != order(dataset_id="e").locate(range(50)).sample.tolist()


def test_a_window_bounds_how_far_a_sample_moves():
    whole, windowed = order(counts=[1000]), order(counts=[1000], lanes=1, window=10)
    distance = np.abs(windowed.locate(range(1000)).row - np.arange(1000))
    assert distance.max() < 10
    assert np.abs(whole.locate(range(1000)).row - np.arange(1000)).max() > 500


def test_the_order_is_frozen():
    """Runs are resumed by later versions: these numbers must never change."""
    assert order().locate(range(6)).sample.tolist() == [15, 20, 18, 4, 13, 14]
    assert order(lanes=3, window=4).locate(range(6)).sample.tolist() == [7, 22, 15, 1, 23, 13]
    assert permutation(6, "a", 1).tolist() == [1, 3, 4, 2, 5, 0]


def test_large_datasets_get_lanes_and_windows():
    large = order(counts=[10**7])
    assert (large.lanes, large.window) == (64, 2048)
    assert len(set(large.locate(range(128)).sample.tolist())) == 128


def test_identity_names_everything_that_changes_the_order():
    changed = [
        order(),
        order(seed=4),
        order(lanes=2),
        order(window=3),
        order(repeats=2),
        order(dataset_id="e"),
        order(counts=[25, 1]),
    ]
    identities = [tuple(o.identity().items()) for o in changed]
    assert len(set(identities)) == len(identities)


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_ranks_and_micro_batches_partition_each_global_batch(world, micro_batches, repeats):
    start, size, steps = 5, 11, 7
    seen = collections.defaultdict(list)
    for rank in range(world):
        plan = Plan(repeats, size, rank, world, micro_batches, start, steps)
        micros = list(plan)
        assert len(micros) == len(plan) == steps * micro_batches
        assert {micro.size for micro in micros} == {plan.micro_size}
        for i, micro in enumerate(micros):
            step = i // micro_batches
            assert len(micro.positions) <= micro.size
            assert micro.position == start + (step + 1) * size
            seen[step] += micro.positions.tolist()
    for step in range(steps):
        assert sorted(seen[step]) == list(range(start + step * size, start + (step + 1) * size))


@pytest.mark.parametrize("repeats", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_share_is_the_largest_number_of_rows_of_any_rank(world, repeats):
    for size in range(1, 30):
        positions = np.arange(size) + np.arange(0, 2 * size * world * repeats, size)[:, None]
        owner = (positions // repeats) % world
        assert share(size, world, repeats) == max((owner == rank).sum(1).max() for rank in range(world))


def test_draws_of_a_sample_stay_together_on_one_rank():
    for micro in Plan(4, 32, 1, 2, 1, 0, 3):
        assert (micro.positions.reshape(-1, 4) // 4 == micro.positions[::4, None] // 4).all()


def test_too_small_a_batch_is_refused_with_the_remedy():
    with pytest.raises(ConfigError, match=r"optim\.batch_size=4 is smaller than 3 processes x 2 .* use at least 6"):
        Plan(1, batch_size=4, world=3, micro_batches=2)


@pytest.mark.parametrize("wrong", [{"lanes": 26}, {"lanes": 0}, {"window": 0}, {"repeats": 0}, {"counts": [0]}])
def test_impossible_orders_are_refused(wrong):
    with pytest.raises(ConfigError):
        order(**wrong)


def test_named_generators_agree_and_differ_by_every_part_of_the_name():
    name = ("view", 1, 2, 3, 4)
    assert rng(*name).random() == rng(*name).random()
    others = [
        ("mask", 1, 2, 3, 4),
        ("view", 0, 2, 3, 4),
        ("view", 1, 0, 3, 4),
        ("view", 1, 2, 0, 4),
        ("view", 1, 2, 3, 0),
    ]
    assert len({rng(*other).random() for other in [name, *others]}) == 6


# ---- any world, any start ------------------------------------------------------------------------

WORLDS = (*range(1, 9), 24)


def global_rows(counts, world, *, size, start=0, steps=6, **changes):
    """Per step, (position, sample, epoch, draw) of all ranks, by position."""
    found = [[] for _ in range(steps)]
    for rank in range(world):
        mine = order(counts=counts, **changes)  # each process has its own
        plan = Plan(mine.repeats, size, rank, world, position=start, num_steps=steps)
        for step, micro in enumerate(plan):
            slots = mine.locate(micro.positions)
            found[step] += zip(micro.positions.tolist(), *(a.tolist() for a in (slots.sample, slots.epoch, slots.draw)),
                               strict=True)  # fmt: skip
    return [sorted(rows) for rows in found]


@pytest.mark.parametrize("repeats", [1, 4])
@pytest.mark.parametrize("counts", [COUNTS, [25], [1] * 25], ids=["uneven", "one shard", "shards of one"])
@pytest.mark.parametrize(("size", "start"), [(24, 0), (29, 0), (31, 77), (100, 12345)])
def test_global_batches_are_the_same_for_worlds_of_1_to_8_and_24(counts, size, start, repeats):
    options = {"size": size, "start": start, "repeats": repeats, "lanes": 3, "window": 4}
    expected = global_rows(counts, 1, **options)
    assert [[row[0] for row in rows] for rows in expected] == [
        list(range(start + step * size, start + (step + 1) * size)) for step in range(6)
    ]
    for world in WORLDS[1:]:
        assert global_rows(counts, world, **options) == expected, world


@pytest.mark.parametrize("world", WORLDS)
def test_the_ranks_together_see_every_sample_once_per_epoch(world):
    seen = collections.Counter()
    for rows in global_rows(COUNTS, world, size=25, steps=4, lanes=2, window=6):
        assert {epoch for _, _, epoch, _ in rows} == {rows[0][2]}
        seen.update(sample for _, sample, _, _ in rows)
    assert seen == dict.fromkeys(range(25), 4)


def test_a_cold_seek_among_100_million_samples_sorts_the_shards_and_the_windows_it_needs(monkeypatch):
    """100,000 uneven shards; the first batch after a resume deep in the third epoch."""
    counts = 600 + np.arange(100_000) % 801  # 100 million
    cold, sizes = order(counts=counts), []
    assert cold.num_samples > 99_000_000
    honest = order_module.permutation
    monkeypatch.setattr(order_module, "permutation", lambda n, *name: sizes.append(n) or honest(n, *name))
    slots = cold.locate(range(2 * cold.num_samples + 91_234_567, 2 * cold.num_samples + 91_234_567 + 1024))
    assert sorted(set(sizes)) == [2048, len(counts)]
    assert sizes.count(len(counts)) == 1
    assert len(sizes) - 1 <= 2 * cold.lanes
    assert (slots.row < counts[slots.shard]).all()
    assert len(set(slots.sample.tolist())) == 1024


# ---- substitutes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_substitute_is_another_sample_of_the_window_and_the_same_for_every_draw(repeats):
    mine = order(lanes=2, window=4, repeats=repeats)
    windows = collections.defaultdict(set)
    for slot, sample in enumerate(mine.locate(range(0, 25 * repeats, repeats)).sample.tolist()):
        windows[slot % 2, slot // 2 // 4].add(sample)
    for slot in range(25):
        members = windows[slot % 2, slot // 2 // 4]
        own = int(mine.locate([slot * repeats]).sample[0])
        for attempt in range(1, 9):
            picks = {mine.substitute(slot * repeats + draw, attempt) for draw in range(repeats)}
            assert len(picks) == 1
            (pick,) = picks
            assert pick.sample in members - {own} or len(members) == 1
            assert mine._first_sample[pick.shard] + pick.row == pick.sample


def test_substitutes_are_frozen_and_differ_by_epoch_and_attempt():
    """Runs are resumed by later versions: these numbers must never change."""
    mine = order()
    assert [mine.substitute(3, attempt).sample for attempt in (1, 2, 3)] == [12, 8, 7]
    assert len({mine.substitute(3 + 25 * epoch, 1).sample for epoch in range(8)}) > 1
