"""The report on mixing: what it measures, and when it warns."""

import numpy as np
import pytest

from mim.data.order import Order
from mim.data.shards import Sample
from mim.data.shuffle import report

COUNTS = np.full(50, 100)


class Stored:
    """A dataset whose class of a sample is a function of its shard and row; counts what is read."""

    def __init__(self, label=None, folder=None):
        self.label, self.folder, self.read_rows = label, folder, []

    def read(self, shard, row):
        self.read_rows.append((shard, row))
        folder = f"{self.folder(shard, row)}/" if self.folder else ""
        return Sample(f"shard-{shard}.tar/{folder}{row}", b"", self.label(shard, row) if self.label else None)


def order(counts=COUNTS, **options):
    return Order("d", counts, 0, **options)


def by_shard(shard, row):
    return shard


def mixed(shard, row):
    return row % 5


def test_a_full_permutation_draws_from_as_many_shards_as_chance_allows():
    mixing = report(order(), Stored(), batch_size=50)
    assert mixing.shards_per_batch == pytest.approx(mixing.full_shuffle, rel=0.1)
    assert mixing.full_shuffle == pytest.approx(50 * (1 - 0.98**50))
    assert mixing.distance == pytest.approx(5000 * (1 - 0.5**0.5) / 50, rel=0.25)  # median of |x - y|
    assert mixing.together < 0.06


def test_one_lane_with_small_windows_keeps_neighbours_together():
    mixing = report(order(lanes=1, window=10), Stored(), batch_size=50)
    assert mixing.shards_per_batch < 3
    assert mixing.distance < 0.2
    assert mixing.together > 0.9


def test_more_lanes_draw_from_more_shards():
    found = [report(order(lanes=n, window=20), Stored(), batch_size=50).shards_per_batch for n in (1, 5, 25)]
    assert found == sorted(found)
    assert found[2] > 20


def test_sorted_shards_that_stay_together_are_warned_about_with_the_remedy():
    for stored, word in ((Stored(label=by_shard), "class"), (Stored(folder=by_shard), "folder")):
        line, warning = report(order(lanes=1, window=100), stored, batch_size=50).lines()
        assert line.startswith("order: 1 lane, windows of 100; a batch draws from ")
        assert warning.startswith(f"warning: the shards look sorted by {word}, ")
        assert "raise data.lanes or data.window" in warning


@pytest.mark.parametrize("stored", [Stored(label=mixed), Stored(folder=mixed), Stored(), Stored(label=lambda s, r: 0)])
def test_shards_that_are_not_sorted_are_not_warned_about(stored):
    assert len(report(order(lanes=1, window=100), stored, batch_size=50).lines()) == 1


def test_sorted_shards_under_a_full_permutation_are_not_warned_about():
    mixing = report(order(), Stored(label=by_shard), batch_size=50)
    assert mixing.sorted_by == "class"
    assert len(mixing.lines()) == 1
    assert mixing.lines()[0].startswith("order: a full permutation of 5000 images per epoch; ")


def test_few_samples_are_read_and_only_of_the_first_shards():
    stored, mine = Stored(label=by_shard), order(lanes=2, window=50)
    report(mine, stored, batch_size=40)
    assert 0 < len(stored.read_rows) <= 32
    assert {shard for shard, _ in stored.read_rows} <= set(mine.locate(range(40)).shard.tolist())


@pytest.mark.parametrize("counts", [[7], [1] * 7, [0, 3, 0, 1]])
@pytest.mark.parametrize("repeats", [1, 4])
def test_tiny_datasets_are_reported_too(counts, repeats):
    lines = report(order(np.array(counts), repeats=repeats), Stored(label=by_shard), batch_size=32).lines()
    assert lines[0].startswith("order: ")


def test_a_hundred_million_samples_are_reported_without_sorting_them(monkeypatch):
    sizes = []
    from mim.data import order as module

    honest = module.permutation
    monkeypatch.setattr(module, "permutation", lambda n, *name: sizes.append(n) or honest(n, *name))
    report(order(np.full(100_000, 1000)), Stored(label=by_shard), batch_size=256)
    assert max(sizes) == 100_000
    assert sizes.count(100_000) == 1


@pytest.mark.parametrize(
    ("lanes", "world", "told"), [(4, 1, False), (4, 2, False), (4, 3, True), (1, 3, False), (6, 4, False)]
)
def test_processes_that_share_no_factor_with_the_lanes_read_all_shards_and_are_told(lanes, world, told):
    mine = order(lanes=lanes, window=10)
    (line,) = report(mine, Stored(), batch_size=50, world=world).lines()
    assert line.endswith("; every process reads all shards") == told
    if lanes > 1:
        lanes_of = {rank: {slot % 5000 % lanes for slot in range(rank, 5000, world)} for rank in range(world)}
        assert all(len(found) == lanes for found in lanes_of.values()) == (told or world == 1)
