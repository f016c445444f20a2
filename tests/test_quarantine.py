"""Bad samples: the slot stays, a substitute fills it, and knowing beforehand changes nothing."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from mim import train
from mim.config import ConfigError, typed
from mim.contracts import DataError
from mim.data import quarantine, stream
from mim.data.augment import center, crop
from mim.data.decode import decode
from mim.data.make import make
from mim.data.order import Order
from mim.data.quarantine import Bad, Journal, read_quarantine
from mim.data.shards import Dataset
from mim.data.stream import evaluate, loader
from mim.saving import checkpoint
from mim.watch import stopping
from tests import damage
from tests.tiny import write_recipe

BAD = [0, 8, 9, 21]  # of 30 samples in shards of 7


def mask_quarter(rng):
    return rng.permutation(12) < 3


@pytest.fixture
def dataset(tmp_path, request):
    """30 noise images in 5 shards; four of them cannot be decoded, although their bytes are what they should be."""
    rng = np.random.default_rng(0)
    for i in range(30):
        path = tmp_path / "in" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(path)
    make(tmp_path / "in", tmp_path / "out", labels_from_folders=True, shard_size=7, workers=1)
    return damage.spoil_images(tmp_path / "out", BAD, getattr(request, "param", "cut"))


def batches(dataset, known=None, **options):
    order = Order(dataset.id, dataset.counts, 5, lanes=2, window=5, repeats=options.pop("repeats", 1))
    defaults = {"view": crop, "sizes": [(16, 24)], "mask": mask_quarter, "batch_size": 6, "num_steps": 12}
    return list(loader(dataset, order=order, known=known, **defaults | options))


def digest(found):
    """Hash of everything that a training sees."""
    hashes = hashlib.sha256()
    for batch in found:
        for name in ("images", "mask", "noise", "labels", "weight"):
            hashes.update(batch[name].numpy().tobytes())
        hashes.update(repr((batch["keys"], batch["fingerprint"], batch["position"], batch["epoch"])).encode())
    return hashes.hexdigest()


def per_row(ranks):
    """{noise of the slot: (key, pixels, mask)} of the real rows of all ranks."""
    rows = {}
    for batch in (batch for rank in ranks for batch in rank):
        for i in np.flatnonzero(batch["weight"].numpy()):
            name = (batch["position"], int(batch["noise"][i]))
            rows[name] = (batch["keys"][i], batch["images"][i].numpy().tobytes(), batch["mask"][i].numpy().tobytes())
    return rows


@pytest.mark.parametrize("dataset", damage.DAMAGES, indirect=True)
@pytest.mark.parametrize(("workers", "repeats"), [(0, 1), (0, 4), (2, 4)])
def test_a_run_that_knew_the_bad_samples_sees_what_a_run_sees_that_discovers_them(dataset, workers, repeats):
    discovering = batches(dataset, workers=workers, repeats=repeats)
    damage.quarantine(dataset, BAD)
    known = read_quarantine(dataset.path, dataset.id)
    assert sorted(known) == BAD
    knowing = batches(dataset, known, workers=workers, repeats=repeats)
    assert digest(knowing) == digest(discovering)
    met = [[(e["sample"], e["key"], e["substitute"]) for batch in found for e in batch["bad"]]
           for found in (knowing, discovering)]  # fmt: skip
    assert met[0] == met[1]
    assert met[0]


@pytest.mark.parametrize("world", [2, 3, 5])
def test_substitutes_are_the_same_for_any_number_of_processes(dataset, world):
    one = per_row([batches(dataset)])
    assert per_row([batches(dataset, rank=rank, world=world) for rank in range(world)]) == one


def test_the_slot_keeps_its_draws_and_takes_a_good_sample_of_its_window(dataset):
    order = Order(dataset.id, dataset.counts, 5, lanes=2, window=5)
    bad_keys = {dataset.read(number // 7, number % 7).key for number in BAD}
    for batch, start in zip(batches(dataset), range(0, 72, 6), strict=True):
        slots = order.locate(range(start, start + 6))
        assert not bad_keys & set(batch["keys"])
        honest = [stream.key64("noise", 5, int(e), int(n), 0) for e, n in zip(slots.epoch, slots.sample, strict=True)]
        assert batch["noise"].tolist() == honest
        for entry in batch["bad"]:
            assert entry["sample"] in BAD
            assert entry["key"] in bad_keys
            assert entry["substitute"] in batch["keys"]
            assert entry["reason"]
    places = [(order.substitute(p, attempt), p) for p in range(30) for attempt in range(1, 9)]
    window_of = {}
    for position, sample in enumerate(order.locate(range(30)).sample.tolist()):
        window_of[sample] = (position % 2, position // 2 // 5)
    assert all(window_of[place.sample] == (p % 2, p // 2 // 5) for place, p in places)
    assert all(place.sample != order.locate([p]).sample[0] for place, p in places)


def test_only_the_slots_of_bad_samples_differ_from_a_stream_without_them(dataset, monkeypatch):
    found = batches(dataset)
    order = Order(dataset.id, dataset.counts, 5, lanes=2, window=5)
    expected = order.locate(range(72)).sample.tolist()
    keys = [key for batch in found for key in batch["keys"]]
    shown = [dataset.read(number // 7, number % 7).key for number in expected]
    assert [i for i in range(72) if keys[i] != shown[i]] == [i for i in range(72) if expected[i] in BAD]


def test_known_samples_are_not_read_again(dataset, monkeypatch):
    seen = []
    honest = Dataset.read
    monkeypatch.setattr(
        Dataset, "read", lambda self, s, r, **options: seen.append(7 * s + r) or honest(self, s, r, **options)
    )
    batches(dataset, {number: Bad("k", "r") for number in BAD})
    assert not set(seen) & set(BAD)


def test_a_window_without_any_good_sample_is_a_data_error_that_names_the_first(dataset, monkeypatch):
    def refuse(data, channels, dtype):
        raise stream.BadImage("broken")

    monkeypatch.setattr(stream, "open_image", refuse)
    with pytest.raises(DataError, match=r"shard-0000\d\.tar/.* cannot be decoded \(broken\), and neither can 8 subst"):
        batches(dataset)


def test_an_image_that_is_refused_only_when_its_pixels_are_wanted_is_substituted_as_well(dataset, monkeypatch):
    """A view may be what decodes: then it is what finds out."""
    expected = batches(dataset)
    good = dataset.read(1, 0).image

    def late(data, channels, dtype):
        try:
            return decode(data, channels)
        except stream.BadImage:
            return decode(good, channels)[:, :1]  # a mark for the view below

    def refusing(image, rng, sizes):
        if image.shape[1] == 1:
            raise stream.BadImage("broken")
        return crop(image, rng, sizes)

    monkeypatch.setattr(stream, "open_image", late)
    found = batches(dataset, view=refusing)
    assert digest(found) == digest(expected)
    assert {entry["sample"] for batch in found for entry in batch["bad"]} == set(BAD)


def test_a_flipped_bit_is_fatal_and_never_substituted(dataset):
    file = dataset.path / "shard-00001.tar"
    data = bytearray(file.read_bytes())
    data[int(np.load(dataset.path / "shard-00001.npy")[3]["image"]["offset"]) + 40] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match="the shard is damaged"):
        batches(Dataset.open(dataset.path))


def test_a_failing_disk_is_fatal_and_never_substituted(dataset, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.pread", fail)
    with pytest.raises(OSError, match=r"cannot read .*Input/output error"):
        batches(dataset)


def test_an_evaluation_leaves_the_quarantine_out_and_refuses_what_is_not_in_it(dataset, capsys):
    with pytest.raises(DataError, match=r"cannot be decoded.*mim shards verify"):
        list(evaluate(dataset, view=center, sizes=[(16, 16)], batch_size=8))
    damage.quarantine(dataset, BAD)
    found = list(evaluate(dataset, view=center, sizes=[(16, 16)], batch_size=8))
    assert sum(len(batch["keys"]) for batch in found) == 26
    assert "4 of 30 samples stand in the quarantine and are left out" in capsys.readouterr().err


# ---- quarantine.json -----------------------------------------------------------------------------


def test_a_dataset_without_quarantine_has_no_bad_samples(dataset):
    assert read_quarantine(dataset.path, dataset.id) == {}


def test_a_quarantine_names_samples_by_key_and_reason(dataset):
    damage.quarantine(dataset, [8])
    (bad,) = read_quarantine(dataset.path, dataset.id).values()
    assert bad == Bad(dataset.read(1, 1).key, "image: truncated")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset_id": "other"}, "was written for the dataset 'other'"),
        ({"format": 2}, "has format 2, newer than the 1"),
        ({"samples": [{"shard": "shard-00009.tar", "row": 0, "key": "k", "reason": "r"}]}, "does not have"),
        ({"samples": [{"shard": "shard-00000.tar", "row": 7, "key": "k", "reason": "r"}]}, "row 7 of 7"),
        ({"samples": None}, "is not a quarantine"),
    ],
)
def test_a_quarantine_that_does_not_fit_is_refused_with_the_remedy(dataset, change, message):
    damage.quarantine(dataset, [8])
    file = dataset.path / "quarantine.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DataError, match=f"{message}.*mim shards verify"):
        read_quarantine(dataset.path, dataset.id)


# ---- budget --------------------------------------------------------------------------------------


def bad(numbers):
    return {number: Bad(f"shard.tar/{number}", "cut") for number in numbers}


def test_the_budget_accepts_ten_of_a_small_dataset_and_stops_at_eleven():
    Journal(bad(range(10)), np.array([1000]), budget=1e-4)
    with pytest.raises(
        DataError, match=r"^11 of 1000 samples, more than the 10 that data\.bad_budget=0\.0001"
    ) as error:
        Journal(bad(range(11)), np.array([1000]), budget=1e-4)
    assert "shard.tar/9: cut; and 1 more" in str(error.value)


def test_the_budget_is_a_share_of_a_large_dataset():
    counts = np.full(1000, 1000)
    spread = [1000 * i for i in range(101)]
    Journal(bad(spread[:100]), counts, budget=1e-4)
    with pytest.raises(DataError, match=r"^101 of 1000000 samples"):
        Journal(bad(spread), counts, budget=1e-4)


def test_more_than_a_twentieth_of_one_shard_stops_the_run():
    counts = np.full(1000, 1000)
    Journal(bad(range(2000, 2050)), counts, budget=1e-4)
    with pytest.raises(DataError, match=r"^51 of the 1000 samples of one shard, more than 50"):
        Journal(bad(range(2000, 2051)), counts, budget=1e-4)


def test_a_budget_of_zero_stops_at_the_first():
    with pytest.raises(DataError, match=r"^1 of 1000 samples, more than the 0"):
        Journal(bad([3]), np.array([1000]), budget=0)


@pytest.mark.parametrize("budget", [-0.1, 1.5])
def test_a_budget_is_a_share(budget):
    with pytest.raises(ConfigError, match=r"data\.bad_budget=.* must lie between 0 and 1"):
        typed(stream.Config, {"path": "x", "bad_budget": budget}, "data")


def test_findings_of_all_ranks_count_once_each():
    journal = Journal({}, np.array([1000]), budget=1e-4)
    entry = {"key": "k", "reason": "r", "substitute": "s"}
    journal.add(1, [{"sample": 1, **entry}, {"sample": 1, **entry}])
    journal.collect(None, lambda mine: [*mine, {"step": 1, "sample": 2, **entry}])
    assert sorted(journal.bad) == [1, 2]
    journal.collect(None, lambda mine: mine)
    assert len(journal.state()) == 2


# ---- a run ---------------------------------------------------------------------------------------


@pytest.fixture
def recipe(dataset, tmp_path):
    return write_recipe(tmp_path / "mae.yaml", {"path": str(dataset.path)}, "12 steps")


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def numbers(folder):
    trained = [entry for entry in read_lines(folder / "log.jsonl") if entry["event"] == "train"]
    return [(e["step"], e["loss"], e["fingerprint"], e["num_bad"]) for e in trained]


def test_a_run_names_its_bad_samples_counts_them_and_resumes_to_the_same_end(dataset, recipe, tmp_path, capsys):
    assert train.main(recipe, [f"train.run={tmp_path / 'whole'}"]) == stopping.DONE
    assert "num_bad 4" in capsys.readouterr().err
    journal = read_lines(tmp_path / "whole/journal.jsonl")
    assert {entry["sample"] for entry in journal} == set(BAD)
    assert {"step", "key", "reason", "substitute"} <= journal[0].keys()
    stopped = [f"train.run={tmp_path / 'stopped'}"]
    assert train.main(recipe, stopped, stop=lambda step: step == 7) == stopping.STOPPED
    assert train.main(recipe, [*stopped, "train.workers=1"]) == stopping.DONE
    assert read_lines(tmp_path / "stopped/journal.jsonl") == journal
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")


def test_a_decoder_that_learned_to_read_a_sample_does_not_change_a_resumed_stream(
    dataset, recipe, tmp_path, monkeypatch
):
    assert train.main(recipe, [f"train.run={tmp_path / 'whole'}"]) == stopping.DONE
    stopped = [f"train.run={tmp_path / 'stopped'}"]
    assert train.main(recipe, stopped, stop=lambda step: step == 7) == stopping.STOPPED
    found = json.loads((tmp_path / "stopped/checkpoints/step-00000007/state.json").read_text())["bad"]
    assert {entry["sample"] for entry in found} == set(BAD)  # all of them come in the first epoch of five steps
    good = dataset.read(1, 0).image

    def lenient(data, channels, dtype):
        try:
            return decode(data, channels)
        except stream.BadImage:
            return decode(good, channels)

    monkeypatch.setattr(stream, "open_image", lenient)
    assert train.main(recipe, stopped) == stopping.DONE
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")


def test_a_budget_stops_a_run_after_its_last_step_is_saved_and_says_why(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(quarantine, "BUDGET_MIN", 3)
    run = tmp_path / "run"
    for _ in range(2):  # the same command with the same budget stops before it trains
        with pytest.raises(DataError, match=r"4 of 30 samples, more than the 3.*shard-00.*raise data\.bad_budget"):
            train.main(recipe, [f"train.run={run}"])
        assert [folder.name for folder in checkpoint.list_checkpoints(run)] == [
            "step-00000004"
        ]  # no step at which it saves anyway
        status = json.loads((run / "status.json").read_text())
        assert (status["state"], status["step"]) == ("failed", 4)
        assert "4 of 30 samples" in status["reason"]
    assert len(read_lines(run / "journal.jsonl")) >= 4


def test_a_run_with_a_larger_budget_goes_on_where_the_smaller_one_stopped_it(recipe, tmp_path, monkeypatch):
    assert train.main(recipe, [f"train.run={tmp_path / 'whole'}"]) == stopping.DONE
    monkeypatch.setattr(quarantine, "BUDGET_MIN", 3)
    stopped, seen = [f"train.run={tmp_path / 'stopped'}"], []
    to_device = stream.to_device
    monkeypatch.setattr(
        stream, "to_device", lambda batch, device: seen.append(batch["position"]) or to_device(batch, device)
    )
    with pytest.raises(DataError, match="step 4 is saved, the same command goes on from there"):
        train.main(recipe, stopped)
    assert train.main(recipe, [*stopped, "data.bad_budget=0.5"]) == stopping.DONE
    assert seen == [6 * step for step in range(1, 13)]  # no batch twice, none left out
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")
    assert read_lines(tmp_path / "stopped/journal.jsonl") == read_lines(tmp_path / "whole/journal.jsonl")


def test_a_quarantine_above_the_budget_is_refused_before_anything_is_written(dataset, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(quarantine, "BUDGET_MIN", 3)
    damage.quarantine(dataset, BAD)
    with pytest.raises(DataError, match="4 of 30 samples"):
        train.main(recipe, [f"train.run={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_a_journal_that_is_restored_knows_the_quarantine_and_the_checkpoint_and_nothing_met_since():
    journal = Journal(bad([1]), np.array([1000]), budget=1e-4)
    journal.add(5, [{"sample": 7, "key": "a.tar/7", "reason": "cut", "substitute": "a.tar/8"}])
    journal.collect(None, lambda found: found)
    journal.add(6, [{"sample": 9, "key": "a.tar/9", "reason": "cut", "substitute": "a.tar/8"}])
    journal.restore([{"sample": 3, "key": "a.tar/3", "reason": "cut"}])
    journal.collect(None, lambda found: found)
    assert set(journal.bad) == {1, 3}
