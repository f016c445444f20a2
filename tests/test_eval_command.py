"""`mim eval` on a run, an exported folder and a timm name, on one process and on two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.test_cli import mim, trained  # noqa: F401  (fixtures)

ROOT = Path(__file__).parent.parent


def evaluated(mim, *arguments):  # noqa: F811
    code, out, err = mim("eval", *arguments)
    assert code == 0, err
    return json.loads(out)


def torchrun(*arguments):
    """`mim eval` on two processes, as users launch it; what it prints."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "mim",
        "eval",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_run_and_its_export_have_the_same_neighbours_under_one_protocol(mim, trained, shards, tmp_path):  # noqa: F811
    assert mim("export", "timm", trained, tmp_path / "export")[0] == 0
    of_run = evaluated(mim, "knn", trained, "k=5")
    of_export = evaluated(mim, "knn", tmp_path / "export", f"data.path={shards}", "k=5")
    assert of_export["knn"] == of_run["knn"]
    assert of_export["protocol"] == of_run["protocol"]
    assert (of_run["step"], of_export["step"]) == (2, 0)
    assert len(of_run["weights"]) == 12


def test_a_timm_name_is_judged_by_the_same_command(mim, shards):  # noqa: F811
    data = (f"data.path={shards}", "data.image_size=32")
    first, again = (evaluated(mim, "knn", "test_vit", *data, "k=5", "layers=[1,-1]") for _ in "ab")
    assert first == again
    assert "knn_1/mean" in first
    assert evaluated(mim, "knn", "test_vit", *data, "k=5", "init_seed=3")["weights"] != first["weights"]


def test_a_run_is_judged_on_other_images(mim, trained, shards):  # noqa: F811
    whole = evaluated(mim, "knn", trained, "k=5")
    data = (f"data.path={shards / 'train'}", f"data.val_path={shards / 'val'}")
    assert evaluated(mim, "knn", trained, "k=5", *data)["knn"] == whole["knn"]
    cropped = evaluated(mim, "knn", trained, "k=5", "data.eval_view.crop_ratio=0.5", "data.eval_view.name=center")
    assert cropped["protocol"] != whole["protocol"]


def test_images_are_embedded_from_a_folder_that_is_named_by_its_place(mim, trained, image_folder, tmp_path):  # noqa: F811
    found = evaluated(mim, "embed", trained, image_folder, tmp_path / "out", "format=npy")
    assert found["images"] == len(list(image_folder.rglob("*.*"))) == len(np.load(tmp_path / "out/-1_mean.npy"))


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["knn", "vit_of_nobody", "data.path=x"], "vit_of_nobody is not a run directory"),
        (["knn", "test_vit"], "data.path is missing"),
        (["knn", "{run}", "pretrained=true"], "eval.pretrained is not a known key"),
        (["reconstruction", "test_vit", "data.path=x"], "test_vit trains no objective, which reconstructs no images"),
        (["codebook", "test_vit", "data.path=x"], "test_vit has no tokenizer"),
        (["embed", "test_vit", "data.path=x"], "test_vit is no run directory, so out is missing"),
        (["knn", "{run}", "data.a.b=1", "data.a=1"], "data.a"),
    ],
)
def test_a_model_that_cannot_be_judged_is_one_sentence(mim, trained, arguments, start):  # noqa: F811
    """A line about its weights may stand before it."""
    code, out, err = mim("eval", *(a.format(run=trained) for a in arguments))
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"mim: {start.format(run=trained)}"), err


def test_two_processes_give_the_numbers_of_one(mim, trained, tmp_path):  # noqa: F811
    options = (trained, "batch_size=7", "ks=[1,3,7]", "k=5", "layers=[1]", "pools=[class]")
    one = evaluated(mim, "knn", *options)
    assert torchrun("knn", *options) == one
    assert torchrun("knn", *options, f"cache={tmp_path / 'cache'}") == one
    assert evaluated(mim, "knn", *options, f"cache={tmp_path / 'cache'}") == one


def test_two_processes_write_the_files_of_one(mim, trained, shards, tmp_path):  # noqa: F811
    """The last block is short; every byte of every feature."""
    options = (trained, shards / "train")
    more = ("batch_size=7", "format=npy", "pools=[class_mean,tokens]")
    evaluated(mim, "embed", *options, tmp_path / "one", *more)
    torchrun("embed", *options, tmp_path / "two", *more)
    names = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert names == ["-1_class_mean.npy", "-1_tokens.npy", "keys.txt", "labels.npy", "manifest.json"]
    for name in names[:-1]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
