"""Features of a run: which layer and pooling they are, row by row with their keys and labels, once each."""

import dataclasses

import pytest
import torch

from mim import build
from mim.config import ConfigError
from mim.contracts import Features
from mim.data import stream
from mim.data.make import make
from mim.data.shards import Dataset
from mim.evals import knn
from mim.probing import bank as banks_of
from mim.probing import features
from mim.probing.bank import Bank, blocks_of, extract
from mim.probing.features import Wanted, bank, banks, embedder, labelled_data, protocol

CPU = torch.device("cpu")


def train_of(loaded):
    return build.open_data(loaded.config)[0]


# ---- which features ------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("pool", "of"),
    [
        ("mean", lambda f: f.patches.mean(1)),
        ("class", lambda f: f.prefix[:, 0]),
        ("class_mean", lambda f: torch.cat([f.prefix[:, 0], f.patches.mean(1)], dim=1)),
        ("tokens", lambda f: f.patches),
    ],
)
def test_a_pooling_is_what_its_name_says(loaded_run, pool, of):
    loaded = loaded_run("mae")
    images = torch.rand(2, 3, 32, 32)
    found = embedder(loaded, Wanted(pools=[pool]))(images)
    assert torch.equal(found[f"-1/{pool}"], of(loaded.encoder(images)))


@torch.no_grad()
def test_layers_count_from_one_or_from_the_end_and_are_normed(loaded_run):
    loaded = loaded_run("mae")
    images = torch.rand(2, 3, 32, 32)
    found = embedder(loaded, Wanted(layers=[1, 2, -1, -2]))(images)
    first, last = loaded.encoder.layers(images, [0, 1])
    norm = loaded.encoder.final_norm
    assert torch.equal(found["1/mean"], norm(first.patches).mean(1))
    assert torch.equal(found["1/mean"], found["-2/mean"])
    assert torch.equal(found["2/mean"], norm(last.patches).mean(1))
    assert torch.equal(found["2/mean"], found["-1/mean"])
    assert list(found) == Wanted(layers=[1, 2, -1, -2]).columns


def test_one_pass_over_the_encoder_serves_all_columns(loaded_run, monkeypatch):
    loaded = loaded_run("mae")
    passes, layers = [], loaded.encoder.layers
    monkeypatch.setattr(loaded.encoder, "layers", lambda x, *a, **k: passes.append(len(x)) or layers(x, *a, **k))
    bank(loaded, train_of(loaded), Wanted([1, 2], ["mean", "class"]), batch_size=40)
    assert sum(passes) == len(train_of(loaded))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pools": ["max"]}, "pool='max' is unknown; choose mean, class, class_mean or tokens"),
        ({"layers": []}, "layers and pools must name at least one each"),
        ({"dtype": "int8"}, "dtype='int8' is unknown; choose float32 or float16"),
    ],
)
def test_features_that_nobody_has_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Wanted(**options)


@pytest.mark.parametrize("layer", [0, 3, -3])
def test_a_layer_that_does_not_exist_is_refused(loaded_run, layer):
    with pytest.raises(ConfigError, match=f"layer {layer} does not exist; the encoder has blocks 1 to 2"):
        embedder(loaded_run("mae"), Wanted([layer]))


def test_a_class_token_that_is_not_there_is_refused(loaded_run):
    loaded = loaded_run("mae")
    loaded.encoder.layers = lambda images, indices, norm: [Features(torch.zeros(2, 0, 32), torch.zeros(2, 16, 32))]
    assert embedder(loaded, Wanted())(torch.rand(2, 3, 32, 32))["-1/mean"].shape == (2, 32)
    with pytest.raises(ConfigError, match="no class token; use pool=mean"):
        embedder(loaded, Wanted(pools=["class"]))(torch.rand(2, 3, 32, 32))


def test_a_tokenizer_run_is_refused(loaded_run):
    with pytest.raises(ConfigError, match="has no encoder"):
        embedder(loaded_run("tokenize"), Wanted())


def test_features_are_kept_in_the_type_that_is_asked_for(loaded_run):
    found = bank(loaded_run("mae"), train_of(loaded_run("mae")), Wanted(dtype="float16"), limit=4)
    assert found.columns["-1/mean"].dtype == torch.float16


# ---- rows ----------------------------------------------------------------------------------------


def spread(images):
    """The channel of the stripes varies most."""
    return {"spread": images.flatten(2).std(dim=2)}


def test_every_sample_comes_once_with_its_key_and_its_label_in_the_order_of_the_dataset(loaded_run):
    """The label of a row is that of the picture in the row: the red, green or blue one."""
    loaded = loaded_run("mae")
    train = train_of(loaded)
    found = extract(train, loaded.views, spread, device=CPU, batch_size=7)
    assert found.keys == [train.read(*train.locate(i)).key for i in range(len(train))]
    assert found.labels.tolist() == [train.read(*train.locate(i)).label for i in range(len(train))]
    assert torch.equal(found.columns["spread"].argmax(dim=1), found.labels)


def test_a_limit_takes_a_subset_that_is_the_same_each_time(loaded_run):
    loaded = loaded_run("mae")
    whole = extract(train_of(loaded), loaded.views, spread, device=CPU, batch_size=7)
    part, again = (extract(train_of(loaded), loaded.views, spread, device=CPU, batch_size=7, limit=9) for _ in "ab")
    assert len(part.keys) == len(part.labels) == 9
    assert part.keys == again.keys
    assert torch.equal(part.columns["spread"], whole.columns["spread"][[whole.keys.index(key) for key in part.keys]])


def test_rows_without_a_label_are_in_the_bank_and_not_in_its_split():
    found = Bank(["a", "b", "c"], torch.tensor([1, -1, 0]), {"x": torch.arange(6.0).view(3, 2)})
    split = found.split("x")
    assert split.labels.tolist() == [1, 0]
    assert split.features.tolist() == [[0, 1], [4, 5]]


def test_unlabelled_images_can_be_embedded(loaded_run, image_folder, tmp_path):
    make(image_folder, tmp_path / "unlabelled", workers=1)
    found = bank(loaded_run("mae"), Dataset.open(tmp_path / "unlabelled"), Wanted(), limit=5)
    assert found.labels.tolist() == [-1] * 5


@pytest.mark.parametrize(("rows", "batch_size"), [(1, 4), (1000, 4), (5000, 3), (100_000, 8), (7, 7), (0, 5)])
def test_blocks_cover_all_rows_once_in_whole_micro_batches(rows, batch_size):
    blocks = blocks_of(rows, batch_size)
    assert [row for b in blocks for row in range(b.start, b.end)] == list(range(rows))
    assert [n for b in blocks for n in b.micro_batches] == list(range(-(-rows // batch_size)))
    assert all(len(b.micro_batches) <= banks_of.MAX_MICRO_BATCHES for b in blocks)
    assert [b.number for b in blocks] == list(range(len(blocks)))


def test_an_image_is_embedded_in_the_same_micro_batch_whatever_the_blocks(loaded_run, monkeypatch):
    loaded = loaded_run("mae")
    plain = bank(loaded, train_of(loaded), Wanted(), batch_size=4)
    monkeypatch.setattr(banks_of, "BLOCKS", 2)
    assert torch.equal(bank(loaded, train_of(loaded), Wanted(), batch_size=4).columns["-1/mean"],
                       plain.columns["-1/mean"])  # fmt: skip


def test_features_never_come_from_the_training_view(loaded_run, monkeypatch):
    loaded = loaded_run("mae")
    monkeypatch.setattr(loaded.views, "train", None)
    seen = []
    evaluate = stream.evaluate
    monkeypatch.setattr(
        stream, "evaluate", lambda *a, **options: seen.append(options["view"]) or evaluate(*a, **options)
    )
    banks(loaded, Wanted(), train_limit=4, val_limit=4)
    assert seen == [loaded.views.evaluation] * 2


# ---- labelled splits -----------------------------------------------------------------------------


def test_data_without_labels_is_refused_with_the_remedy(loaded_run, image_folder, tmp_path):
    make(image_folder, tmp_path / "unlabelled", val_ratio=0.3, workers=1)
    loaded = loaded_run("mae")
    loaded.config["data"]["path"] = str(tmp_path / "unlabelled")
    with pytest.raises(
        ConfigError, match="has no labels; make its shards with `mim shards make --labels-from-folders`"
    ):
        labelled_data(loaded)


def test_data_without_a_held_out_split_is_refused_with_the_remedy(loaded_run, shards):
    loaded = loaded_run("mae")
    loaded.config["data"]["path"] = str(shards / "train")
    with pytest.raises(ConfigError, match="there is no held-out split"):
        dict(knn.run(loaded, knn.Config()))


# ---- protocol ------------------------------------------------------------------------------------


def test_a_protocol_does_not_depend_on_weights_paths_or_the_size_of_a_batch(loaded_run, shards, tmp_path):
    loaded, other = loaded_run("mae"), loaded_run("beit")
    (tmp_path / "moved").symlink_to(shards)
    other.config["data"]["path"] = str(tmp_path / "moved")
    assert protocol(loaded, knn.Config()) == protocol(other, knn.Config(batch_size=3))


@pytest.mark.parametrize("change", ["k", "train_limit", "size", "view", "data", "version"])
def test_a_protocol_changes_with_all_that_a_number_depends_on(loaded_run, shards, change, monkeypatch):
    loaded, cfg = loaded_run("mae"), knn.Config()
    before = protocol(loaded, cfg)
    if change == "size":
        loaded.views.sizes = [(64, 64)]
    elif change == "view":
        loaded.views.evaluation = build.config.bind("mim.data.augment", {"name": "center", "crop_ratio": 1.0}, "test")
    elif change == "data":
        loaded.config["data"]["path"] = str(shards / "val")
    elif change == "version":
        monkeypatch.setattr(features, "PROTOCOL", features.PROTOCOL + 1)
    else:
        cfg = dataclasses.replace(cfg, **{change: 7})
    assert protocol(loaded, cfg) != before
