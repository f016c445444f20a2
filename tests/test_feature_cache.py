"""Features on disk: found again, gone on with, and never those of another model."""

import json
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch

from mim import build
from mim.contracts import DataError, StorageError
from mim.evals import knn
from mim.probing.bank import Part, blocks_of
from mim.probing.feature_cache import FeatureCache, write_column
from mim.probing.features import Wanted, bank

CPU = torch.device("cpu")
WANTED = Wanted([1, -1], ["mean", "tokens"])


@pytest.fixture
def passes(monkeypatch):
    """`passes(loaded)`: a list that notes how many images go through the encoder at each call."""

    def watch(loaded):
        seen, layers = [], loaded.encoder.layers
        monkeypatch.setattr(loaded.encoder, "layers", lambda x, *a, **k: seen.append(len(x)) or layers(x, *a, **k))
        return seen

    return watch


def train_of(loaded):
    return build.open_data(loaded.config)[0]


def embedded(loaded, cache, **options):
    return bank(loaded, train_of(loaded), WANTED, **{"batch_size": 8, "cache": cache, **options})


def equal(one, other):
    assert one.keys == other.keys
    assert torch.equal(one.labels, other.labels)
    assert list(one.columns) == list(other.columns)
    return all(torch.equal(column, other.columns[name]) for name, column in one.columns.items())


def test_features_from_the_cache_are_those_without_one_and_cost_no_second_pass(loaded_run, tmp_path, passes):
    loaded = loaded_run("mae")
    plain = embedded(loaded, None)
    seen = passes(loaded)
    first = embedded(loaded, tmp_path)
    assert sum(seen) == len(train_of(loaded))
    again = embedded(loaded, tmp_path)
    assert sum(seen) == len(train_of(loaded))
    assert equal(first, plain)
    assert equal(again, plain)
    (folder,) = tmp_path.iterdir()
    assert not list(folder.glob("block-*"))
    assert not list(folder.glob(".*"))


def test_an_extraction_that_was_killed_goes_on_where_it_was(loaded_run, tmp_path, passes, monkeypatch):
    loaded = loaded_run("mae")
    put = FeatureCache.put

    def killed(self, block, part):
        if block.number == 3:
            raise KeyboardInterrupt
        put(self, block, part)

    monkeypatch.setattr(FeatureCache, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        embedded(loaded, tmp_path)
    monkeypatch.setattr(FeatureCache, "put", put)
    seen = passes(loaded)
    found = embedded(loaded, tmp_path)
    assert sum(seen) == len(train_of(loaded)) - 3 * 8
    assert equal(found, embedded(loaded, None))


@pytest.mark.parametrize("damage", ["changed", "cut", "gone", "no marker"])
def test_a_block_that_is_not_what_was_written_is_made_again(loaded_run, tmp_path, damage, monkeypatch):
    loaded = loaded_run("mae")
    monkeypatch.setattr(FeatureCache, "finish", lambda self, blocks: None)
    embedded(loaded, tmp_path)
    monkeypatch.undo()
    (file,) = tmp_path.glob("*/block-00001.1_mean.npy")
    if damage == "changed":
        file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "gone":
        file.unlink()
    else:
        file.with_name("block-00001.json").unlink()
    found = embedded(loaded_run("mae"), tmp_path)
    assert equal(found, embedded(loaded_run("mae"), None))


@pytest.mark.parametrize("change", ["weights", "mean", "heads", "limit", "batch size", "size", "columns"])
def test_features_of_anything_else_are_never_taken(loaded_run, tmp_path, change, passes):
    loaded = loaded_run("mae")
    bank(loaded, train_of(loaded), Wanted(), batch_size=8, cache=tmp_path)
    options, wanted = {"batch_size": 8}, Wanted()
    if change == "weights":
        next(loaded.encoder.parameters()).data.flatten()[0] += 1e-6
    elif change == "mean":
        loaded.encoder.mean += 0.01
    elif change == "heads":  # no weight shows it
        loaded.config["encoder"]["num_heads"] = 4
    elif change == "limit":
        options["limit"] = 50
    elif change == "batch size":
        options["batch_size"] = 9
    elif change == "size":
        loaded.views.sizes = [(64, 64)]
    else:
        wanted = Wanted(pools=["class"])
    seen = passes(loaded)
    bank(loaded, train_of(loaded), wanted, **options, cache=tmp_path)
    assert sum(seen) >= 50
    assert len(list(tmp_path.iterdir())) == 2


def test_a_disk_that_is_too_small_is_told_before_the_second_block(loaded_run, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 65 << 20))
    loaded = loaded_run("mae")
    embedded(loaded, tmp_path / "small")  # one MiB is enough for these
    cache = FeatureCache(tmp_path / "large", {}, CPU)
    blocks = blocks_of(1000, 8)
    cache.missing(blocks)
    part = Part(["k"] * 8, torch.zeros(8, dtype=torch.int64), {"x": torch.zeros(8, 1000)})
    with pytest.raises(StorageError, match=r"the features need 0.01 GiB in .*, where 0.00 GiB are free; give another"):
        cache.put(blocks[0], part)
    assert not list(cache.folder.glob("block-*"))


def test_the_head_says_what_the_features_are_of(loaded_run, tmp_path):
    loaded = loaded_run("mae")
    embedded(loaded, tmp_path)
    head = json.loads(next(tmp_path.glob("*/head.json")).read_text())
    assert head["data"] == train_of(loaded).id
    assert head["pixels"]["size"] == [32, 32]
    assert head["wanted"] == {"layers": [1, -1], "pools": ["mean", "tokens"], "dtype": "float32"}


def test_a_block_that_another_process_wrote_elsewhere_is_one_sentence(tmp_path):
    cache = FeatureCache(tmp_path, {}, CPU)
    with pytest.raises(DataError, match="all processes must write into one folder"):
        cache.part(blocks_of(8, 8)[0])


def test_columns_written_piece_by_piece_are_read_by_numpy(tmp_path):
    pieces = [np.arange(6, dtype=np.float16).reshape(2, 3), np.ones((1, 3), np.float16)]
    write_column(tmp_path / "x.npy", pieces, 3)
    assert np.load(tmp_path / "x.npy", allow_pickle=False).tolist() == np.concatenate(pieces).tolist()


def test_an_evaluation_gives_the_same_numbers_from_its_cache(loaded_run, tmp_path):
    plain = dict(knn.run(loaded_run("mae"), knn.Config(k=5)))
    for _ in range(2):
        assert dict(knn.run(loaded_run("mae"), knn.Config(k=5, cache=str(tmp_path)))) == plain
