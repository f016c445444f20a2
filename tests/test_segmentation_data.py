"""Label maps on their way from shards to batches: exact for any layout, read only when asked for, bad ones replaced."""

import functools
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.shapes import CLASSES, scene
from mim import build
from mim.config import ConfigError
from mim.contracts import IGNORE, DataError
from mim.data import mixture
from mim.data.augment import segment_crop, segment_native, segment_whole
from mim.data.index import index
from mim.data.label_map import decode_label_map
from mim.data.make import make
from mim.data.mixture import Mixture
from mim.data.order import Order
from mim.data.reshard import reshard
from mim.data.shards import Dataset
from mim.data.sheet import SIDE, write_sheet
from mim.data.store import Store
from mim.data.stream import evaluate, loader, to_device
from mim.data.verify import verify
from mim.objectives.simmim import SimMIM
from tests.tiny import picture, shapes, write_tar

SIZE = (24, 32)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """23 drawn images with label maps in 4 uneven shards."""
    return Dataset.open(shapes(tmp_path_factory.mktemp("drawn"), 23, shard_size=7))


def order_of(dataset, **changes):
    return Order(dataset.id, dataset.counts, **{"seed": 5, "lanes": 2, "window": 5} | changes)


def batches(dataset, order=None, **options):
    defaults = {"view": segment_crop, "sizes": [SIZE], "label_maps": True, "batch_size": 8, "num_steps": 4}
    return list(loader(dataset, order=order or order_of(dataset), **defaults | options))


def rows(found):
    """(key, noise) -> image and label map of all rows that count."""
    return {
        (batch["keys"][i], int(batch["noise"][i])): tuple(
            batch[f][i].numpy().tobytes() for f in ("images", "label_maps")
        )
        for batch in found
        for i in torch.nonzero(batch["weight"]).flatten().tolist()
    }


# ---- batches -------------------------------------------------------------------------------------


def test_a_batch_holds_the_label_maps_of_its_images(dataset):
    (batch,) = batches(dataset, num_steps=1)
    assert (batch["label_maps"].shape, batch["label_maps"].dtype) == ((8, *SIZE), torch.uint8)
    assert {*batch["label_maps"].unique().tolist()} <= {*range(len(CLASSES)), IGNORE}
    moved = to_device(batch, torch.device("cpu"))
    assert moved["label_maps"].dtype == torch.int64
    assert torch.equal(moved["label_maps"], batch["label_maps"].long())


def test_colours_change_and_label_maps_do_not_with_jitter(dataset):
    plain, changed = (to_device(batches(dataset, num_steps=1, jitter=j)[0], torch.device("cpu")) for j in (0.0, 0.4))
    assert not torch.equal(plain["images"], changed["images"])
    assert torch.equal(plain["label_maps"], changed["label_maps"])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_label_maps_are_the_same_for_any_ranks_workers_and_start(dataset):
    expected = rows(batches(dataset))
    assert len(expected) == 4 * 8
    for world, workers in ((3, 0), (2, 1)):
        parts = [rows(batches(dataset, rank=rank, world=world, workers=workers)) for rank in range(world)]
        assert {name: row for part in parts for name, row in part.items()} == expected
    resumed = rows(batches(dataset, position=2 * 8, num_steps=2))
    assert resumed == {name: expected[name] for name in resumed}


def test_rows_that_only_pad_are_ignored_altogether(dataset):
    first, second = batches(dataset, batch_size=3, micro_batches=2, num_steps=1)
    assert (first["label_maps"] != IGNORE).any(dim=(1, 2)).all()
    assert second["weight"].tolist() == [1, 0]
    assert (second["label_maps"][0] != IGNORE).any()
    assert (second["label_maps"][1] == IGNORE).all()
    idle = batches(dataset, order_of(dataset, repeats=4), batch_size=4, rank=1, world=2, num_steps=1)[0]
    assert idle["weight"].sum() == 0
    assert (idle["label_maps"] == IGNORE).all()


def test_draws_of_an_image_have_crops_of_their_own(dataset):
    (batch,) = batches(dataset, order_of(dataset, repeats=4), num_steps=1, batch_size=4)
    assert len(set(batch["keys"])) == 1
    assert len({label_map.numpy().tobytes() for label_map in batch["label_maps"]}) == 4


def test_label_maps_that_nobody_asks_for_are_not_read(dataset, monkeypatch):
    asked, honest = [], Store.pread

    def counting(self, path, offset, size):
        asked.append(size)
        return honest(self, path, offset, size)

    monkeypatch.setattr(Store, "pread", counting)
    (batch,) = batches(dataset, num_steps=1, label_maps=False)
    without = sum(asked)
    assert "label_maps" not in batch
    asked.clear()
    batches(dataset, num_steps=1)
    records = [dataset.record(*dataset.locate(i)) for i in range(len(dataset))]
    assert all(set(record.members) == {"image"} for record in records)
    assert without < sum(asked)


def test_a_dataset_without_label_maps_is_refused_by_name(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.jpg", picture(0))])
    index([str(tmp_path / "x.tar")], tmp_path / "out", workers=1)
    plain = Dataset.open(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"out has no label maps.*--masks DIR"):
        batches(plain, Order(plain.id, plain.counts, seed=0))


# ---- evaluation ----------------------------------------------------------------------------------


def test_evaluation_shows_every_label_map_whole(dataset):
    found = list(evaluate(dataset, view=segment_whole, sizes=[(40, 48)], batch_size=8, label_maps=True))
    maps = torch.cat([batch["label_maps"] for batch in found])
    keys = [key.partition("/")[2] for batch in found for key in batch["keys"]]
    assert len(keys) == 23
    for key, label_map in zip(keys, maps, strict=True):
        _, drawn = scene(np.random.default_rng([0, int(key)]), (40, 48), coloured=True)
        assert np.array_equal(label_map.numpy(), drawn)


def test_evaluation_at_native_size_has_label_maps_as_they_are_stored(dataset):
    found = list(evaluate(dataset, view=segment_native, sizes=[(64, 64)], batch_size=1, label_maps=True, limit=3))
    assert [tuple(batch["images"].shape) for batch in found] == [(1, 3, 64, 77)] * 3
    assert [tuple(batch["label_maps"].shape) for batch in found] == [(1, 40, 48)] * 3


def test_images_of_several_sizes_in_one_batch_are_refused(dataset):
    def ragged(image, rng, sizes):
        return [torch.zeros(3, 8, int(rng.integers(8, 20)), dtype=torch.uint8)]

    with pytest.raises(ValueError, match="images of several sizes; use batches of one row"):
        batches(dataset, view=ragged, label_maps=False)


# ---- bad label maps ------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path):
    """Tars whose bytes are right, and of which one label map has another size and one another class."""

    def png(values):
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "PNG")
        return buffer.getvalue()

    members = []
    for i in range(12):
        values = np.full((20, 30), i % 3, np.uint8)
        values = values[:, :29] if i == 4 else values + np.uint8(9 * (i == 7))
        members += [(f"{i:02d}.jpg", picture(i)), (f"{i:02d}.seg.png", png(values))]
    write_tar(tmp_path / "x.tar", members)
    index([str(tmp_path / "x.tar")], tmp_path / "out", label_maps="seg.png", pixel_classes="3", workers=1)
    return Dataset.open(tmp_path / "out")


def test_a_bad_label_map_is_replaced_by_a_substitute_and_told(broken):
    order = Order(broken.id, broken.counts, seed=0)
    (batch,) = batches(broken, order, num_steps=1, batch_size=12)
    reasons = {entry["key"]: entry["reason"] for entry in batch["bad"]}
    assert set(reasons) == {"x.tar/04", "x.tar/07"}
    assert "its label map is 20 x 29, but the image 20 x 30" in reasons["x.tar/04"]
    assert "holds class 10, but there are 3 classes" in reasons["x.tar/07"]
    assert not {"x.tar/04", "x.tar/07"} & set(batch["keys"])
    assert not batches(broken, order, num_steps=1, batch_size=12, label_maps=False)[0]["bad"]


def test_an_evaluation_names_the_bad_label_map(broken):
    with pytest.raises(DataError, match=r"x\.tar/04 cannot be decoded \(its label map is 20 x 29"):
        list(evaluate(broken, view=segment_whole, sizes=[SIZE], batch_size=4, label_maps=True))


def test_verify_quarantines_bad_label_maps_and_training_knows_them(broken):
    report = verify(broken.path, decode=True, workers=1)
    assert [finding.key for finding in report.findings] == ["04", "07"]
    assert report.decoded["pixel_counts"] == [20 * 30 * n for n in (4, 2, 4)]
    known = mixture.bad_samples(broken)
    (batch,) = batches(broken, Order(broken.id, broken.counts, seed=0), num_steps=1, batch_size=12, known=known)
    assert {entry["key"] for entry in batch["bad"]} == {"x.tar/04", "x.tar/07"}


def test_a_flipped_byte_of_a_label_map_is_damage_and_stops_the_run(dataset, tmp_path):
    path = shapes(tmp_path, 3)
    shard = next(path.glob("*.tar"))
    offset, size, _ = Dataset.open(path).record(0, 1, label_map=True).members["label_map"]
    data = bytearray(shard.read_bytes())
    data[offset + size // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match="CRC32 of the label map differs"):
        batches(Dataset.open(path), order_of(Dataset.open(path)), num_steps=1)
    assert [finding.kind for finding in verify(path, workers=1).findings] == ["damaged", "damaged"]


# ---- tars, copies and mixtures -------------------------------------------------------------------


@pytest.mark.parametrize("headers_only", [False, True])
@pytest.mark.parametrize("ending", ["seg.png", "png"])
def test_an_existing_webdataset_has_its_label_maps_by_their_ending(tmp_path, ending, headers_only):
    drawn = [scene(np.random.default_rng(i), (16, 20)) for i in range(5)]
    members = []
    for i, (pixels, label_map) in enumerate(drawn):
        for name, array, kind in ((f"{i}.jpg", pixels, "JPEG"), (f"{i}.{ending}", label_map, "PNG")):
            buffer = io.BytesIO()
            Image.fromarray(array).save(buffer, kind)
            members.append((name, buffer.getvalue()))
    write_tar(tmp_path / "x.tar", members)
    options = {"label_maps": ending, "pixel_classes": "5", "headers_only": headers_only, "workers": 1}
    report = index([str(tmp_path / "x.tar")], tmp_path / "out", **options)
    assert report.other_members == {}
    dataset = Dataset.open(tmp_path / "out")
    for i, (_, label_map) in enumerate(drawn):
        sample = dataset.read(0, i, label_map=True)
        assert np.array_equal(decode_label_map(sample.label_map, (16, 20), 5).numpy(), label_map)
    assert verify(dataset.path, decode=True, workers=1).clean


def test_label_maps_of_tars_need_their_classes_and_every_sample_one(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.jpg", picture(0)), ("a.seg.png", b""), ("b.jpg", picture(1))])
    with pytest.raises(ConfigError, match="--label-maps and --classes go together"):
        index([str(tmp_path / "x.tar")], tmp_path / "out", label_maps="seg.png", workers=1)
    with pytest.raises(DataError, match=r"sample 'b' has no label map \(\.seg\.png\)"):
        index([str(tmp_path / "x.tar")], tmp_path / "out", label_maps="seg.png", pixel_classes="5", workers=1)


def test_resharding_keeps_label_maps_byte_for_byte(dataset, tmp_path):
    reshard(dataset.path, tmp_path / "out", num_shards=2, workers=1)
    copy = Dataset.open(tmp_path / "out")
    assert copy.pixel_classes == dataset.pixel_classes
    for number in range(len(dataset)):
        ours, theirs = (d.read(*d.locate(number), label_map=True) for d in (copy, dataset))
        assert (bytes(ours.image), bytes(ours.label_map)) == (bytes(theirs.image), bytes(theirs.label_map))


def test_a_mixture_has_label_maps_when_its_sources_have_the_same_classes(dataset, tmp_path):
    other = Dataset.open(shapes(tmp_path / "same", 5))
    mixed = Mixture([dataset, other], [1, 1])
    found = batches(mixed, mixture.order_of(mixed, seed=0), num_steps=2)
    assert {key.rpartition("/shard")[0] for batch in found for key in batch["keys"]} == {
        str(dataset.path), str(other.path)
    }  # fmt: skip
    strange = Mixture([dataset, Dataset.open(shapes(tmp_path / "other", 5, classes="9"))], [1, 1])
    with pytest.raises(ConfigError, match="or its sources have other classes of pixels"):
        batches(strange, mixture.order_of(strange, seed=0))


def test_the_contact_sheet_lays_the_colour_of_the_class_over_the_image(tmp_path):
    for folder, mode in (("images", "RGB"), ("masks", "L")):
        (tmp_path / folder).mkdir()
        Image.new(mode, (SIDE, SIDE), 1 if folder == "masks" else 0).save(tmp_path / folder / "a.png")
    path = make(tmp_path / "images", tmp_path / "out", masks=tmp_path / "masks", workers=1).path
    with Image.open(write_sheet(path, tmp_path / "sheet.png")) as sheet:
        assert sheet.convert("RGB").getpixel((SIDE // 2, SIDE // 2)) == (
            64,
            0,
            0,
        )  # black, and half of VOC's (128, 0, 0)


# ---- recipes -------------------------------------------------------------------------------------


@pytest.fixture
def segmenting(recipe, monkeypatch):
    """A recipe whose objective reads label maps of as many classes as `dataset` has."""
    monkeypatch.setattr(SimMIM, "reads", ("images", "mask", "label_maps"))
    monkeypatch.setattr(SimMIM, "num_classes", len(CLASSES), raising=False)
    sections = recipe("simmim")
    sections["data"] |= {"view": {"name": "segment_crop"}, "eval_view": {"name": "segment_whole"}}
    return sections


def test_an_objective_that_reads_label_maps_has_them_in_its_views(segmenting, dataset, recipe):
    assert build.build(segmenting, dataset=dataset).views.label_maps
    assert not build.build(recipe("mae")).views.label_maps


@pytest.mark.parametrize(("key", "remedy"), [("view", "segment_crop"), ("eval_view", "segment_whole")])
def test_views_that_show_no_label_maps_are_refused(segmenting, key, remedy):
    segmenting["data"][key] = {"name": "center"}
    with pytest.raises(ConfigError, match=rf"data\.{key}\.name=center shows no label maps.*use {remedy}"):
        build.build(segmenting)


def test_numbers_of_classes_that_differ_are_refused_with_the_right_one(segmenting, dataset, shards):
    segmenting["objective"] = {"name": "segment", "num_classes": 7}
    with pytest.raises(ConfigError, match="has no label maps"):
        build.build(segmenting, dataset=Dataset.open(shards / "train"))
    with pytest.raises(ConfigError, match=r"num_classes=7, but .* has 5.*set objective\.num_classes=5"):
        build.build(segmenting, dataset=dataset)


def test_a_held_out_dataset_of_other_classes_is_refused(segmenting, dataset, tmp_path):
    other = shapes(tmp_path, 5, classes="9")
    segmenting["data"] |= {"path": str(dataset.path), "val_path": str(other)}
    with pytest.raises(ConfigError, match=r"other classes of pixels than .*; make both with the same --classes"):
        build.open_data(segmenting)


def test_options_of_segmentation_views_come_from_the_recipe(segmenting, dataset):
    segmenting["data"]["view"] |= {"scale": [1.0, 1.5], "short": 48, "max_class_ratio": 0.9, "hflip": 0.0}
    built = build.build(segmenting, dataset=dataset)
    assert isinstance(built.views.train, functools.partial)
    assert built.views.train.keywords["short"] == 48
    assert json.loads(json.dumps(built.sections["data"]["view"]))["scale"] == [1.0, 1.5]
