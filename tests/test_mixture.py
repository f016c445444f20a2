"""Several datasets as one: exact shares, and the same purity as a single one."""

import collections
import json
import types

import numpy as np
import pytest
from PIL import Image

from mim import build, train
from mim.config import ConfigError, typed
from mim.data import stream
from mim.data.augment import crop
from mim.data.make import make
from mim.data.mixture import BLOCK, Mixture, bad_samples, common_pixels, order_of, pooled, rounded_shares
from mim.data.order import Order
from mim.data.quarantine import Bad
from mim.data.shards import Dataset
from mim.data.stream import loader
from mim.watch import stopping
from tests import damage
from tests.tiny import write_recipe

SIZES = {"first": (23, 5), "second": (9, 4), "third": (14, 100)}  # images, images per shard
WEIGHTS = [0.5, 0.3, 0.2]


def mask_quarter(rng):
    return rng.permutation(12) < 3


def write_source(root, name, *, gray=False, classes="abc"):
    number, shard_size = SIZES[name]
    rng = np.random.default_rng(number)
    for i in range(number):
        path = root / f"{name}-in" / classes[i % len(classes)] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (16, 20) if gray else (16, 20, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
    make(root / f"{name}-in", root / name, labels_from_folders=True, shard_size=shard_size, workers=1)
    return root / name


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return [write_source(root, name) for name in SIZES]


@pytest.fixture(scope="module")
def mixed(folders):
    return Mixture([Dataset.open(folder) for folder in folders], WEIGHTS)


def batches(mixed, repeats=1, lanes=2, **options):
    order = order_of(mixed, seed=5, lanes=lanes, window=4, repeats=repeats)
    defaults = {"view": crop, "sizes": [(16, 24)], "mask": mask_quarter, "batch_size": 29, "num_steps": 3}
    return list(loader(mixed, order=order, **defaults | options))


def global_batches(mixed, world, **options):
    """Per step, the real rows of all ranks and the summed fingerprint."""
    ranks = [batches(mixed, rank=rank, world=world, **options) for rank in range(world)]
    steps = []
    for ours in zip(*ranks, strict=True):
        rows = collections.Counter()
        for batch in ours:
            for i in np.flatnonzero(batch["weight"].numpy()):
                contents = (batch["images"][i].numpy().tobytes(), batch["mask"][i].numpy().tobytes())
                rows[(batch["keys"][i], int(batch["noise"][i]), int(batch["labels"][i]), contents)] += 1
        steps.append((rows, sum(batch["fingerprint"] for batch in ours) % 2**63))
    return steps


def sources(order, positions):
    return np.searchsorted(order._first_shard, order.locate(positions).shard, side="right") - 1


# ---- shares --------------------------------------------------------------------------------------


def test_every_block_holds_each_share_exactly(mixed):
    order = order_of(mixed, seed=5)
    assert mixed.shares == [500, 300, 200]
    for block in (0, 1, 7):
        counts = np.bincount(sources(order, np.arange(block * BLOCK, (block + 1) * BLOCK)))
        assert counts.tolist() == [500, 300, 200]


def test_blocks_are_shuffled_each_in_its_own_way(mixed):
    order = order_of(mixed, seed=5)
    first, second = sources(order, np.arange(BLOCK)), sources(order, np.arange(BLOCK, 2 * BLOCK))
    assert first.tolist() != second.tolist()
    halves = np.bincount(first[:500], minlength=3)
    assert (np.abs(halves - [250, 150, 100]) < 40).all()


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([1], [1000]),
        ([2, 2], [500, 500]),
        ([1, 1, 1], [334, 333, 333]),
        ([0.7, 0.3], [700, 300]),
        ([1, 999], [1, 999]),
        ([1e-9, 1], [0, 1000]),
        ([0.1] * 7, [143] * 6 + [142]),
    ],
)
def test_shares_are_rounded_by_largest_remainder(weights, shares):
    assert rounded_shares(weights) == shares


@pytest.mark.parametrize("repeats", [1, 4])
def test_each_source_is_passed_in_its_own_order_once_per_epoch(mixed, repeats):
    order = order_of(mixed, seed=5, lanes=2, window=4, repeats=repeats)
    slots = order.locate(np.arange(3 * BLOCK * repeats))
    owner = np.searchsorted(order._first_shard, slots.shard, side="right") - 1
    for number, dataset in enumerate(mixed.datasets):
        mine = owner == number
        alone = Order(dataset.id, dataset.counts, 5, lanes=2, window=4, repeats=repeats).locate(range(mine.sum()))
        assert (slots.sample[mine] - order._first_sample[number]).tolist() == alone.sample.tolist()
        assert slots.epoch[mine].tolist() == alone.epoch.tolist()
        assert slots.row[mine].tolist() == alone.row.tolist()
        assert slots.draw[mine].tolist() == alone.draw.tolist()
        whole = mine.sum() // (len(dataset) * repeats)
        assert whole > 5
        for epoch in range(whole):
            seen = collections.Counter(slots.sample[mine][slots.epoch[mine] == epoch].tolist())
            assert len(seen) == len(dataset)
            assert set(seen.values()) == {repeats}


def test_a_position_leads_to_the_same_sample_whatever_was_asked_before(mixed):
    forward = order_of(mixed, seed=5).locate(np.arange(2500))
    jumping = order_of(mixed, seed=5)
    for position in (2499, 3, 1000, 999, 1700):
        assert [int(a[0]) for a in jumping.locate([position])] == [int(a[position]) for a in forward]


def test_find_tells_where_locate_found_a_sample(mixed):
    order = order_of(mixed, seed=5, lanes=2, window=4)
    samples = np.arange(order.num_samples)
    for epoch in (0, 60):
        found = order.locate(order.find(samples, epoch))
        assert found.sample.tolist() == samples.tolist()
        assert set(found.epoch.tolist()) == {epoch}


def test_the_mixture_is_frozen():
    """Runs are resumed by later versions: these numbers must never change."""

    class Source:
        def __init__(self, name, counts):
            self.id, self.path, self.channels = name, name, 3
            self.classes = self.pixel_classes = None
            self.counts, self.mean, self.std = np.array(counts), [0.5] * 3, [0.2] * 3
            self.dtype, self.range, self.gray, self.remote_shards, self.cache = "uint8", [[0, 255]] * 3, None, {}, None

        def __len__(self):
            return int(self.counts.sum())

    frozen = order_of(Mixture([Source("a", [7, 5]), Source("b", [20])], [1, 3]), seed=3)
    assert frozen.locate(range(12)).sample.tolist() == [9, 7, 1, 23, 22, 21, 6, 15, 24, 30, 14, 29]


# ---- purity --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("repeats", [1, 4])
def test_pixels_and_masks_are_the_same_for_any_world_and_workers(mixed, repeats):
    expected = global_batches(mixed, 1, repeats=repeats)
    for world, workers in ((2, 0), (3, 1), (5, 0), (8, 0), (24, 0), (1, 3)):
        assert global_batches(mixed, world, workers=workers, repeats=repeats) == expected, (world, workers)


@pytest.mark.parametrize("start", [1, 2, 40])
def test_any_start_continues_the_same_stream(mixed, start):
    whole = global_batches(mixed, 1, num_steps=start + 2)
    assert global_batches(mixed, 2, position=start * 29, num_steps=2) == whole[start:]


def test_bad_samples_of_a_source_are_substituted_from_its_own_window(folders, tmp_path):
    root = write_source(tmp_path, "second")
    damaged = damage.spoil_images(root, [2, 5])
    mixed = Mixture([Dataset.open(folders[0]), damaged], [1, 1])
    found = batches(mixed, num_steps=4)
    met = {entry["sample"] for batch in found for entry in batch["bad"]}
    assert met == {23 + 2, 23 + 5}
    assert all(entry["substitute"].startswith(f"{root}/") for batch in found for entry in batch["bad"])
    damage.quarantine(damaged, [2, 5])
    known = bad_samples(mixed)
    assert sorted(known) == [25, 28]
    assert known[25] == Bad(f"{root}/{damaged.read(0, 2).key}", "image: truncated")
    again = batches(mixed, num_steps=4, known=known)
    assert [b["images"].numpy().tobytes() for b in again] == [b["images"].numpy().tobytes() for b in found]
    assert [b["fingerprint"] for b in again] == [b["fingerprint"] for b in found]


# ---- as a dataset --------------------------------------------------------------------------------


def test_keys_name_the_source_of_each_row(mixed, folders):
    (batch,) = batches(mixed, num_steps=1)
    assert {key.rpartition("/shard-")[0] for key in batch["keys"]} == {str(folder) for folder in folders}


def test_the_identity_covers_datasets_and_shares_and_nothing_else(folders):
    opened = [Dataset.open(folder) for folder in folders]
    ids = [
        Mixture(opened, WEIGHTS).id,
        Mixture(opened, [0.5, 0.2, 0.3]).id,
        Mixture(opened[:2], [0.5, 0.5]).id,
        Mixture(opened[1::-1], [0.5, 0.5]).id,
    ]
    assert len(set(ids)) == 4
    assert Mixture(opened, [5, 3, 2]).id == ids[0]


def test_statistics_are_pooled_by_share():
    pixels = [np.array([0.1, 0.3]), np.array([0.2, 0.8])]
    drawn = np.concatenate([np.tile(pixels[0], 3), pixels[1]])  # three to one
    mean, std = pooled([(p.mean(), p.std()) for p in pixels], [750, 250])
    assert mean == pytest.approx(drawn.mean())
    assert std == pytest.approx(drawn.std(), abs=1e-6)


def test_sources_share_the_number_of_channels_and_the_type_of_pixels():
    assert common_pixels([_source(1), _source(3)]) == (3, "uint8")
    with pytest.raises(ConfigError, match="has 2 channels and another source has 3"):
        common_pixels([_source(2), _source(3)])
    with pytest.raises(ConfigError, match=r"holds uint16 and .* uint8"):
        common_pixels([_source(3), _source(3, "uint16")])


def _source(channels, dtype="uint8"):
    return types.SimpleNamespace(path="x", channels=channels, dtype=dtype)


def test_labels_are_kept_when_all_sources_have_the_same_classes(mixed, folders, tmp_path):
    assert mixed.classes == ["a", "b", "c"]
    other = Mixture([Dataset.open(folders[0]), Dataset.open(write_source(tmp_path, "second", classes="xy"))], [1, 1])
    assert other.classes is None
    assert other.read(0, 0).label is None
    (batch,) = batches(other, num_steps=1)
    assert "labels" not in batch


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_that_is_no_positive_number_is_refused(weight):
    with pytest.raises(ConfigError, match="weights are numbers above 0"):
        rounded_shares([1, weight])


def test_a_weight_that_rounds_to_nothing_and_a_dataset_given_twice_are_refused(folders):
    first, second = (Dataset.open(folder) for folder in folders[:2])
    with pytest.raises(ConfigError, match=r"the weight of .*second is below 1/2000 of the sum"):
        Mixture([first, second], [1, 1e-6])
    with pytest.raises(ConfigError, match=r"names .*first twice; give it once"):
        Mixture([first, first], [1, 1])


# ---- recipes and runs ----------------------------------------------------------------------------


def test_exactly_one_of_path_and_sources_is_given():
    one = [{"path": "x", "weight": 1}]
    assert typed(stream.Config, {"sources": one}, "data").sources[0].weight == 1.0
    with pytest.raises(ConfigError, match=r"data\.path and data\.sources are both given"):
        typed(stream.Config, {"path": "x", "sources": one}, "data")
    with pytest.raises(ConfigError, match=r"beside data\.sources give data\.val_path"):
        typed(stream.Config, {"sources": one, "val_ratio": 0.1}, "data")
    with pytest.raises(ConfigError, match=r"data\.path is missing"):
        typed(stream.Config, {"sources": []}, "data")
    with pytest.raises(ConfigError, match="weigth is not a known key"):
        typed(stream.Config, {"sources": [{"path": "x", "weigth": 1}]}, "data")


def test_sources_may_be_folders_of_images_and_only_val_path_holds_out(folders, tmp_path):
    images = folders[1].parent / "second-in"
    sections = {"data": {"sources": [{"path": str(folders[0]), "weight": 3}, {"path": str(images), "weight": 1}]},
                "train": {"cache_dir": str(tmp_path)}}  # fmt: skip
    training, val = build.open_data(sections)
    assert training.shares == [750, 250]
    assert len(training) == 32
    assert val is None
    sections["data"]["val_path"] = str(folders[2])
    assert build.open_data(sections)[1].path == folders[2]


@pytest.fixture
def recipe(folders, tmp_path):
    sources = [{"path": str(f), "weight": w} for f, w in zip(folders, WEIGHTS, strict=True)]
    data = {"sources": sources, "val_path": str(folders[1])}
    return write_recipe(tmp_path / "mae.yaml", data, "3 epochs", evals={"knn": {"every": "23 steps", "k": 3}})


def logged(folder):
    timing = ("images_per_s", "data_wait", "eta_s")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in timing} for line in lines if line["event"] != "resumed"]


def test_a_run_on_a_mixture_resumes_bit_for_bit_and_tells_what_an_epoch_is(recipe, tmp_path, capsys):
    assert train.main(recipe, [f"train.run={tmp_path / 'whole'}"]) == stopping.DONE
    said = capsys.readouterr().err
    assert "50.0% from" in said
    assert "23 images, 1 epoch of it = 7.7 steps, run = 3.0 epochs of it" in said
    assert "9 images, 1 epoch of it = 5.0 steps, run = 4.6 epochs of it" in said
    stopped = [f"train.run={tmp_path / 'stopped'}"]
    assert train.main(recipe, stopped, stop=lambda step: step == 13) == stopping.STOPPED
    assert train.main(recipe, [*stopped, "train.workers=1"]) == stopping.DONE
    assert logged(tmp_path / "stopped") == logged(tmp_path / "whole")
    assert logged(tmp_path / "whole")[-1]["eval"] == "knn"


def test_a_run_with_other_weights_is_another_experiment(recipe, folders, tmp_path):
    options = [f"train.run={tmp_path / 'run'}"]
    train.main(recipe, options, stop=lambda step: step == 2)
    changed = json.dumps([{"path": str(f), "weight": 1} for f in folders])
    with pytest.raises(ConfigError, match="dataset_id"):
        train.main(recipe, [*options, f"data.sources={changed}"])
    same = json.dumps([{"path": str(f), "weight": 10 * w} for f, w in zip(folders, WEIGHTS, strict=True)])
    assert train.main(recipe, [*options, f"data.sources={same}"]) == stopping.DONE
