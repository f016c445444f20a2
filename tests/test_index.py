"""Foreign tars become a dataset without being rewritten; every odd name has a stated result."""

import io
import json
import os
import subprocess
import tarfile

import numpy as np
import pytest
import webdataset
from fault_server import Fault, FaultServer
from PIL import Image

from mim import config, train
from mim.config import ConfigError
from mim.contracts import DataError
from mim.data import tar
from mim.data.index import index
from mim.data.index_tar import FINISHED, Options, Task, index_shard
from mim.data.join import join
from mim.data.parts import Part
from mim.data.shards import LOCK, Dataset, inspect, read_lock
from mim.data.store import Store
from mim.data.verify import verify
from tests import tiny
from tests.killed import kill_when
from tests.tiny import write_tar


def picture(i):
    return tiny.picture(i, (8, 10))


def samples(first, count, **more):
    """`count` samples as other tools write them: image, label with a line end, and metadata."""
    members = []
    for i in range(first, first + count):
        members += [(f"{i:05d}.jpg", picture(i)), (f"{i:05d}.cls", b"%d\n" % (i % 4)), (f"{i:05d}.json", b"{}")]
    return members


@pytest.fixture
def tars(tmp_path):
    folder = tmp_path / "tars"
    for number in range(3):
        write_tar(folder / f"part-{number}.tar", samples(number * 5, 5))
    return folder


def read_all(dataset):
    return [dataset.read(shard, row) for shard, count in enumerate(dataset.counts) for row in range(count)]


@pytest.mark.parametrize("headers_only", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_samples_are_those_that_webdataset_reads(tars, tmp_path, headers_only, workers):
    before = {file: file.read_bytes() for file in tars.iterdir()}
    report = index([str(tars)], tmp_path / "out", labels="cls", headers_only=headers_only, workers=workers)
    assert {file: file.read_bytes() for file in tars.iterdir()} == before
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [LOCK, "part-0.npy", "part-1.npy", "part-2.npy"]
    dataset = Dataset.open(tmp_path / "out")
    theirs = webdataset.WebDataset(sorted(map(str, tars.iterdir())), shardshuffle=False)
    for ours, other in zip(read_all(dataset), theirs, strict=True):
        assert ours.key.partition("/")[2] == other["__key__"]
        assert (ours.image, ours.label) == (other["jpg"], int(other["cls"]))
    assert report.other_members == {"json": 15}
    assert (report.num_samples, report.num_shards) == (15, 3)
    assert dataset.classes == ["0", "1", "2", "3"]
    assert inspect(tmp_path / "out")["classes"] == {"0": 4, "1": 4, "2": 4, "3": 3}
    assert verify(tmp_path / "out", decode=True, workers=1).clean


def test_the_statistics_are_measured_and_the_lock_says_on_how_many(tars, tmp_path, monkeypatch):
    index([str(tars)], tmp_path / "all", workers=2)
    found = read_lock(tmp_path / "all")["statistics"]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(picture(i)))) for i in range(15)]).reshape(-1, 3) / 255
    assert found["num_measured"] == 15
    np.testing.assert_allclose(found["mean"], pixels.mean(0), atol=1e-6)
    monkeypatch.setattr("mim.data.index.NUM_MEASURED", 4)
    index([str(tars)], tmp_path / "some", workers=1)
    index([str(tars)], tmp_path / "again", workers=2)
    some = read_lock(tmp_path / "some")["statistics"]
    assert some["num_measured"] == 4
    assert some == read_lock(tmp_path / "again")["statistics"]


def test_headers_only_reads_little_and_the_lock_says_what_is_proven(tmp_path, monkeypatch):
    big = b"\xff" * 300_000
    write_tar(tmp_path / "x.tar", [(f"{i}.{e}", d) for i in range(6) for e, d in (("jpg", picture(i) + big),)])
    read = []
    pread = Store.pread
    monkeypatch.setattr(Store, "pread", lambda s, path, at, size: read.append(size) or pread(s, path, at, size))
    monkeypatch.setattr("mim.data.index._measured", lambda *_: {"mean": [0.5] * 3, "std": [0.5] * 3})
    index_shard(Task(0, str(tmp_path / "x.tar"), "x.tar", tmp_path, Options(headers_only=True)))
    assert sum(read) < 0.05 * (tmp_path / "x.tar").stat().st_size
    monkeypatch.undo()
    index([str(tmp_path / "x.tar")], tmp_path / "out", headers_only=True, workers=1)
    [shard] = read_lock(tmp_path / "out")["shards"]
    assert (shard["sha256"], shard["proof"], len(shard["headers_sha256"])) == (None, "headers", 64)
    assert not np.load(tmp_path / "out/x.npy")["image"]["crc32"].any()


def test_a_header_that_changed_is_found_although_only_headers_were_indexed(tars, tmp_path):
    index([str(tars)], tmp_path / "out", headers_only=True, workers=1)
    good = read_all(Dataset.open(tmp_path / "out"))
    path = tars / "part-1.tar"
    data = bytearray(path.read_bytes())
    offset = int(np.load(tmp_path / "out/part-1.npy")["image"]["offset"][2])
    data[offset - 512 + 130] ^= 1  # its size
    path.write_bytes(data)
    dataset = Dataset.open(tmp_path / "out")
    with pytest.raises(DataError, match=r"part-1\.tar"):
        dataset.read(1, 2)
    assert dataset.read(1, 3) == good[8]
    assert not verify(tmp_path / "out", workers=1).clean


def test_members_that_changed_places_are_found_although_only_headers_were_indexed(tmp_path):
    """The same names and sizes in another order: the first header of a sample is right, the second is another's."""
    names = ["a.jpg", "a.cls", "b.jpg", "b.cls"]
    contents = {"a.jpg": picture(0), "b.jpg": picture(0), "a.cls": b"0", "b.cls": b"1"}
    path = write_tar(tmp_path / "x.tar", [(name, contents[name]) for name in names])
    index([str(path)], tmp_path / "out", labels="cls", headers_only=True, workers=1)
    swapped = ["a.jpg", "b.cls", "b.jpg", "a.cls"]
    write_tar(path, [(name, contents[name]) for name in swapped])
    for row in range(2):
        with pytest.raises(DataError, match="the header of the label differs"):
            Dataset.open(tmp_path / "out").read(0, row)


@pytest.mark.parametrize("headers_only", [False, True])
def test_a_recipe_trains_on_indexed_tars(tars, tmp_path, recipe, headers_only):
    index([str(tars)], tmp_path / "out", headers_only=headers_only, workers=1)
    sections = recipe() | {"train": {"cpu": True, "workers": 0, "run": str(tmp_path / "run")}}
    sections["data"]["path"] = str(tmp_path / "out")
    (tmp_path / "recipe.yaml").write_text(config.to_yaml(sections))
    assert train.main(str(tmp_path / "recipe.yaml"), []) == 0
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "done"


def test_an_unreadable_image_that_is_not_proven_is_no_quarantine(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.jpg", picture(0)), ("b.jpg", b"text")])
    index([str(tmp_path / "x.tar")], tmp_path / "out", headers_only=True, workers=1)
    report = verify(tmp_path / "out", decode=True, workers=1)
    assert "not proven" in report.findings[0].reason
    assert json.loads(report.quarantine.read_text())["samples"] == []


def test_braces_folders_and_files_name_tars(tars, tmp_path):
    by_folder = index([str(tars)], tmp_path / "a", workers=1)
    by_braces = index([str(tars / "part-{0..2}.tar")], tmp_path / "b", workers=1)
    by_files = index([str(tars / f"part-{i}.tar") for i in range(3)], tmp_path / "c", workers=1)
    assert by_folder.num_samples == by_braces.num_samples == by_files.num_samples == 15
    assert len({Dataset.open(tmp_path / name).id for name in "abc"}) == 1


def test_tars_of_one_name_in_two_folders_stay_apart(tmp_path):
    for name in ("one", "two"):
        write_tar(tmp_path / "in" / name / "x.tar", samples(len(name) if name == "two" else 0, 2))
    index([str(tmp_path / "in")], tmp_path / "out", workers=1)
    dataset = Dataset.open(tmp_path / "out")
    assert sorted(f.name for f in (tmp_path / "out").glob("*.npy")) == ["000000-x.npy", "000001-x.npy"]
    assert len({sample.key for sample in read_all(dataset)}) == 4


def test_names_with_signs_that_mean_something_in_a_url_are_files(tmp_path):
    path = write_tar(tmp_path / "a#1?x;y {z} %20.tar", samples(0, 2))
    index([str(path)], tmp_path / "out", workers=1)
    assert len(read_all(Dataset.open(tmp_path / "out"))) == 2


def test_long_names_and_names_beyond_ascii_are_read_in_every_format(tmp_path):
    names = ["n" * 120 + ".jpg", "ü/é.jpg", "f" * 90 + "/" + "g" * 90 + ".jpg"]
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        write_tar(tmp_path / f"{format}.tar", [(name, picture(i)) for i, name in enumerate(names)], format)
        index([str(tmp_path / f"{format}.tar")], tmp_path / f"out{format}", workers=1)
        keys = [sample.key.partition("/")[2] + ".jpg" for sample in read_all(Dataset.open(tmp_path / f"out{format}"))]
        assert keys == names


@pytest.mark.parametrize(
    ("members", "result"),
    [
        (["img.0001.jpg", "img.0002.jpg"], "no sample has an image .* found: 0001.jpg .*perhaps --image 0001.jpg"),
        (["a.jpg", "b.jpg", "a.cls"], "'a' comes back after other samples; sort the members"),
        (["a.jpg", "b.jpg", "a.jpg"], "'a' comes back"),
        (["a.jpg", "a.jpg"], "'a' has two members .jpg"),
        (["a.jpg", "a.JPG"], "'a' has two members .jpg"),
        (["a.jpg", "a.png"], "'a' has 2 images; choose --image jpg or --image png"),
        (["a.txt", "b.json"], r"no sample has an image .* found: txt \(1\), json \(1\)"),
        (["a", ".hidden.jpg", "__meta__/x.jpg"], r"no sample has an image .* \(no key or ending\) \(3\)"),
        (["a.JPG", "b.Jpeg"], ["a", "b"]),
        (["A.jpg", "a.jpg"], ["A", "a"]),
        (["a.jpg", "b.txt", "c.jpg"], ["a", "c"]),
        (["a.jpg", "a.__bad__", "b.jpg"], ["b"]),
        (["d/a.jpg", "e/a.jpg"], ["d/a", "e/a"]),
    ],
)
def test_every_odd_name_has_a_stated_result(tmp_path, members, result):
    path = write_tar(tmp_path / "x.tar", [(name, picture(i)) for i, name in enumerate(members)])
    if isinstance(result, str):
        with pytest.raises(DataError, match=result):
            index([str(path)], tmp_path / "out", workers=1)
        assert not (tmp_path / "out" / LOCK).exists()
        return
    report = index([str(path)], tmp_path / "out", workers=1)
    keys = [sample.key.partition("/")[2] for sample in read_all(Dataset.open(tmp_path / "out"))]
    assert keys == result
    left_out = {name.partition(".")[0] for name in members} - set(result)
    assert {entry["file"].partition("/")[2] for entry in report.left_out} == left_out


def test_one_of_two_images_can_be_chosen(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.input.jpg", picture(0)), ("a.target.jpg", picture(1))])
    index([str(path)], tmp_path / "out", image="target.jpg", workers=1)
    assert Dataset.open(tmp_path / "out").read(0, 0).image == picture(1)


def test_many_samples_without_image_are_counted_and_the_first_are_named(tmp_path):
    members = [(f"{i:04d}.txt", b"") for i in range(250)] + [("x.jpg", picture(0))]
    index([str(write_tar(tmp_path / "x.tar", members))], tmp_path / "out", workers=1)
    assert inspect(tmp_path / "out")["num_left_out"] == 250
    assert len(read_lock(tmp_path / "out")["left_out"]) == 101


@pytest.mark.parametrize(
    ("label", "message"),
    [(b"cat", "has the label b'cat'"), (b"-1", "label"), (b"9" * 7, "label"), (b"1" * 30, "30 bytes")],
)
def test_a_label_that_is_no_class_number_is_refused(tmp_path, label, message):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", picture(0)), ("a.cls", label)])
    with pytest.raises(DataError, match=message):
        index([str(path)], tmp_path / "out", labels="cls", workers=1)


def test_a_sample_without_its_label_is_refused(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", picture(0)), ("a.cls", b"1"), ("b.jpg", picture(1))])
    with pytest.raises(DataError, match=r"byte \d+: sample 'b' has no label .*leave the labels out"):
        index([str(path)], tmp_path / "out", labels="cls", workers=1)


@pytest.mark.parametrize("headers_only", [False, True])
def test_every_truncation_is_refused_with_tar_and_byte(tmp_path, headers_only):
    path = write_tar(tmp_path / "x.tar", samples(0, 8))
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        content = [(m.offset, m.offset_data, m.size) for m in archive]
    end = content[-1][1] + -(-content[-1][2] // 512) * 512
    cuts = set(np.random.default_rng(0).integers(1, end + 1023, 100).tolist())
    cuts |= {header for header, _, _ in content} - {0} | {header + 100 for header, _, _ in content} | {end, end + 512}
    task = Task(0, str(path), "x.tar", tmp_path, Options(headers_only=headers_only))
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"x\.tar, byte \d+: .*truncated"):
            index_shard(task)
    with pytest.raises(DataError, match=r"x\.tar, byte \d+: .*truncated"):  # from another process too
        index([str(path)], tmp_path / "out", headers_only=headers_only, workers=1)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("pipe:cat x.tar", "pipe: is not read"),
        ("file:///etc/passwd", "begins with .file:. is refused"),
        ("-", "is no file"),
        ("nowhere.tar", "is no file"),
        ("https://me:secret@host/x.tar", "credentials do not belong"),
        ("https://host/x.tar?X-Amz-Signature=secret", "was given with a query"),
        ("x{1..", "is no file|unbalanced"),
    ],
)
def test_what_is_no_tar_is_refused_without_credentials_in_the_text(tmp_path, url, message):
    with pytest.raises(ConfigError, match=message) as error:
        index([url], tmp_path / "out", workers=1)
    assert "secret" not in str(error.value)


def test_what_lies_in_out_is_never_overwritten(tars, tmp_path):
    index([str(tars)], tmp_path / "out", workers=1)
    with pytest.raises(ConfigError, match="holds a dataset already"):
        index([str(tars)], tmp_path / "out", workers=1)
    np.save(tars / "part-0.npy", np.zeros(3))
    with pytest.raises(ConfigError, match="is an array of yours"):
        index([str(tars)], tars, workers=1)
    with pytest.raises(ConfigError, match="is named twice"):
        index([str(tars), str(tars / "part-0.tar")], tmp_path / "other", workers=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no"):
        index([str(tmp_path / "empty")], tmp_path / "other", workers=1)


def test_the_index_may_lie_beside_the_tars(tars):
    index([str(tars)], tars, workers=1)
    assert len(read_all(Dataset.open(tars))) == 15
    assert os.path.isabs(read_lock(tars)["shards"][0]["url"])


@pytest.mark.parametrize("headers_only", [False, True])
def test_parts_join_to_the_same_lock(tars, tmp_path, headers_only):
    options = {"labels": "cls", "headers_only": headers_only, "workers": 1}
    index([str(tars)], tmp_path / "whole", **options)
    for number in (2, 1):
        with pytest.raises(ConfigError):
            join(tmp_path / "out")
        report = index([str(tars)], tmp_path / "out", part=Part(number, 2), **options)
        assert f"part {number}/2 is done; when all are: mim shards join" in report.text()
    assert join(tmp_path / "out").joined == "index"
    assert join(tmp_path / "out").joined == "nothing"
    files = {f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()}
    assert files == {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}


# ---- kills ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--headers-only"]])
def test_a_killed_index_goes_on_without_reading_finished_tars_again(tars, tmp_path, monkeypatch, more):
    monkeypatch.setattr("mim.data.index._measured", lambda *_: {"mean": [0.5] * 3, "std": [0.5] * 3})  # reads images
    bodies = [file.read_bytes() for file in sorted(tars.iterdir())]
    out, options = tmp_path / "out", {"workers": 1, "headers_only": bool(more)}
    with FaultServer() as server:
        urls = [server.put(f"/part-{i}.tar", body) for i, body in enumerate(bodies)]
        index(urls, tmp_path / "whole", **options)
        server.put("/part-2.tar", bodies[2], then=Fault("silent", silent=True))

        def reached():
            return len(list((out / FINISHED).glob("*.json"))) == 2 and server.fired["/part-2.tar"]

        kill_when(reached, "shards", "index", *urls, out, "--workers", 1, *more)
        assert not (out / LOCK).exists()
        for file in out.glob("*.npy"):  # none is half
            assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()
        server.put("/part-2.tar", bodies[2])
        before = dict(server.sent)
        report = index(urls, out, **options)
        again = [server.sent[f"/part-{i}.tar"] - before[f"/part-{i}.tar"] for i in range(3)]
    assert again[:2] == [1, 1]  # the byte that comes with size and ETag
    assert again[2] > 1000
    assert (report.num_kept, report.num_stale, report.num_samples) == (2, 0, 15)
    files = {f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()}
    assert files == {f.name: f.read_bytes() for f in out.iterdir()}


def stopped(tars, out, **options):
    """Index until the third tar, which is damaged, and mend that."""
    whole = (tars / "part-2.tar").read_bytes()
    (tars / "part-2.tar").write_bytes(whole[:3000])
    with pytest.raises(DataError, match="truncated"):
        index([str(tars)], out, workers=1, **options)
    (tars / "part-2.tar").write_bytes(whole)


def same_as_anew(tars, out, **options):
    index([str(tars)], out.with_name("anew"), workers=1, **options)
    return {f.name: f.read_bytes() for f in out.iterdir()} == {
        f.name: f.read_bytes() for f in out.with_name("anew").iterdir()
    }


def test_a_tar_that_changed_since_the_stop_is_indexed_anew(tars, tmp_path):
    stopped(tars, tmp_path / "out")
    write_tar(tars / "part-1.tar", samples(50, 5))
    report = index([str(tars)], tmp_path / "out", workers=1)
    assert (report.num_kept, report.num_stale) == (1, 1)
    assert "1 of the shards were indexed before a stop, and were kept" in report.text()
    assert "1 of the shards were indexed anew" in report.text()
    assert same_as_anew(tars, tmp_path / "out")


def test_what_was_indexed_with_other_options_is_indexed_anew(tars, tmp_path):
    stopped(tars, tmp_path / "out")
    report = index([str(tars)], tmp_path / "out", labels="cls", workers=1)
    assert (report.num_kept, report.num_stale) == (0, 2)
    assert same_as_anew(tars, tmp_path / "out", labels="cls")


def test_what_is_not_as_it_was_left_is_indexed_anew(tars, tmp_path):
    stopped(tars, tmp_path / "out")
    rows = np.load(tmp_path / "out/part-0.npy")
    rows["image"]["offset"][0] += 1
    np.save(tmp_path / "out/part-0.npy", rows)
    (tmp_path / "out" / FINISHED / "part-1.json").write_text('{"what": ')
    assert index([str(tars)], tmp_path / "out", workers=1).num_kept == 0
    assert same_as_anew(tars, tmp_path / "out")


def test_tars_that_come_in_between_cost_only_their_own_time(tars, tmp_path):
    stopped(tars, tmp_path / "out")
    write_tar(tars / "part-0a.tar", samples(50, 5))
    assert index([str(tars)], tmp_path / "out", workers=1).num_kept == 2
    assert same_as_anew(tars, tmp_path / "out")


def test_a_remote_tar_is_kept_only_while_its_etag_says_so(tars, tmp_path):
    bodies = [file.read_bytes() for file in sorted(tars.iterdir())]
    with FaultServer() as server:
        urls = [server.put(f"/part-{i}.tar", bodies[i], etag=None if i == 1 else '"1"') for i in range(2)]
        missing = server.put("/part-2.tar", bodies[2][:3000])
        with pytest.raises(DataError):
            index([*urls, missing], tmp_path / "out", workers=1)
        assert index([*urls, server.put("/part-2.tar", bodies[2])], tmp_path / "out", workers=1).num_kept == 1
        with pytest.raises(DataError):
            index([*urls, server.put("/part-2.tar", bodies[2][:3000])], tmp_path / "other", workers=1)
        server.put("/part-0.tar", bodies[0], etag='"2"')
        server.put("/part-2.tar", bodies[2])
        assert index([*urls, missing], tmp_path / "other", workers=1).num_stale == 2


# ---- ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("zeros", "told"), [(0, False), (tar.RECORD, False), (tar.RECORD + tar.BLOCK, True)])
@pytest.mark.parametrize("headers_only", [False, True])
def test_more_zeros_than_tar_writers_leave_are_told(tmp_path, headers_only, zeros, told):
    path = write_tar(tmp_path / "x.tar", samples(0, 3))
    with tarfile.open(path) as archive:
        archive.getmembers()
        end = archive.offset + 2 * tar.BLOCK
    path.write_bytes(path.read_bytes()[:end].ljust(end + zeros, b"\0"))
    report = index([str(path)], tmp_path / "out", headers_only=headers_only, workers=1)
    assert report.num_samples == 3
    assert report.padding == verify(tmp_path / "out", workers=1).padding == ({"x.tar": zeros} if told else {})
    assert (f"{zeros} zero bytes follow the end of x.tar, more than the 10240" in report.text()) == told
    [shard] = read_lock(tmp_path / "out")["shards"]
    assert shard.get("padding", 0) == (zeros if told else 0)


def test_a_lost_tail_that_reads_as_zeros_is_told_by_index_and_verify(tmp_path):
    path = write_tar(tmp_path / "x.tar", samples(0, 40))
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        cut = archive.getmembers()[15].offset
    path.write_bytes(whole[:cut].ljust(len(whole), b"\0"))
    report = index([str(path)], tmp_path / "out", workers=1)
    assert report.num_samples == 5  # of 40
    assert report.padding == {"x.tar": len(whole) - cut - 2 * tar.BLOCK}
    found = verify(tmp_path / "out", workers=1)
    assert found.clean
    assert f"warning: {len(whole) - cut - 1024} zero bytes follow the end of x.tar" in found.text()


def test_what_gnu_tar_writes_is_no_long_end(tmp_path):
    (tmp_path / "a.jpg").write_bytes(picture(0))
    subprocess.run(["tar", "-C", tmp_path, "-cf", tmp_path / "x.tar", "a.jpg"], check=True)
    assert (tmp_path / "x.tar").stat().st_size == tar.RECORD
    assert index([str(tmp_path / "x.tar")], tmp_path / "out", workers=1).padding == {}
