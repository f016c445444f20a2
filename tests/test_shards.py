import functools
import hashlib
import io
import json
import multiprocessing
import os
import pickle

import numpy as np
import pytest
import webdataset
from PIL import Image

from mim.config import ConfigError
from mim.contracts import DataError
from mim.data.listing import MAX_KEY, sample_keys
from mim.data.make import cached, make
from mim.data.shards import LOCK, Dataset, inspect, is_dataset, read_lock, split_name


def png(value, size=(8, 6), mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size, (value, value // 2, 255 - value) if mode == "RGB" else value).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """26 images in two classes at several depths, and one file that is none."""
    root = tmp_path_factory.mktemp("images")
    for i in range(26):
        path = root / ("cat" if i % 2 else "dog/deep.er") / f"{i:02d}.v{i}.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i * 9, (8 + i, 6)))
    (root / "notes.txt").write_text("not an image")
    return root


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "out"
    make(folder, out, labels_from_folders=True, shard_size=10, workers=1)
    return out


def copy_of(made, tmp_path):
    out = tmp_path / "copy"
    out.mkdir()
    for file in made.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    return out


def hashes(folder):
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def read_all(dataset):
    return [dataset.read(shard, row) for shard, count in enumerate(dataset.counts) for row in range(count)]


def test_every_image_is_in_the_dataset_untouched(folder, made):
    dataset = Dataset.open(made)
    samples = read_all(dataset)
    assert len(dataset) == len(samples) == 26
    assert dataset.counts.tolist() == [10, 10, 6]
    assert dataset.classes == ["cat", "dog"]
    stored = {(sample.image, dataset.classes[sample.label]) for sample in samples}
    assert stored == {(p.read_bytes(), p.relative_to(folder).parts[0]) for p in folder.rglob("*.PNG")}


def test_webdataset_reads_our_shards_sample_for_sample(made):
    dataset = Dataset.open(made)
    urls = sorted(str(path) for path in made.glob("*.tar"))
    theirs = webdataset.WebDataset(urls, shardshuffle=False)
    ours = read_all(dataset)
    for sample, other in zip(ours, theirs, strict=True):
        assert sample.key.partition("/")[2] == other["__key__"]
        assert sample.image == other["png"]
        assert sample.label == int(other["cls"])


def test_the_same_images_and_options_give_the_same_bytes(folder, made, tmp_path):
    make(folder, tmp_path / "again", labels_from_folders=True, shard_size=10, workers=2)
    assert hashes(tmp_path / "again") == hashes(made)
    make(folder, tmp_path / "other", labels_from_folders=True, shard_size=10, workers=1, seed=1)
    assert Dataset.open(tmp_path / "other").id != Dataset.open(made).id


def test_statistics_are_those_of_all_pixels(folder, made):
    dataset = Dataset.open(made)
    pixels = np.concatenate([np.asarray(Image.open(p)).reshape(-1, 3) for p in folder.rglob("*.PNG")]) / 255
    assert dataset.channels == 3
    np.testing.assert_allclose(dataset.mean, pixels.mean(0), atol=1e-6)
    np.testing.assert_allclose(dataset.std, pixels.std(0), atol=1e-6)


def test_inspect_tells_what_is_there(made):
    told = inspect(made)
    assert told["num_samples"] == 26
    assert told["num_shards"] == 3
    assert told["classes"] == {"cat": 13, "dog": 13}
    assert told["width"] == {"min": 8, "median": 20, "max": 33}
    assert told["height"]["max"] == 6
    assert told["dataset_id"] == Dataset.open(made).id


def test_gray_images_make_a_gray_dataset(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(png(51, mode="L"))
    report = make(tmp_path / "in", tmp_path / "out")
    dataset = Dataset.open(report.path)
    assert (dataset.channels, dataset.mean, dataset.std) == (1, [0.2], [0.0])
    assert dataset.classes is None
    assert dataset.read(0, 0).label is None


def test_unreadable_images_are_named_and_left_out(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for i in range(5):
        (source / f"{i}.png").write_bytes(png(i))
    (source / "cut.png").write_bytes(png(9)[:40])
    (source / "empty.jpg").write_bytes(b"")
    (source / "link.jpg").symlink_to("nowhere")
    report = make(source, tmp_path / "out")
    assert {bad["file"] for bad in report.left_out} == {"cut.png", "empty.jpg", "link.jpg"}
    assert report.num_samples == len(Dataset.open(report.path)) == 5
    assert read_lock(tmp_path / "out")["left_out"] == report.left_out
    with pytest.raises(DataError, match="more than 2 images"):
        make(source, tmp_path / "strict", max_left_out=2)
    assert not is_dataset(tmp_path / "strict")
    assert not list((tmp_path / "strict").glob("**/*.tar"))


def test_a_folder_of_unreadable_images_is_an_error(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(b"no")
    with pytest.raises(DataError, match=r"none of the 1 images .* a\.png"):
        make(tmp_path / "in", tmp_path / "out")


def test_validation_keeps_its_images_when_others_are_added(folder, tmp_path):
    def held_out(source, out):
        report = make(source, out, val_ratio=0.3, labels_from_folders=True)
        train, val = Dataset.open(report.path), Dataset.open(report.val_path)
        assert train.classes == val.classes
        keys = [{s.key.partition("/")[2] for s in read_all(d)} for d in (train, val)]
        assert not keys[0] & keys[1]
        return keys

    source = tmp_path / "in"
    source.mkdir()
    for path in sorted(folder.rglob("*.PNG")):
        target = source / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    train, val = held_out(source, tmp_path / "one")
    assert len(train) + len(val) == 26
    (source / "cat/new.png").write_bytes(png(77))
    train_more, val_more = held_out(source, tmp_path / "two")
    assert train <= train_more
    assert val <= val_more


def test_a_finished_dataset_is_reused_and_another_refused(folder, tmp_path):
    first = make(folder, tmp_path / "out", workers=1)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    again = make(folder, tmp_path / "out", workers=1)
    assert (first.reused, again.reused) == (False, True)
    assert again.num_samples == first.num_samples
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("shard*")}.items() <= before.items()
    with pytest.raises(ConfigError, match="other images or options"):
        make(folder, tmp_path / "out", seed=5)


def test_a_folder_with_other_files_is_never_written_into(folder, tmp_path):
    (tmp_path / "shard-00000.tar").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"not empty .*shard-00000\.tar"):
        make(folder, tmp_path)
    assert (tmp_path / "shard-00000.tar").read_bytes() == b"mine"


def test_what_a_killed_process_left_is_replaced(folder, tmp_path):
    (tmp_path / "out/.partial").mkdir(parents=True)
    (tmp_path / "out/.partial/shard-00009.tar").write_bytes(b"half")
    make(folder, tmp_path / "out", workers=1)
    assert sorted(p.name for p in (tmp_path / "out").glob("[!.]*")) == [LOCK, "shard-00000.npy", "shard-00000.tar"]
    assert not (tmp_path / "out/.partial").exists()


def test_a_process_killed_while_moving_its_shards_out_can_be_repeated(folder, tmp_path):
    out = tmp_path / "out"
    report = make(folder, out, val_ratio=0.3)
    complete = hashes(out)
    (out / ".partial").mkdir()
    (report.val_path / LOCK).unlink()
    (report.val_path / "shard-00000.tar").unlink()
    assert not make(folder, out, val_ratio=0.3).reused
    assert hashes(out) == complete


def test_wrong_input_is_told_in_the_users_words(folder, tmp_path):
    with pytest.raises(ConfigError, match="is not a folder"):
        make(tmp_path / "none", tmp_path / "out")
    (tmp_path / "in").mkdir()
    for name in ("a.gif", "b.GIF", "c.txt", "d"):
        (tmp_path / "in" / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"holds no images .* \.gif \(2\), \.txt \(1\), \(none\) \(1\)"):
        make(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in/a.png").write_bytes(png(1))
    with pytest.raises(ConfigError, match=r"a\.png lies in no class folder"):
        make(tmp_path / "in", tmp_path / "out", labels_from_folders=True)
    with pytest.raises(ConfigError, match="leaves no image of 1"):
        make(tmp_path / "in", tmp_path / "out", val_ratio=0.5)
    with pytest.raises(ConfigError, match="mim shards make"):
        Dataset.open(tmp_path / "in")


def test_the_cache_is_keyed_by_images_and_options(folder, tmp_path):
    first = cached(folder, tmp_path / "cache")
    assert is_dataset(first)
    assert cached(folder, tmp_path / "cache") == first
    assert cached(folder, tmp_path / "cache", labels_from_folders=True) != first
    split = cached(folder, tmp_path / "cache", val_ratio=0.3)
    assert is_dataset(split / "train")
    assert is_dataset(split / "val")
    with pytest.raises(ConfigError, match=f"use {split / 'train'} or {split / 'val'}"):
        Dataset.open(split)


def test_links_that_form_a_loop_end(folder, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(png(1))
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    assert make(tmp_path / "in", tmp_path / "out").num_samples == 1


def test_keys_are_unique_short_and_split_where_webdataset_splits():
    paths = [
        "a.b/x.y.jpg",
        "a.b/x_y.jpg",
        "a.b/x.y.png",
        "__skip__/a.jpg",
        "\u00e9.jpg",
        "e\u0301.jpg",
        "bad\udcff.jpg",
        "tab\t.jpg",
    ]
    paths += ["ü" * 100 + ".jpg", "ü" * 100 + "2.jpg"]
    keys = sample_keys(paths)
    assert len(set(keys)) == len(paths)
    for key in keys:
        assert len(key.encode()) <= MAX_KEY
        assert split_name(f"{key}.jpg") == (key, "jpg")
        assert not key.startswith("__")
        assert key.isprintable()
    assert keys[3] == "_skip__/a"
    assert sample_keys(["n01/img.1.jpg"]) == ["n01/img_1"]


def test_a_flipped_bit_in_an_image_or_label_or_name_is_found(made, tmp_path):
    dataset = Dataset.open(made)
    index = np.load(made / "shard-00001.npy")[3]
    offsets = {
        "CRC32 of the image": index["image"]["offset"] + 20,
        "CRC32 of the label": index["label"]["offset"],
        "header differs": index["label"]["offset"] - 512 + 2,
    }
    good = dataset.read(1, 3)
    for fact, offset in offsets.items():
        out = tmp_path / str(offset)
        out.mkdir()
        copy = copy_of(made, out)
        with (copy / "shard-00001.tar").open("r+b") as file:
            file.seek(int(offset))
            byte = file.read(1)[0]
            file.seek(int(offset))
            file.write(bytes([byte ^ 1]))
        damaged = Dataset.open(copy)
        assert damaged.read(1, 2) == dataset.read(1, 2)
        with pytest.raises(DataError, match=rf"shard-00001\.tar.*{fact}.*copy it again"):
            damaged.read(1, 3)
    assert good.label in (0, 1)


def test_missing_and_truncated_shards_are_found_when_opened(made, tmp_path):
    copy = copy_of(made, tmp_path)
    os.truncate(copy / "shard-00002.tar", 1000)
    with pytest.raises(DataError, match=r"shard-00002\.tar has 1000 bytes instead of"):
        Dataset.open(copy)
    (copy / "shard-00002.tar").unlink()
    with pytest.raises(DataError, match=r"shard-00002\.tar is missing"):
        Dataset.open(copy)


def test_a_foreign_index_is_found(made, tmp_path):
    copy = copy_of(made, tmp_path)
    (copy / "shard-00000.npy").write_bytes((made / "shard-00002.npy").read_bytes())
    with pytest.raises(DataError, match="does not belong"):
        Dataset.open(copy).read(0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lock: lock.update(format=99), "newer than"),
        (lambda lock: lock["shards"].reverse(), "was changed"),
        (lambda lock: lock["shards"][0].update(file="../x.tar"), "not a file of its own folder"),
        (lambda lock: lock.pop("format"), "is not a dataset lock"),
    ],
)
def test_a_lock_that_cannot_be_right_is_refused(made, tmp_path, change, message):
    copy = copy_of(made, tmp_path)
    lock = json.loads((copy / LOCK).read_text())
    change(lock)
    (copy / LOCK).write_text(json.dumps(lock))
    with pytest.raises(DataError, match=message):
        Dataset.open(copy)


def test_the_identity_does_not_change_when_a_dataset_moves(made, tmp_path):
    assert Dataset.open(copy_of(made, tmp_path)).id == Dataset.open(made).id


def test_a_dataset_can_be_pickled_and_forked_after_use(made):
    dataset = Dataset.open(made)
    expected = read_all(dataset)
    assert read_all(pickle.loads(pickle.dumps(dataset))) == expected
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.starmap(functools.partial(content, dataset), [(1, row) for row in range(10)])
    assert found == [(sample.key, bytes(sample.image), sample.label) for sample in expected[10:20]]


def content(dataset, shard, row):
    """A sample that can be sent to another process."""
    sample = dataset.read(shard, row)
    return sample.key, bytes(sample.image), sample.label


def test_an_image_is_a_part_of_the_one_read_and_no_copy(made):
    sample = Dataset.open(made).read(0, 0)
    assert isinstance(sample.image.obj, bytes)
    assert len(sample.image.obj) > sample.image.nbytes  # with the header before it
