"""Features as files: right rows, resumed after a kill, and a manifest that says what they are of."""

import json
import sys

import numpy as np
import pyarrow.parquet
import pytest
import torch

from mim import build
from mim.config import ConfigError
from mim.data.make import make
from mim.evals import embed
from mim.probing.feature_cache import FeatureCache
from mim.probing.features import Wanted, bank

COLUMNS = {"layers": [1, -1], "pools": ["class_mean"]}


def expected(loaded, **options):
    train = build.open_data(loaded.config)[0]
    return bank(loaded, train, Wanted([1, -1], ["class_mean"]), batch_size=8, **options)


def run(loaded, out, **options):
    return dict(embed.run(loaded, embed.Config(out=str(out), batch_size=8, **{**COLUMNS, **options})))


def test_parquet_holds_keys_labels_and_the_features_of_every_image(loaded_run, tmp_path):
    loaded = loaded_run("mae")
    want = expected(loaded)
    found = run(loaded, tmp_path / "out")
    table = pyarrow.parquet.read_table(tmp_path / "out/features.parquet")
    assert table.column_names == ["key", "label", "1/class_mean", "-1/class_mean"]
    assert table["key"].to_pylist() == want.keys
    assert table["label"].to_pylist() == want.labels.tolist()
    assert table["-1/class_mean"].to_pylist() == want.columns["-1/class_mean"].tolist()
    assert found["images"] == len(want.keys)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["features.parquet", "manifest.json"]


def test_npy_holds_a_file_per_column_beside_keys_and_labels(loaded_run, tmp_path):
    want = expected(loaded_run("mae"), limit=20)
    run(loaded_run("mae"), tmp_path / "out", format="npy", limit=20)
    assert (tmp_path / "out/keys.txt").read_text().splitlines() == want.keys
    assert np.load(tmp_path / "out/labels.npy").tolist() == want.labels.tolist()
    assert np.load(tmp_path / "out/1_class_mean.npy").tolist() == want.columns["1/class_mean"].tolist()


def test_all_patches_of_half_precision_are_lists_of_lists(loaded_run, tmp_path):
    run(loaded_run("mae"), tmp_path / "out", layers=[-1], pools=["tokens"], dtype="float16", limit=5)
    table = pyarrow.parquet.read_table(tmp_path / "out/features.parquet")
    assert str(table.schema.field("-1/tokens").type) == (
        "fixed_size_list<element: fixed_size_list<element: halffloat>[32]>[16]"
    ) or np.array(table["-1/tokens"].to_pylist()).shape == (5, 16, 32)


def test_images_without_labels_have_none(loaded_run, image_folder, tmp_path):
    make(image_folder, tmp_path / "unlabelled", workers=1)
    loaded = loaded_run("mae")
    loaded.config["data"]["path"] = str(tmp_path / "unlabelled")
    run(loaded, tmp_path / "out", limit=5)
    assert "label" not in pyarrow.parquet.read_table(tmp_path / "out/features.parquet").column_names


def test_the_held_out_images_are_embedded_when_asked(loaded_run, tmp_path):
    loaded = loaded_run("mae")
    run(loaded, tmp_path / "out", split="val")
    found = pyarrow.parquet.read_table(tmp_path / "out/features.parquet")
    assert len(found) == len(build.open_data(loaded.config)[1])


def test_a_killed_embedding_goes_on_and_a_finished_one_is_not_made_again(loaded_run, tmp_path, monkeypatch):
    loaded, put, seen = loaded_run("mae"), FeatureCache.put, []

    def killed(self, block, part):
        seen.append(block.number)
        if block.number == 3:
            raise KeyboardInterrupt
        put(self, block, part)

    monkeypatch.setattr(FeatureCache, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        run(loaded, tmp_path / "out")
    monkeypatch.setattr(
        FeatureCache, "put", lambda self, block, part: seen.append(block.number) or put(self, block, part)
    )
    run(loaded, tmp_path / "out")
    run(loaded, tmp_path / "out")
    assert seen == [0, 1, 2, 3, *range(3, 8)]
    want = expected(loaded)
    table = pyarrow.parquet.read_table(tmp_path / "out/features.parquet")
    assert table["key"].to_pylist() == want.keys
    assert table["1/class_mean"].to_pylist() == want.columns["1/class_mean"].tolist()


def test_the_manifest_says_what_the_features_are_of(loaded_run, tmp_path):
    run(loaded_run("mae"), tmp_path / "out", limit=5)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert len(manifest["weights"]) == 64
    assert manifest["pixels"]["size"] == [32, 32]
    assert manifest["versions"]["torch"] == torch.__version__
    assert (manifest["rows"], manifest["columns"]) == (5, ["1/class_mean", "-1/class_mean"])
    assert manifest["files"] == {"features.parquet": (tmp_path / "out/features.parquet").stat().st_size}


def test_a_run_keeps_its_features_by_step_unless_told_otherwise(loaded_run):
    loaded = loaded_run("mae")
    dict(embed.run(loaded, embed.Config(limit=3)))
    assert (loaded.path / "features/step-00000007/features.parquet").is_file()


def test_a_folder_of_other_features_is_refused(loaded_run, tmp_path):
    loaded = loaded_run("mae")
    run(loaded, tmp_path / "out", limit=5)
    with pytest.raises(ConfigError, match=r"holds other features, there -> now: .*float32.* -> .*float16"):
        run(loaded, tmp_path / "out", limit=5, dtype="float16")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").touch()
    with pytest.raises(ConfigError, match=r"is not empty \(it holds 'letter.txt'\)"):
        run(loaded, tmp_path / "mine")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "csv"}, "format='csv' is unknown; choose parquet or npy"),
        ({"split": "test"}, "split='test' is unknown; choose train or val"),
    ],
)
def test_settings_that_nobody_knows_are_refused(loaded_run, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        run(loaded_run("mae"), **{"out": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


def test_without_pyarrow_the_remedy_is_named(loaded_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"format=parquet needs pyarrow .*mimstream\[parquet\]'`, or set format=npy"):
        run(loaded_run("mae"), tmp_path / "out")


def test_there_is_nothing_held_out_to_embed(loaded_run, shards, tmp_path):
    loaded = loaded_run("mae")
    loaded.config["data"]["path"] = str(shards / "train")
    with pytest.raises(ConfigError, match=r"split=val, but .* has no held-out split"):
        run(loaded, tmp_path / "out", split="val")
