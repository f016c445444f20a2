"""Another number of shards, the same samples."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from fault_server import Fault, FaultServer, serve_dataset

from mim.config import ConfigError
from mim.contracts import DataError
from mim.data.index import index
from mim.data.make import make
from mim.data.reshard import reshard
from mim.data.shards import LOCK, Dataset, read_lock
from mim.data.verify import verify
from tests.killed import kill_when
from tests.tiny import picture, write_tar


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("reshard")
    for i in range(23):
        path = root / "in" / "xyü"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i, (8, 9 + i % 3), "PNG"))
    make(root / "in", root / "out", labels_from_folders=True, shard_size=9, workers=1)
    return root / "out"


def samples(path):
    dataset = Dataset.open(path)
    found = [dataset.read(*dataset.locate(number)) for number in range(len(dataset))]
    return [(sample.key.partition("/")[2], sample.image, sample.label) for sample in found]


def hashes(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.mark.parametrize("num_shards", [1, 4, 23])
def test_samples_and_their_order_stay_and_shards_are_even(made, tmp_path, num_shards):
    report = reshard(made, tmp_path / "out", num_shards=num_shards, workers=2)
    assert samples(tmp_path / "out") == samples(made)
    counts = Dataset.open(tmp_path / "out").counts
    assert len(counts) == report.num_shards == num_shards
    assert max(counts) - min(counts) <= 1
    old, new = read_lock(made), read_lock(tmp_path / "out")
    assert (new["schema"], new["statistics"]) == (old["schema"], old["statistics"])
    assert verify(tmp_path / "out", decode=True, workers=1).clean


def test_the_same_dataset_gives_the_same_bytes_with_any_number_of_workers(made, tmp_path):
    reshard(made, tmp_path / "one", num_shards=5, workers=1)
    reshard(made, tmp_path / "two", num_shards=5, workers=2)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_keys_of_foreign_tars_that_share_them_are_kept_apart(tmp_path):
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", [(f"{i:05d}.PNG", picture(i, kind="PNG")) for i in range(3)])
    index([str(tmp_path / "a.tar"), str(tmp_path / "b.tar")], tmp_path / "index", workers=1)
    reshard(tmp_path / "index", tmp_path / "out", num_shards=1, workers=1)
    assert [key for key, _, _ in samples(tmp_path / "out")] == [f"{n}/{i:05d}" for n in "ab" for i in range(3)]


def test_the_quarantine_moves_along(made, tmp_path):
    lock = read_lock(made)
    dataset = Dataset.open(made)
    entries = [
        {"shard": "shard-00000.tar", "row": 8, "key": dataset.read(0, 8).key.partition("/")[2], "reason": "x"},
        {"shard": "shard-00002.tar", "row": 1, "key": dataset.read(2, 1).key.partition("/")[2], "reason": "y"},
    ]
    quarantine = {"format": 1, "dataset_id": lock["dataset_id"], "samples": entries}
    (made / "quarantine.json").write_text(json.dumps(quarantine))
    try:
        reshard(made, tmp_path / "out", num_shards=6, workers=1)
    finally:
        (made / "quarantine.json").unlink()
    moved = json.loads((tmp_path / "out/quarantine.json").read_text())
    out = Dataset.open(tmp_path / "out")
    assert moved["dataset_id"] == out.id
    for sample, old in zip(moved["samples"], entries, strict=True):
        number = int(sample["shard"][6:11])
        assert out.read(number, sample["row"]).key.partition("/")[2] == sample["key"] == old["key"]


def test_damage_ends_the_copy_and_leaves_nothing(made, tmp_path):
    copy = shutil.copytree(made, tmp_path / "copy")
    offset = int(np.load(copy / "shard-00001.npy")["image"]["offset"][4]) + 20
    data = bytearray((copy / "shard-00001.tar").read_bytes())
    data[offset] ^= 4
    (copy / "shard-00001.tar").write_bytes(data)
    with pytest.raises(DataError, match="CRC32"):
        reshard(copy, tmp_path / "out", num_shards=2, workers=1)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("num_shards", [0, 24])
def test_impossible_counts_are_refused_with_both_numbers(made, tmp_path, num_shards):
    with pytest.raises(ConfigError, match=f"--shards {num_shards} must lie from 1 to the 23 samples"):
        reshard(made, tmp_path / "out", num_shards=num_shards)


def test_a_folder_that_holds_something_is_left_alone(made, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ConfigError, match="is not empty"):
        reshard(made, tmp_path, num_shards=2)


def test_a_copy_that_was_killed_while_it_moved_its_shards_out_can_be_repeated(made, tmp_path):
    reshard(made, tmp_path / "whole", num_shards=3, workers=1)
    out = shutil.copytree(tmp_path / "whole", tmp_path / "out")
    (out / LOCK).unlink()
    (out / "shard-00002.tar").unlink()
    (out / ".partial").mkdir()
    reshard(made, out, num_shards=3, workers=1)
    assert hashes(out) == hashes(tmp_path / "whole")


def test_a_killed_copy_goes_on_without_reading_again_what_it_had_copied(made, tmp_path):
    reshard(made, tmp_path / "whole", num_shards=6, workers=1)
    out, first, last = tmp_path / "out", "/shard-00000.tar", "/shard-00002.tar"
    with FaultServer() as server:
        served = serve_dataset(server, made, tmp_path / "served")
        body = (made / "shard-00002.tar").read_bytes()
        server.put(last, body, then=Fault("silent", silent=True))

        def reached():
            return len(list(out.glob(".partial/*/*.json"))) == 4 and server.fired[last]

        kill_when(reached, "shards", "reshard", served, out, "--shards", 6, "--workers", 1)
        assert [file.name for file in out.iterdir()] == [".partial"]
        for file in out.glob(".partial/*/shard-*.tar"):  # none is half
            assert hashes(file.parent)[file.name] == hashes(tmp_path / "whole")[file.name]
        server.put(last, body)
        before = server.sent[first]
        report = reshard(served, out, num_shards=6, workers=1)
        assert server.sent[first] == before > 0
    assert report.num_kept == 4
    assert "4 of the shards were finished before a stop, and were kept" in report.text()
    assert hashes(out) == hashes(tmp_path / "whole")


def stopped(made, out, monkeypatch, **options):
    """Copy until the shards are to be moved out."""
    monkeypatch.setattr("mim.data.reshard._finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        reshard(made, out, workers=1, **options)
    monkeypatch.undo()


def test_another_number_of_shards_begins_anew_and_says_so(made, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stopped(made, out, monkeypatch, num_shards=6)
    shutil.copy(next(out.glob(".partial/*/shard-00005.tar")), out)  # it was just moving them out
    report = reshard(made, out, num_shards=4, workers=1)
    assert report.num_kept == 0
    assert "began anew" in report.text()
    reshard(made, tmp_path / "whole", num_shards=4, workers=1)
    assert hashes(out) == hashes(tmp_path / "whole")


def test_a_finished_shard_that_was_damaged_since_is_copied_again(made, tmp_path, monkeypatch):
    stopped(made, tmp_path / "out", monkeypatch, num_shards=4)
    with next((tmp_path / "out").glob(".partial/*/shard-00001.tar")).open("r+b") as file:
        file.write(b"damage")
    assert reshard(made, tmp_path / "out", num_shards=4, workers=1).num_kept == 3
    reshard(made, tmp_path / "whole", num_shards=4, workers=1)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_copy_of_unproven_shards_notices_that_one_was_replaced(tmp_path, monkeypatch):
    """Only headers were indexed, so the dataset's identity stays when a picture changes under the same headers."""
    path = write_tar(tmp_path / "a.tar", [(f"{i}.png", picture(i, kind="BMP")) for i in range(4)])
    index([str(path)], tmp_path / "index", headers_only=True, workers=1)
    stopped(tmp_path / "index", tmp_path / "out", monkeypatch, num_shards=2)
    write_tar(path, [(f"{i}.png", picture(i + 9, kind="BMP")) for i in range(4)])
    assert reshard(tmp_path / "index", tmp_path / "out", num_shards=2, workers=1).began_anew
    assert [image for _, image, _ in samples(tmp_path / "out")] == [picture(i + 9, kind="BMP") for i in range(4)]


def test_a_copy_that_was_killed_after_its_lock_was_written_is_whole(made, tmp_path, monkeypatch):
    reshard(made, tmp_path / "whole", num_shards=3, workers=1)
    out = tmp_path / "out"
    stopped(made, out, monkeypatch, num_shards=3)
    shutil.copytree(tmp_path / "whole", out, dirs_exist_ok=True)
    assert reshard(made, out, num_shards=3, workers=1).num_kept == 3
    assert hashes(out) == hashes(tmp_path / "whole")
