"""What `mim shards verify` finds, and that it finds it wherever it is."""

import hashlib
import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest

from mim.config import ConfigError
from mim.contracts import DataError
from mim.data import tar
from mim.data.join import join
from mim.data.make import make
from mim.data.members import build_index, save_index
from mim.data.parts import Part
from mim.data.shards import LOCK, Dataset, dataset_id, read_lock
from mim.data.tar import BLOCK
from mim.data.verify import check_shard, verify
from tests.tiny import picture


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """18 labelled images in 3 shards."""
    root = tmp_path_factory.mktemp("verify")
    for i in range(18):
        path = root / "in" / ("a" if i % 2 else "ü") / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i, (9 + i % 5, 12)))
    make(root / "in", root / "out", labels_from_folders=True, shard_size=7, workers=1)
    return root / "out"


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def replace_member(folder, number, row, image):
    """Put other bytes of the same length into a sample, and let index and lock agree with them."""
    index = np.load(folder / f"shard-{number:05d}.npy")
    offset, size, _ = index["image"][row].item()
    with (folder / f"shard-{number:05d}.tar").open("r+b") as file:
        file.seek(offset)
        file.write(image.ljust(size, b"\0")[:size])
    agree(folder, number)


def agree(folder, number):
    """Index a shard again and write its hash into the lock."""
    shard = folder / f"shard-{number:05d}.tar"
    save_index(shard.with_suffix(".npy"), build_index(str(shard), labelled=True))
    lock = json.loads((folder / LOCK).read_text())
    lock["shards"][number]["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
    lock["shards"][number]["size"] = shard.stat().st_size
    lock["dataset_id"] = dataset_id(lock["shards"], lock["schema"])
    (folder / LOCK).write_text(json.dumps(lock))


def flip(path, offset, bit=0):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def kinds(report):
    return sorted({finding.kind for finding in report.findings})


@pytest.mark.parametrize("workers", [1, 2])
def test_a_whole_dataset_is_clean_and_every_image_is_seen(made, tmp_path, workers):
    folder = shutil.copytree(made, tmp_path / "copy")
    report = verify(folder, decode=True, workers=workers)
    assert report.clean
    assert report.num_samples == 18
    assert report.decoded["modes"] == {"JPEG RGB 8 bit": 18}
    lock = read_lock(folder)
    assert report.decoded["mean"] == lock["statistics"]["mean"]
    assert report.decoded["height"] == lock["statistics"]["height"]
    assert json.loads((folder / "quarantine.json").read_text()) == {
        "format": 1, "dataset_id": lock["dataset_id"], "samples": [],
    }  # fmt: skip
    assert "clean" in report.text()


def test_without_decoding_no_quarantine_is_touched(copy):
    (copy / "quarantine.json").write_text("mine")
    assert verify(copy, workers=1).quarantine is None
    assert (copy / "quarantine.json").read_text() == "mine"


def test_an_image_that_the_decoder_refuses_is_quarantined_by_name(copy):
    replace_member(copy, 1, 3, b"no image at all")
    report = verify(copy, decode=True, workers=1)
    assert kinds(report) == ["unreadable"]
    [sample] = json.loads((copy / "quarantine.json").read_text())["samples"]
    key = Dataset.open(copy).read(1, 3).key.partition("/")[2]
    assert sample == {"shard": "shard-00001.tar", "row": 3, "key": key, "reason": report.findings[0].reason}
    assert "not a JPEG" in sample["reason"]


def test_a_damaged_byte_is_an_error_and_never_quarantined(copy):
    offset = int(np.load(copy / "shard-00001.npy")["image"]["offset"][2])
    flip(copy / "shard-00001.tar", offset + 30)
    report = verify(copy, decode=True, workers=1)
    assert kinds(report) == ["damaged"]
    assert {finding.row for finding in report.findings} == {2, None}  # the sample, and the sha256 of the shard
    assert json.loads((copy / "quarantine.json").read_text())["samples"] == []


def test_every_flipped_bit_is_found_and_reading_delivers_no_other_sample(copy):
    """400 random bits: verify finds all; what `read` still delivers is bit for bit what was stored."""
    shard = copy / "shard-00000.tar"
    whole = shard.read_bytes()
    good = [Dataset.open(copy).read(0, row) for row in range(7)]
    lock = read_lock(copy)
    index = np.load(copy / "shard-00000.npy")
    payload = np.zeros(len(whole), bool)
    for member in ("image", "label"):
        for offset, size in zip(index[member]["offset"], index[member]["size"], strict=True):
            payload[int(offset) : int(offset + size)] = True
    rng = np.random.default_rng(0)
    refused = in_payload = 0
    for _ in range(400):
        at = int(rng.integers(len(whole)))
        flip(shard, at, int(rng.integers(8)))
        dataset = Dataset.open(copy)
        assert check_shard(dataset, lock["shards"][0], 0, False).findings
        bad = 0
        for row, sample in enumerate(good):
            try:
                assert dataset.read(0, row) == sample
            except DataError:
                bad += 1
        refused += bool(bad)
        in_payload += bool(payload[at])
        assert bad == 1 or not payload[at]
        shard.write_bytes(whole)
    assert 0 < in_payload <= refused


def test_every_truncation_is_found_by_verify_and_at_run_time(copy):
    """100 random bytes, every member boundary, the middle of each header, and the end blocks."""
    shard = copy / "shard-00000.tar"
    whole = shard.read_bytes()
    index = np.load(copy / "shard-00000.npy")
    headers = np.concatenate([index[m]["offset"] for m in ("image", "label")]).astype(int) - BLOCK
    cuts = {int(cut) for cut in np.random.default_rng(1).integers(0, len(whole), 100)}
    cuts |= {int(h) for h in headers} | {int(h) + 100 for h in headers} | {len(whole) - n for n in (1, 512, 1024, 9000)}
    lock = read_lock(copy)
    lost_rows = 0
    for cut in sorted(cuts, reverse=True):
        shard.write_bytes(whole[:cut])
        found = check_shard(Dataset(copy, lock), lock["shards"][0], 0, False).findings
        assert any(f"instead of {len(whole)}" in finding.reason for finding in found)
        with pytest.raises(DataError, match=r"shard-00000\.tar has \d+ bytes instead of"):
            Dataset.open(copy)
        dataset = Dataset(copy, lock)  # cut while it is open
        for row in range(7):
            if dataset.record(0, row).end > cut:
                lost_rows += 1
                assert row in {finding.row for finding in found}
                with pytest.raises(DataError, match=r"shard-00000\.tar ends at byte"):
                    dataset.read(0, row)
    assert lost_rows > 100


def test_a_shard_replaced_under_its_name_and_size_is_refused(copy):
    """Other samples of the same keys and sizes: by sha256 in verify, by CRC32 when it is read."""
    shard = copy / "shard-00002.tar"
    index = np.load(copy / "shard-00002.npy")
    data = bytearray(shard.read_bytes())
    for offset, size in zip(index["image"]["offset"].tolist(), index["image"]["size"].tolist(), strict=True):
        data[offset : offset + size] = data[offset : offset + size][::-1]
    shard.write_bytes(data)
    assert len(list(tar.scan(shard))) == 2 * len(index)
    report = verify(copy, workers=1)
    assert any("sha256 differs" in finding.reason for finding in report.findings)
    for row in range(len(index)):
        with pytest.raises(DataError, match="CRC32 of the image differs"):
            Dataset.open(copy).read(2, row)


def test_a_missing_shard_is_named_and_the_others_are_verified(copy):
    (copy / "shard-00000.tar").unlink()
    flip(copy / "shard-00002.tar", 40)
    report = verify(copy, workers=1)
    assert {finding.shard for finding in report.findings} == {"shard-00000.tar", "shard-00002.tar"}
    assert "is missing" in report.text()


def test_an_index_that_points_elsewhere_is_found(copy):
    index = np.load(copy / "shard-00001.npy")
    index["image"]["offset"][1] = 2**50
    index["key"][2] ^= 1
    index["image"]["offset"][3] = 0
    np.save(copy / "shard-00001.npy", index)
    report = verify(copy, workers=1)
    assert {finding.row for finding in report.findings} == {1, 2, 3}
    with pytest.raises(DataError, match="leaves the shard"):
        Dataset.open(copy).read(1, 1)


def test_equal_contents_and_keys_in_two_shards_are_told_and_are_no_error(copy):
    lock = json.loads((copy / LOCK).read_text())
    for ending in ("tar", "npy"):
        shutil.copy(copy / f"shard-00000.{ending}", copy / f"again.{ending}")
    lock["shards"].append(lock["shards"][0] | {"file": "again.tar"})
    lock["dataset_id"] = dataset_id(lock["shards"], lock["schema"])
    (copy / LOCK).write_text(json.dumps(lock))
    report = verify(copy, workers=1)
    assert report.clean
    assert len(report.same_keys) == report.num_same_keys == len(report.same_contents) == 7
    assert {name.partition("/")[0] for name in report.same_contents[0]} == {"shard-00000.tar", "again.tar"}
    assert "same bytes: " in report.text()


def test_a_key_twice_in_a_shard_is_an_error(copy):
    index = np.load(copy / "shard-00001.npy")
    index[4] = index[3]
    np.save(copy / "shard-00001.npy", index)
    assert "duplicate_key" in kinds(verify(copy, workers=1))


def test_parts_join_to_the_same_quarantine(copy):
    for number, row in ((0, 2), (1, 3), (2, 1)):
        replace_member(copy, number, row, b"no image")
    whole = verify(copy, decode=True, workers=1).quarantine.read_bytes()
    (copy / "quarantine.json").unlink()
    reports = [verify(copy, decode=True, workers=1, part=Part(number, 2)) for number in (1, 2)]
    assert [report.num_shards for report in reports] == [2, 1]
    assert join(copy).num_quarantined == 3
    assert (copy / "quarantine.json").read_bytes() == whole
    assert not list(copy.glob("*part*"))


def report_of(folder):
    """Everything that a report says, but the time."""
    timing = ("seconds", "images_per_second")
    found = asdict(verify(folder, decode=True, workers=1))
    return {name: value for name, value in found.items() if name not in timing}


def test_joined_parts_report_what_one_process_does_with_the_duplicates_between_them(copy):
    """Copies of shard 0 in another part than its own, a damaged byte, a bad image and a key that comes twice."""
    lock = json.loads((copy / LOCK).read_text())
    for ending in ("tar", "npy"):
        shutil.copy(copy / f"shard-00000.{ending}", copy / f"again.{ending}")
    lock["shards"].append(lock["shards"][0] | {"file": "again.tar", "padding": 20480})
    lock["dataset_id"] = dataset_id(lock["shards"], lock["schema"])
    (copy / LOCK).write_text(json.dumps(lock))
    replace_member(copy, 1, 3, b"no image")
    index = np.load(copy / "shard-00002.npy")
    index[1] = index[0]
    np.save(copy / "shard-00002.npy", index)
    flip(copy / "shard-00002.tar", int(index["image"]["offset"][2]) + 30)
    whole = report_of(copy)
    assert {finding["kind"] for finding in whole["findings"]} == {"damaged", "duplicate_key", "unreadable"}
    assert whole["num_same_keys"] == len(whole["same_contents"]) == 7
    assert whole["padding"] == {"again.tar": 20480}
    for number in (4, 2, 1, 3):
        part = verify(copy, decode=True, workers=1, part=Part(number, 4))
        assert (part.num_same_keys, part.same_contents, part.quarantine) == (0, [], None)
        assert f"part {number}/4 is done; when all are: mim shards join" in part.text()
    joined = join(copy)
    [report] = joined.verified
    assert not joined.clean
    assert {name: value for name, value in asdict(report).items() if name in whole} == whole
    assert report.text() in joined.text()
    assert (joined.joined, join(copy).joined) == ("verify", "nothing")


def test_parts_without_decoding_join_too_and_write_no_quarantine(copy):
    for number in (1, 2):
        verify(copy, workers=1, part=Part(number, 2))
    joined = join(copy)
    assert joined.clean
    assert (joined.num_quarantined, joined.verified[0].num_samples) == (None, 18)
    assert not list(copy.glob("*part*"))
    assert not (copy / "quarantine.json").exists()


def test_parts_of_which_one_did_not_decode_or_that_saw_another_dataset_are_refused(copy):
    verify(copy, workers=1, part=Part(1, 2))
    with pytest.raises(ConfigError, match="1 of 2 parts are missing: run --part 2/2"):
        join(copy)
    verify(copy, decode=True, workers=1, part=Part(2, 2))
    with pytest.raises(ConfigError, match="part 2 of 2 was made from other data or options"):
        join(copy)
    verify(copy, workers=1, part=Part(2, 2))
    replace_member(copy, 1, 3, b"no image")
    with pytest.raises(DataError, match="reports on another dataset"):
        join(copy)


def test_a_report_of_a_part_that_is_torn_is_refused(copy):
    verify(copy, workers=1, part=Part(1, 1))
    file = copy / "verify.part-1-of-1.json"
    content = json.loads(file.read_text())
    content["checked"] = {"object": "Popen", "fields": {}}
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="holds no facts of a shard"):
        join(copy)
    file.write_text(file.read_text()[:50])
    with pytest.raises(DataError, match="is not what a part leaves"):
        join(copy)
