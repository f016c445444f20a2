"""Every kind of source becomes the same kind of shards; a kill at any time costs nothing but time."""

import hashlib
import io
import multiprocessing
import os
import random
import signal
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from mim.config import ConfigError
from mim.contracts import DataError
from mim.data.join import join
from mim.data.make import make
from mim.data.parts import Part, parse_part
from mim.data.shards import LOCK, Dataset, is_dataset, read_lock
from tests.tiny import picture, write_tar


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 images in two folders."""
    root = tmp_path_factory.mktemp("images")
    for i in range(40):
        path = root / ("a" if i % 3 else "b") / f"{i:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(i))
    return root


def hashes(folder):
    files = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".lock"))
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def images(path):
    dataset = Dataset.open(path)
    return [dataset.read(shard, row) for shard, count in enumerate(dataset.counts) for row in range(count)]


# ---- kills ---------------------------------------------------------------------------------------


def kill_after(seconds, *arguments, **options):
    """Run `make` in a process group of its own and kill its first process after some seconds."""
    process = multiprocessing.get_context("fork").Process(target=make, args=arguments, kwargs=options)
    process.start()
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode


def test_a_make_that_is_killed_at_any_time_and_repeated_gives_the_same_bytes(folder, tmp_path):
    options = {"shard_size": 3, "val_ratio": 0.3, "workers": 2, "short": 16}
    began = time.monotonic()
    make(folder, tmp_path / "whole", **options)
    whole, duration = hashes(tmp_path / "whole"), time.monotonic() - began
    rng = random.Random(0)
    killed = 0
    for attempt in range(4):
        out = tmp_path / f"killed{attempt}"
        for _ in range(2):
            killed += kill_after(rng.uniform(0.05, 1.0) * duration, folder, out, **options) == -signal.SIGKILL
            finished = [f for f in out.rglob("*.tar") if not f.name.startswith(".")]
            assert all(hashes(f.parent)[f.name] in whole.values() for f in finished)  # never half a shard
        make(folder, out, **options)
        assert hashes(out) == whole
    assert killed >= 2  # the fault has fired


def test_finished_shards_of_a_killed_make_are_kept_and_damaged_ones_are_made_again(folder, tmp_path, monkeypatch):
    make(folder, tmp_path / "whole", shard_size=10, workers=1)
    out = tmp_path / "out"
    monkeypatch.setattr("mim.data.make._publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make(folder, out, shard_size=10, workers=1)
    monkeypatch.undo()
    made = sorted((out / ".partial").rglob("*.tar"))
    assert len(made) == 4
    assert not is_dataset(out)
    with made[1].open("r+b") as file:
        file.seek(700)
        file.write(b"damage")
    before = [file.stat().st_ino for file in made]
    make(folder, out, shard_size=10, workers=1)
    after = [(out / file.name).stat().st_ino for file in made]
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, False, True, True]
    assert hashes(out) == hashes(tmp_path / "whole")


def test_what_was_made_of_other_images_is_not_reused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("mim.data.make._publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make(folder, tmp_path / "out", seed=1, workers=1)
    monkeypatch.undo()
    make(folder, tmp_path / "out", workers=1)
    make(folder, tmp_path / "whole", workers=1)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


# ---- parts ---------------------------------------------------------------------------------------


def test_parts_made_in_any_order_join_to_the_same_bytes(folder, tmp_path):
    options = {"shard_size": 4, "val_ratio": 0.25, "labels_from_folders": True, "workers": 1}
    make(folder, tmp_path / "whole", **options)
    out = tmp_path / "out"
    for number in (3, 1):
        make(folder, out, part=Part(number, 3), **options)
    with pytest.raises(ConfigError, match="1 of 3 parts are missing: run --part 2/3"):
        join(out)
    assert not list(out.glob("**/train"))[1:]
    assert "join" in make(folder, out, part=Part(2, 3), **options).text()
    assert join(out).joined == "make"
    assert hashes(out) == hashes(tmp_path / "whole")
    assert join(out).joined == "nothing"
    assert hashes(out) == hashes(tmp_path / "whole")


def test_more_parts_than_shards_are_no_error(folder, tmp_path):
    for number in range(1, 6):
        make(folder, tmp_path / "out", part=Part(number, 5), shard_size=20, workers=1)
    assert join(tmp_path / "out").num_samples == 40


def test_parts_of_other_options_are_refused(folder, tmp_path):
    make(folder, tmp_path / "out", part=Part(1, 2), seed=0, workers=1)
    make(folder, tmp_path / "out", part=Part(2, 2), seed=1, workers=1)
    with pytest.raises(ConfigError, match="part 2 of 2 was made from other data or options than part 1"):
        join(tmp_path / "out")


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/2"])
def test_what_is_no_part_is_refused(text):
    with pytest.raises(ConfigError, match="is no part; write i/n"):
        parse_part(text)


@pytest.mark.parametrize("source", ["first", "first/train"])
def test_a_dataset_of_ours_is_a_source_like_any_tars(folder, tmp_path, source):
    """Its indices are arrays, and arrays are images elsewhere."""
    make(folder, tmp_path / "first", labels_from_folders=True, val_ratio=0.25, shard_size=9, workers=1)
    make(tmp_path / source, tmp_path / "out", labels="cls", workers=1)
    expected = [sample for root in sorted((tmp_path / source).rglob(LOCK)) for sample in images(root.parent)]
    found = images(tmp_path / "out")
    assert sorted((bytes(s.image), s.label) for s in found) == sorted((bytes(s.image), s.label) for s in expected)


# ---- smaller images ------------------------------------------------------------------------------


def test_only_larger_images_are_shrunk_and_the_same_way_each_time(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    (source / "large.png").write_bytes(picture(0, (60, 90), "PNG"))
    (source / "gray.png").write_bytes(b"")
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (80, 40), dtype=np.uint8)).save(source / "gray.png")
    (source / "small.jpg").write_bytes(picture(2, (24, 90)))
    make(source, tmp_path / "out", short=24, quality=80, workers=1)
    found = {sample.key.partition("/")[2]: sample.image for sample in images(tmp_path / "out")}
    assert found["small"] == (source / "small.jpg").read_bytes()
    with Image.open(io.BytesIO(found["large"])) as large, Image.open(io.BytesIO(found["gray"])) as gray:
        assert (large.format, large.size, large.mode) == ("JPEG", (36, 24), "RGB")
        assert (gray.format, gray.size, gray.mode) == ("JPEG", (24, 48), "L")
    lock = read_lock(tmp_path / "out")
    assert lock["statistics"]["height"]["max"] == 48
    assert (lock["source"]["short"], lock["source"]["quality"]) == (24, 80)
    assert lock["source"]["filter"] == "bicubic, antialiased"
    make(source, tmp_path / "again", short=24, quality=80, workers=2)
    assert hashes(tmp_path / "again") == hashes(tmp_path / "out")


def test_a_shrunk_image_is_that_of_an_antialiased_bicubic_filter(tmp_path):
    (tmp_path / "in").mkdir()
    rows, columns = np.mgrid[:120, :160]
    pixels = np.stack([rows * 2, columns, 255 - rows], -1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in/a.png")
    make(tmp_path / "in", tmp_path / "out", short=60, quality=100, workers=1)
    small = np.asarray(Image.open(io.BytesIO(images(tmp_path / "out")[0].image)), dtype=int)
    expected = np.asarray(Image.fromarray(pixels).resize((80, 60), Image.Resampling.BICUBIC), dtype=int)
    assert np.abs(small - expected).mean() < 1.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"short": 0}, "at least 1 pixel"),
        ({"quality": 90}, "needs --resize"),
        ({"short": 9, "quality": 101}, "1 to 100"),
    ],
)
def test_sizes_and_qualities_that_mean_nothing_are_refused(folder, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        make(folder, tmp_path / "out", **options)


# ---- lists ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "labels"),
    [
        ("x.txt", "a/01.jpg\nb/00.jpg\n", None),
        ("x.csv", "a/01.jpg,cat\nb/00.jpg,dog\n", ["cat", "dog"]),
        ("x.csv", "path,label\na/01.jpg,dog\nb/00.jpg,cat\n", ["dog", "cat"]),
        ("x.csv", "label,path\ndog,a/01.jpg\ncat,b/00.jpg\n", ["dog", "cat"]),
        ("x.csv", "path,label,note\na/01.jpg,10,x\nb/00.jpg,9,\n", ["10", "9"]),
        ("x.csv", '\ufeffpath\n"a/01.jpg"\n\nb/00.jpg\n', None),
        ("x.tsv", "a/01.jpg\t1\nb/00.jpg\t0\n", ["1", "0"]),
    ],
)
def test_a_list_names_images_and_labels(folder, tmp_path, name, text, labels):
    (folder / name).write_text(text, encoding="utf-8")
    try:
        make(folder / name, tmp_path / "out", workers=1)
    finally:
        (folder / name).unlink()
    dataset = Dataset.open(tmp_path / "out")
    found = {s.key.partition("/")[2]: (s.image, s.label) for s in images(tmp_path / "out")}
    assert found.keys() == {"a/01", "b/00"}
    assert found["a/01"][0] == (folder / "a/01.jpg").read_bytes()
    if labels is None:
        assert dataset.classes is None
    else:
        assert [dataset.classes[found[key][1]] for key in ("a/01", "b/00")] == labels
        assert dataset.classes == sorted(labels, key=int if labels[0].isdigit() else None)


def test_a_list_may_name_images_outside_its_folder(folder, tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/x.txt").write_text(f"{folder}/a/01.jpg\n{folder}/b/../b/00.jpg\n")
    make(tmp_path / "lists/x.txt", tmp_path / "out", workers=1)
    assert {s.key.partition("/")[2] for s in images(tmp_path / "out")} == {"a/01", "b/00"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no images"),
        ("path,label\n", "names no images below its header"),
        ("a.jpg,1\nb.jpg\n", "line 2: 1 fields, but the first line has 2"),
        ("a.jpg,1\nb.jpg,\n", r"line 2: .*b\.jpg has no label"),
        ("a.jpg\nb.jpg\n./a.jpg\n", "line 3: .* stands in line 1 already"),
        ("https://host/a.jpg\n", "line 1: .* is no local file"),
    ],
)
def test_a_list_that_cannot_be_right_is_refused_with_the_line(tmp_path, text, message):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        make(tmp_path / "x.csv", tmp_path / "out")


def test_an_image_that_a_list_names_and_that_is_gone_is_left_out_by_name(folder, tmp_path):
    (tmp_path / "x.txt").write_text(f"{folder}/a/01.jpg\n{folder}/a/none.jpg\n")
    report = make(tmp_path / "x.txt", tmp_path / "out", workers=1)
    assert [bad["file"] for bad in report.left_out] == ["none.jpg"]


# ---- tars and saved datasets ---------------------------------------------------------------------


def test_tars_are_written_anew_with_their_labels(tmp_path):
    for number in range(2):
        members = [(f"{i}.{e}", d) for i in range(3) for e, d in (("jpg", picture(9 * number + i)), ("cls", b"%d" % i))]
        write_tar(tmp_path / f"in/part-{number}.tar", [*members, ("text.txt", b"no image")])
    report = make(tmp_path / "in", tmp_path / "out", labels="cls", shard_size=4, workers=1)
    found = {s.key.partition("/")[2]: (s.image, s.label) for s in images(tmp_path / "out")}
    assert found == {f"part-{n}/{i}": (picture(9 * n + i), i) for n in range(2) for i in range(3)}
    assert [bad["file"] for bad in report.left_out] == ["part-0.tar/text", "part-1.tar/text"]
    again = make(tmp_path / "in/part-{0..1}.tar", tmp_path / "braces", labels="cls", shard_size=4, workers=1)
    assert Dataset.open(again.path).id == Dataset.open(report.path).id


def test_a_cut_tar_is_refused_wherever_it_was_cut(tmp_path):
    write_tar(tmp_path / "x.tar", [(f"{i}.jpg", picture(i)) for i in range(5)])
    whole = (tmp_path / "x.tar").read_bytes()
    with tarfile.open(tmp_path / "x.tar") as archive:
        headers = [member.offset for member in archive]
        end = archive.offset  # behind the first of the two blocks that end it
    for cut in {*np.random.default_rng(0).integers(1, end, 50).tolist(), *headers[1:], headers[2] + 100, end}:
        (tmp_path / "x.tar").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"x\.tar, byte \d+: .*truncated"):
            make(tmp_path / "x.tar", tmp_path / "out", workers=1)


def test_labels_are_refused_where_they_mean_nothing(folder, tmp_path):
    write_tar(tmp_path / "x.tar", [("a.jpg", picture(0)), ("a.cls", b"cat")])
    (tmp_path / "x.txt").write_text("a.jpg\n")
    for source, options, message in (
        (folder, {"labels": "cls"}, "use --labels-from-folders"),
        (tmp_path / "x.txt", {"labels_from_folders": True}, "its second column is the label"),
        (tmp_path / "x.tar", {"labels_from_folders": True}, "use --labels cls"),
        (tmp_path / "x.tar", {"labels": "txt"}, "use --labels cls"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(source, tmp_path / "out", **options)
    with pytest.raises(DataError, match="the label of sample 'a' is no class number"):
        make(tmp_path / "x.tar", tmp_path / "out", labels="cls")


def test_a_saved_dataset_keeps_its_bytes_and_class_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.ClassLabel(names=["dog", "cat"])})
    rows = {"image": [{"bytes": picture(i), "path": None} for i in range(7)], "kind": [i % 2 for i in range(7)]}
    saved = datasets.Dataset.from_dict(rows, features=features)
    saved.save_to_disk(str(tmp_path / "saved"))
    make(tmp_path / "saved", tmp_path / "out", labels="kind", shard_size=3, workers=2)
    dataset = Dataset.open(tmp_path / "out")
    found = {s.key.partition("/")[2]: (s.image, dataset.classes[s.label]) for s in images(tmp_path / "out")}
    assert found == {f"{i:09d}": (picture(i), ["dog", "cat"][i % 2]) for i in range(7)}
    with pytest.raises(ConfigError, match="has no column 'label'; it has image, kind"):
        make(tmp_path / "saved", tmp_path / "other", labels="label")
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ConfigError, match="holds several splits; name one of them: "):
        make(tmp_path / "splits", tmp_path / "other")


def test_a_saved_dataset_that_names_files_elsewhere_is_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    pa = pytest.importorskip("pyarrow")
    (tmp_path / "secret.jpg").write_bytes(picture(0))
    rows = {"image": [{"bytes": picture(1), "path": None}]}
    datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()})).save_to_disk(
        str(tmp_path / "saved")
    )
    [file] = (tmp_path / "saved").glob("*.arrow")
    table = pa.ipc.open_stream(file.read_bytes()).read_all()
    elsewhere = pa.array([{"bytes": None, "path": str(tmp_path / "secret.jpg")}], type=table.schema.field(0).type)
    with pa.ipc.new_stream(str(file), table.schema) as writer:
        writer.write_table(table.set_column(0, table.schema.field(0), elsewhere))
    with pytest.raises(DataError, match="row 0: image holds no bytes but names a file"):
        make(tmp_path / "saved", tmp_path / "out", workers=1)
    assert not is_dataset(tmp_path / "out")
