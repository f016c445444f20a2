import copy
import functools
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from mim.config import ConfigError
from mim.contracts import DataError
from mim.data import jpeg, stages, stream
from mim.data.augment import center, crop, multi_crop
from mim.data.decode import BadImage, open_image
from mim.data.jitter import jitter_
from mim.data.make import make
from mim.data.order import Order
from mim.data.shards import Dataset
from mim.data.store import Store
from mim.data.stream import evaluate, loader, to_device

SIZES = [(16, 24), (8, 12)]


def mask_quarter(rng):
    return rng.permutation(12) < 3


def mask_ragged(rng):
    return rng.random(12) < 0.5


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """23 noise images in 3 classes and 4 uneven shards."""
    root = tmp_path_factory.mktemp("stream")
    rng = np.random.default_rng(0)
    for i in range(23):
        path = root / "in" / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i, 40, 3), dtype=np.uint8)).save(path)
    make(root / "in", root / "out", labels_from_folders=True, shard_size=7, workers=1)
    return Dataset.open(root / "out")


def order_of(dataset, **changes):
    return Order(dataset.id, dataset.counts, **{"seed": 5, "lanes": 2, "window": 5} | changes)


def batches(dataset, order=None, **options):
    defaults = {"view": crop, "sizes": SIZES, "mask": mask_quarter, "batch_size": 8, "num_steps": 6}
    return list(loader(dataset, order=order or order_of(dataset), **defaults | options))


def global_batches(dataset, world, micro_batches=1, **options):
    """Per step, the real rows of all ranks: {key and draw: contents}, and the summed fingerprint."""
    per_rank = [
        batches(dataset, rank=rank, world=world, micro_batches=micro_batches, **options) for rank in range(world)
    ]
    steps = []
    for step in range(options.get("num_steps", 6)):
        rows, fingerprint = {}, 0
        for ours in per_rank:
            for batch in ours[step * micro_batches : (step + 1) * micro_batches]:
                fingerprint = (fingerprint + batch["fingerprint"]) % 2**63
                for i in torch.nonzero(batch["weight"]).flatten().tolist():
                    name = (batch["keys"][i], int(batch["noise"][i]))
                    assert name not in rows
                    fields = ("images", "tokenizer_images", "mask", "labels")
                    rows[name] = tuple(batch[field][i].numpy().tobytes() for field in fields)
        steps.append((rows, fingerprint))
    return steps


@pytest.fixture(scope="module")
def expected(dataset):
    return global_batches(dataset, world=1)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores is the point
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_number_of_workers_changes_nothing(dataset, expected, workers):
    assert global_batches(dataset, world=1, workers=workers) == expected


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_global_batches_are_the_same_for_any_split(dataset, expected, world, micro_batches):
    assert global_batches(dataset, world, micro_batches) == expected


@pytest.mark.parametrize("start", [1, 2, 5])
@pytest.mark.parametrize(("world", "workers"), [(1, 1), (3, 0)])
def test_resuming_continues_the_same_stream(dataset, expected, start, world, workers):
    resumed = global_batches(dataset, world, position=start * 8, num_steps=6 - start, workers=workers)
    assert resumed == expected[start:]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_sample_comes_once_per_epoch(dataset, world):
    steps = global_batches(dataset, world, batch_size=23, num_steps=3)
    epochs = [sorted(key for key, _ in rows) for rows, _ in steps]
    assert epochs[0] == epochs[1] == epochs[2]
    assert len(set(epochs[0])) == 23


@pytest.fixture(scope="module")
def one_shard(dataset, tmp_path_factory):
    """The same kind of images in a single shard."""
    root = tmp_path_factory.mktemp("one")
    rng = np.random.default_rng(1)
    for i in range(13):
        path = root / "in" / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12 + i, 16, 3), dtype=np.uint8)).save(path)
    make(root / "in", root / "out", labels_from_folders=True, workers=1)
    found = Dataset.open(root / "out")
    assert len(found.counts) == 1
    return found


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("repeats", [1, 4])
@pytest.mark.parametrize("shards", ["uneven", "one"])
def test_pixels_and_masks_are_the_same_for_worlds_of_1_to_8_and_24(dataset, one_shard, shards, repeats):
    """Batches of 29: no world but 1 divides them. Starts anywhere; some worlds read with workers."""
    source = dataset if shards == "uneven" else one_shard
    options = {"batch_size": 29, "num_steps": 2, "position": 29 * 7, "order": order_of(source, repeats=repeats)}
    expected = global_batches(source, 1, **options)
    for world, workers in ((2, 0), (3, 0), (4, 1), (5, 0), (6, 0), (7, 0), (8, 0), (24, 0), (1, 3), (2, 2)):
        assert global_batches(source, world, workers=workers, **options) == expected, (world, workers)


def test_a_resume_reads_only_the_samples_of_its_own_batches(dataset, monkeypatch):
    read = []
    honest = Store.pread

    def counting(self, path, offset, size):
        read.append((path, offset, size))
        return honest(self, path, offset, size)

    monkeypatch.setattr(Store, "pread", counting)
    whole = batches(dataset, num_steps=6)
    before = list(read)
    assert len(set(before[:23])) == len(before[:23]) == 23  # an epoch: every sample once, not a byte twice
    read.clear()
    batches(dataset, position=4 * 8, num_steps=2)
    assert read == before[4 * 8 :]
    assert sum(size for _, _, size in read) == sum(size for _, _, size in before[4 * 8 :])
    assert len(read) == sum(len(batch["keys"]) for batch in whole[4:])


def test_epochs_and_draws_see_other_crops_and_masks(dataset):
    order = order_of(dataset, repeats=2)
    seen = {}
    for batch in batches(dataset, order, batch_size=46, num_steps=2):
        for key, image, mask, noise in zip(batch["keys"], batch["images"], batch["mask"], batch["noise"], strict=True):
            seen.setdefault(key, []).append((image.numpy().tobytes(), mask.numpy().tobytes(), int(noise)))
    for draws in seen.values():
        assert len({image for image, _, _ in draws}) == 4  # 2 epochs x 2 draws
        assert len({noise for _, _, noise in draws}) == 4
    assert sum(len({mask for _, mask, _ in draws}) for draws in seen.values()) > 3 * 23


def test_draws_of_a_sample_are_decoded_once(dataset, monkeypatch):
    decoded = []
    monkeypatch.setattr(stream, "open_image", lambda *options: decoded.append(1) or open_image(*options))
    batches(dataset, order_of(dataset, repeats=4), batch_size=8, num_steps=3)
    assert len(decoded) == 6


def test_the_decoding_of_a_box_counts_as_decoding(tmp_path, monkeypatch):
    """A clock that advances only while a JPEG is decoded, which the view asks for."""
    (tmp_path / "in").mkdir()
    Image.new("RGB", (60, 50), "red").save(tmp_path / "in/a.jpg")
    make(tmp_path / "in", tmp_path / "out", workers=1)
    jpegs, now, honest = Dataset.open(tmp_path / "out"), [0.0], jpeg.pixels

    def slow(*options):
        now[0] += 1
        return honest(*options)

    monkeypatch.setattr(jpeg, "pixels", slow)
    monkeypatch.setattr(stages.time, "perf_counter", lambda: now[0])
    order = Order(jpegs.id, jpegs.counts, seed=0)
    (batch,) = batches(jpegs, order, num_steps=1, batch_size=3)
    assert batch["seconds"] == {"read": 0, "decode": 3, "augment": 0, "collate": 0}


def test_batches_hold_what_the_contract_says(dataset):
    (batch,) = batches(dataset, num_steps=1, batch_size=8)
    assert batch["images"].shape == (8, 3, 16, 24)
    assert batch["tokenizer_images"].shape == (8, 3, 8, 12)
    assert batch["images"].dtype == torch.uint8
    assert batch["mask"].shape == (8, 12)
    assert batch["mask"].dtype == torch.bool
    assert batch["num_masked"] == 3
    assert batch["weight"].tolist() == [1.0] * 8
    assert batch["noise"].min() >= 0
    assert batch["position"] == 8
    assert batch["epoch"] == 0
    classes = [key.split("/")[1] for key in batch["keys"]]
    assert [dataset.classes[label] for label in batch["labels"]] == classes


def test_padding_copies_a_real_row_with_weight_zero(dataset):
    first, second = batches(dataset, batch_size=3, world=1, micro_batches=2, num_steps=1)
    assert first["weight"].tolist() == [1, 1]
    assert second["weight"].tolist() == [1, 0]
    for field in ("images", "tokenizer_images", "mask", "labels", "noise"):
        assert torch.equal(second[field][1], second[field][0])
    assert second["keys"][0] == second["keys"][1]
    assert first["position"] == second["position"] == 3


def test_a_rank_without_rows_gets_a_batch_of_weight_zero(dataset):
    order = order_of(dataset, repeats=4)
    ranks = [batches(dataset, order, batch_size=4, rank=rank, world=2, num_steps=2) for rank in range(2)]
    assert [[int(batch["weight"].sum()) for batch in rank] for rank in ranks] == [[4, 0], [0, 4]]
    assert ranks[1][0]["images"].shape == (4, 3, 16, 24)
    assert ranks[1][0]["fingerprint"] == 0


def test_masks_must_have_one_count(dataset):
    with pytest.raises(ValueError, match=r"masks .* to .* patches; one count is needed"):
        batches(dataset, mask=mask_ragged)


def test_optional_fields_are_left_out(dataset):
    (batch,) = batches(dataset, mask=None, sizes=SIZES[:1], num_steps=1)
    assert not {"mask", "num_masked", "tokenizer_images"} & set(batch)


def test_options_of_the_view_and_channels_reach_the_pixels(dataset):
    (batch,) = batches(dataset, view=functools.partial(crop, scale=[1.0, 1.0], hflip=0.0), channels=1, num_steps=1)
    assert batch["images"].shape == (8, 1, 16, 24)


def test_reading_data_leaves_the_models_random_state_alone(dataset):
    before = torch.random.get_rng_state()
    batches(dataset, workers=1, num_steps=1)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_cannot_be_decoded_is_named(dataset, monkeypatch, workers):
    monkeypatch.setattr("mim.data.decode.MAX_PIXELS", 10)
    with pytest.raises(DataError, match=r"shard-0000\d\.tar/.*pixels"):
        batches(dataset, workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_sample_once_in_the_order_of_the_lock(dataset, workers):
    found = list(evaluate(dataset, view=center, sizes=SIZES[:1], batch_size=8, workers=workers))
    assert [len(batch["keys"]) for batch in found] == [8, 8, 7]
    keys = list(itertools.chain.from_iterable(batch["keys"] for batch in found))
    assert keys == [dataset.read(s, r).key for s, count in enumerate(dataset.counts) for r in range(count)]
    assert all((batch["weight"] == 1).all() for batch in found)


def test_a_limited_evaluation_is_the_same_subset_with_the_same_pixels(dataset):
    whole = {}
    for batch in evaluate(dataset, view=crop, sizes=SIZES, batch_size=5, mask=mask_quarter):
        whole |= zip(batch["keys"], zip(batch["images"], batch["mask"], strict=True), strict=True)
    limited = list(evaluate(dataset, view=crop, sizes=SIZES, batch_size=4, mask=mask_quarter, limit=9))
    assert [len(batch["keys"]) for batch in limited] == [4, 4, 1]
    for batch in limited:
        for key, image, mask in zip(batch["keys"], batch["images"], batch["mask"], strict=True):
            assert torch.equal(image, whole[key][0])
            assert torch.equal(mask, whole[key][1])


def test_the_config_section_reads_sizes_as_number_or_pair():
    from mim.config import typed

    assert typed(stream.Config, {"path": "x"}).image_size == 224
    assert typed(stream.Config, {"path": "x", "image_size": [16, 24]}).image_size == [16, 24]


# ---- depth and range -----------------------------------------------------------------------------


def batch_of(images, limits):
    return {"images": images, "tokenizer_images": images[..., :2], "range": limits, "keys": ["a"]}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_the_default_range_divides_by_the_largest_value(dtype):
    white = torch.iinfo(dtype).max
    raw = torch.tensor([0, 1, 100, white]).to(dtype).view(1, 1, 2, 2)
    batch = to_device(batch_of(raw, [[0, white]]), torch.device("cpu"))
    assert torch.equal(batch["images"], raw.float() / white)
    assert batch["tokenizer_images"].dtype == torch.float32
    assert "range" not in batch


def test_a_range_per_channel_maps_and_clamps_each():
    raw = torch.tensor([[-1.0, 0.0, 5.0, 20.0], [100.0, 150.0, 200.0, 300.0]]).view(1, 2, 2, 2)
    batch = to_device(batch_of(raw, [[0, 10], [100, 200]]), torch.device("cpu"))
    expected = torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.0, 0.5, 1.0, 1.0]]).view(1, 2, 2, 2)
    assert torch.equal(batch["images"], expected)


def test_batches_carry_the_range_of_the_channels_that_are_read(dataset):
    (gray,) = batches(dataset, num_steps=1, channels=1)
    assert gray["range"] == [[0, 255]]
    mixed = copy.copy(dataset)
    mixed.range = [[0, 255], [0, 128], [0, 255]]
    with pytest.raises(ConfigError, match=r"data\.range differs by channel, but data\.channels=1"):
        batches(mixed, num_steps=1, channels=1)


def test_a_file_that_only_its_pixels_give_away_is_named(dataset, monkeypatch):
    """A box is decoded when the view asks for it, so that is where such a file is found."""

    def refuse(*_):
        raise BadImage("broken")

    with pytest.raises(DataError, match=r"shard-0000\d\.tar/.* cannot be decoded \(broken\)"):
        batches(dataset, view=refuse)


def test_jitter_reaches_training_batches_and_both_of_their_views_on_the_device(dataset):
    (plain,) = batches(dataset, num_steps=1)
    (batch,) = batches(dataset, num_steps=1, jitter=0.4)
    assert torch.equal(batch["images"], plain["images"])  # the loader leaves colours alone
    moved, still = to_device(batch, torch.device("cpu")), to_device(plain, torch.device("cpu"))
    assert "jitter" not in moved
    expected = [still["images"].clone(), still["tokenizer_images"].clone()]
    jitter_(expected, plain["noise"], 0.4)
    assert torch.equal(moved["images"], expected[0])
    assert torch.equal(moved["tokenizer_images"], expected[1])
    assert not torch.equal(moved["images"], still["images"])
    assert "jitter" not in next(iter(evaluate(dataset, view=center, sizes=SIZES, batch_size=4)))


@pytest.mark.parametrize("repeats", [1, 4])
def test_neither_the_decoder_nor_the_cut_changes_a_batch(tmp_path, monkeypatch, repeats):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for i in range(6):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8))
        coarse.resize((110 + i, 90)).save(tmp_path / f"in/{i}.jpg", quality=80 + i)
    make(tmp_path / "in", tmp_path / "out", workers=1)
    jpegs = Dataset.open(tmp_path / "out")

    def pixels():
        found = batches(jpegs, order_of(jpegs, repeats=repeats), num_steps=4)
        return [(batch["images"].numpy().tobytes(), batch["tokenizer_images"].numpy().tobytes()) for batch in found]

    expected = pixels()
    monkeypatch.setattr(jpeg, "simplejpeg", None)
    assert pixels() == expected
    monkeypatch.setattr(jpeg, "parse", lambda data: None)
    assert pixels() == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_crops_come_in_fields_of_their_own_whatever_the_ranks_and_workers(dataset, workers):
    view = functools.partial(multi_crop, num_local=3, local_size=8)
    whole = batches(dataset, view=view, sizes=SIZES[:1], mask=None)
    assert whole[0]["images"].shape == (8, 2, 3, 16, 24)
    assert whole[0]["local_images"].shape == (8, 3, 3, 8, 8)
    shares = [batches(dataset, view=view, sizes=SIZES[:1], mask=None, rank=r, world=2, workers=workers) for r in (0, 1)]
    for name in ("images", "local_images"):
        for batch, *parts in zip(whole, *shares, strict=True):
            rows = dict(zip(batch["noise"].tolist(), batch[name], strict=True))  # noise names the slot
            for part in parts:
                assert all(
                    torch.equal(rows[key], row) for key, row in zip(part["noise"].tolist(), part[name], strict=True)
                )


def test_each_crop_of_an_image_has_a_jitter_of_its_own(dataset):
    def same(image, rng, sizes):
        one = center(image, rng, [(8, 8)])[0]
        return {"images": torch.stack([one, one]), "local_images": one[None]}

    options = {"view": same, "sizes": [(8, 8)], "mask": None, "num_steps": 1}
    plain = to_device(batches(dataset, **options)[0], torch.device("cpu"))
    assert torch.equal(plain["images"][:, 0], plain["local_images"][:, 0])
    changed = to_device(batches(dataset, **options, jitter=0.4)[0], torch.device("cpu"))
    crops = [changed["images"][:, 0], changed["images"][:, 1], changed["local_images"][:, 0]]
    for one, other in itertools.combinations(crops, 2):
        assert ((one - other).abs().flatten(1).max(dim=1).values > 0.01).all()
    again = to_device(batches(dataset, **options, jitter=0.4)[0], torch.device("cpu"))
    assert torch.equal(changed["images"], again["images"])


def test_evaluation_may_show_some_of_its_batches(dataset):
    """Dealt out, they are the batches of the whole."""
    whole = list(evaluate(dataset, view=center, sizes=SIZES[:1], batch_size=5, limit=18))
    for only in ([0, 2], [1, 3], []):
        found = list(evaluate(dataset, view=center, sizes=SIZES[:1], batch_size=5, limit=18, only=only))
        assert [batch["keys"] for batch in found] == [whole[number]["keys"] for number in only]
        assert all(torch.equal(b["images"], whole[n]["images"]) for b, n in zip(found, only, strict=True))


def test_evaluation_says_before_which_samples_it_shows(dataset):
    samples = stream.evaluated(dataset, limit=9)
    shown = [key for batch in evaluate(dataset, view=center, sizes=SIZES[:1], batch_size=4, limit=9)
             for key in batch["keys"]]  # fmt: skip
    assert shown == [dataset.read(*dataset.locate(int(i))).key for i in samples]
    assert len(samples) == 9
    assert stream.evaluated(dataset).tolist() == list(range(23))
