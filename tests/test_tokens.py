"""The token cache: a cached run is the uncached one, and nothing but its own codes is ever trained on."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from click.testing import CliRunner

import tokenizer as tokenizers
from mim import build, dry_run, make_tokens, train
from mim.__main__ import cli
from mim.config import ConfigError, to_yaml
from mim.contracts import DataError
from mim.data import augment, stream
from mim.data.decode import open_image
from mim.data.order import Order, Place, Slots
from mim.data.parts import parse_part
from mim.data.shards import Dataset
from mim.data.tokens import LOCK, TokenCache, code_dtype, missing
from mim.evals import reconstruction
from mim.watch import stopping
from tests import damage
from tests.conftest import TINY
from tests.test_train import assert_same, dataset, lines  # noqa: F401  (dataset is a fixture)
from tokenizer import dvae

VIEWS = 2
ROOT = Path(__file__).parent.parent


def save_tokenizer(folder, seed=0):
    torch.manual_seed(seed)
    model = dvae.build(dvae.Config(**TINY["dvae"]))
    tokenizers.save(model, folder, name="dvae", config=TINY["dvae"], card={})
    return folder


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "dvae")


def write_recipe(folder, data, tokenizer, **options):
    """A tiny BEiT whose tokenizer sees images of another size, over 3 epochs and a third of 23 images."""
    sections = {
        "data": {"path": str(data), "image_size": 16, "jitter": 0.4, "views": VIEWS, "view": {"name": "crop"}},
        "mask": {"name": "random", "ratio": 0.5},
        "encoder": {"name": "vit", "model": "vit_tiny_patch16_224", "width": 24, "depth": 1, "num_heads": 2,
                    "patch_size": 4},
        "tokenizer": {"recipe": "dvae", "path": str(tokenizer)},
        "objective": {"name": "beit", "num_codes": 16},
        "optim": {"batch_size": 6, "length": "13 steps", "warmup": "2 steps", "lr": 3e-3, "ema": 0.9},
        "train": {"log_every": "1 steps", "save_every": "6 steps", "workers": 0, "cpu": True},
    }  # fmt: skip
    for key, value in options.items():
        section, _, name = key.partition("__")
        sections[section][name] = value
    folder.mkdir(exist_ok=True)
    path = folder / "beit.yaml"
    path.write_text(to_yaml(sections))
    return str(path)


@pytest.fixture(scope="module")
def recipe(dataset, tokenizer_folder, tmp_path_factory):  # noqa: F811
    return write_recipe(tmp_path_factory.mktemp("recipe"), dataset, tokenizer_folder)


@pytest.fixture(scope="module")
def cache(recipe, tmp_path_factory):
    """The cache of the recipe."""
    out = tmp_path_factory.mktemp("tokens") / "cache"
    make_tokens.make(recipe, [], out)
    return out


@pytest.fixture(scope="module")
def uncached(recipe, tmp_path_factory):
    """The run that the tokenizer itself serves."""
    folder = tmp_path_factory.mktemp("uncached") / "run"
    assert train.main(recipe, [f"train.run={folder}"]) == stopping.DONE
    return folder


def codes_of(path):
    """All codes of a cache, by sample: (samples, K, draws, N)."""
    cache = TokenCache.open(path)
    return np.concatenate([cache._file(shard) for shard in range(len(cache._shards))])


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cached_run_equals_the_uncached_one_bit_for_bit_and_never_runs_the_tokenizer(
    recipe, cache, uncached, tmp_path, monkeypatch, workers
):
    def refuse(*_):
        raise AssertionError("the tokenizer was loaded")

    monkeypatch.setattr(tokenizers, "load", refuse)
    assert train.main(recipe, [f"train.run={tmp_path / 'run'}", f"tokens={cache}", f"train.workers={workers}"]) == 0
    assert_same(tmp_path / "run", uncached)


def test_a_cache_of_a_bf16_run_has_its_codes_and_says_that_a_float32_run_has_others(recipe, tmp_path, capsys):
    AcceleratorState._reset_state()
    try:
        make_tokens.make(recipe, ["train.precision=bf16"], tmp_path / "cache")
        for name, cached in (("whole", []), ("cached", [f"tokens={tmp_path / 'cache'}"])):
            AcceleratorState._reset_state()
            train.main(recipe, [f"train.run={tmp_path / name}", "train.precision=bf16", *cached])
        assert_same(tmp_path / "cached", tmp_path / "whole")
        assert "dtype bfloat16" in capsys.readouterr().err
        AcceleratorState._reset_state()
        train.main(recipe, [f"train.run={tmp_path / 'other'}", f"tokens={tmp_path / 'cache'}"], dry_run=True)
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("tokens "))
        assert "nearly those of a run without it (cache -> run: dtype" in line
    finally:
        AcceleratorState._reset_state()


def test_a_run_may_change_between_cache_and_tokenizer_when_it_resumes(recipe, cache, uncached, tmp_path):
    run = f"train.run={tmp_path / 'run'}"
    assert train.main(recipe, [run, f"tokens={cache}"], stop=lambda step: step == 4) == stopping.STOPPED
    assert train.main(recipe, [run], stop=lambda step: step == 8) == stopping.STOPPED
    assert train.main(recipe, [run, f"tokens={cache}"]) == stopping.DONE
    assert_same(tmp_path / "run", uncached)


def test_a_run_needs_no_tokenizer_beside_its_cache(dataset, cache, uncached, tmp_path):  # noqa: F811
    path = write_recipe(tmp_path, dataset, tmp_path / "nowhere")
    assert train.main(path, [f"train.run={tmp_path / 'run'}", f"tokens={cache}"]) == stopping.DONE
    assert_same(tmp_path / "run", uncached)


@pytest.mark.parametrize(
    "options", [{"data__repeats": 2, "train__micro_batches": 2}, {"data__view": {"name": "gray_crop"}}]
)
def test_draws_and_accumulation_read_the_same_codes_as_the_tokenizer_writes(
    dataset,  # noqa: F811
    tokenizer_folder,
    tmp_path,
    options,
):
    path = write_recipe(tmp_path, dataset, tokenizer_folder, **options)
    make_tokens.make(path, [], tmp_path / "tokens")
    train.main(path, [f"train.run={tmp_path / 'uncached'}"])
    train.main(path, [f"train.run={tmp_path / 'cached'}", f"tokens={tmp_path / 'tokens'}"])
    assert_same(tmp_path / "cached", tmp_path / "uncached")


def test_sources_by_weight_have_a_cache_too(dataset, shards, tokenizer_folder, tmp_path):  # noqa: F811
    sources = [{"path": str(dataset), "weight": 1.0}, {"path": str(shards), "weight": 2.0}]
    path = write_recipe(tmp_path, None, tokenizer_folder, data__path=None, data__sources=sources)
    make_tokens.make(path, [], tmp_path / "tokens")
    train.main(path, [f"train.run={tmp_path / 'uncached'}"])
    train.main(path, [f"train.run={tmp_path / 'cached'}", f"tokens={tmp_path / 'tokens'}"])
    assert_same(tmp_path / "cached", tmp_path / "uncached")


def test_what_fills_the_slot_of_a_bad_sample_has_its_own_codes(dataset, tokenizer_folder, tmp_path):  # noqa: F811
    shutil.copytree(dataset, tmp_path / "damaged")
    damage.spoil_images(tmp_path / "damaged", [2, 9, 17])
    path = write_recipe(tmp_path, tmp_path / "damaged", tokenizer_folder)
    report = make_tokens.make(path, [], tmp_path / "tokens")
    assert report.num_bad == 3
    train.main(path, [f"train.run={tmp_path / 'uncached'}"])
    train.main(path, [f"train.run={tmp_path / 'cached'}", f"tokens={tmp_path / 'tokens'}"])
    assert_same(tmp_path / "cached", tmp_path / "uncached")
    assert lines(tmp_path / "cached")[-1]["num_bad"] == 3


def test_a_sample_that_came_out_of_the_quarantine_is_not_trained_on_codes_that_nobody_made(
    dataset,  # noqa: F811
    tokenizer_folder,
    tmp_path,
):
    shutil.copytree(dataset, tmp_path / "data")
    damage.quarantine(Dataset.open(tmp_path / "data"), [4])
    path = write_recipe(tmp_path, tmp_path / "data", tokenizer_folder)
    make_tokens.make(path, [], tmp_path / "tokens")
    (tmp_path / "data" / "quarantine.json").unlink()
    with pytest.raises(DataError, match=r"codes-00000.npy: sample 4 of the dataset has no codes, it could not be"):
        train.main(path, [f"train.run={tmp_path / 'run'}", f"tokens={tmp_path / 'tokens'}"])


@pytest.mark.slow
def test_two_processes_make_the_cache_of_one_and_train_with_it(recipe, uncached, tmp_path):
    """Each of the two sees half of a batch, as one process does in two micro-batches."""
    made = launch(2, "tokens", "make", recipe, "--out", tmp_path / "two", "--json")
    assert json.loads(made.stdout)["num_samples"] == 23
    make_tokens.make(recipe, ["train.micro_batches=2"], tmp_path / "one")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    launched = launch(2, "train", recipe, f"train.run={tmp_path / 'run'}", f"tokens={tmp_path / 'two'}")
    assert "codes of a run without it" in launched.stderr
    one, two = lines(uncached), lines(tmp_path / "run")
    assert [entry["fingerprint"] for entry in two] == [entry["fingerprint"] for entry in one]
    assert [entry["loss"] for entry in two] == pytest.approx([entry["loss"] for entry in one], abs=1e-5)


def launch(ranks, *arguments):
    """Run `mim` as users launch it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks),
               "-m", "mim", *map(str, arguments)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


# ---- views ---------------------------------------------------------------------------------------


def test_views_come_again_every_k_epochs_and_masks_do_not(dataset):  # noqa: F811
    """23 samples in batches of one epoch each, in orders of their own."""
    found = list(rendered(dataset, views=2, epochs=4))
    for early, late in ((0, 2), (1, 3)):
        assert found[early]["images"].equal(found[late]["images"])
        assert not found[early]["mask"].equal(found[late]["mask"])
        assert not found[early]["noise"].equal(found[late]["noise"])
    assert not found[0]["images"].equal(found[1]["images"])


def test_no_more_epochs_than_views_are_the_epochs_of_a_run_without_views(dataset):  # noqa: F811
    for one, other in zip(rendered(dataset, views=3, epochs=3), rendered(dataset, views=None, epochs=3), strict=True):
        assert one["images"].equal(other["images"])
        assert one["mask"].equal(other["mask"])


def rendered(path, *, views, epochs):
    """A batch for every epoch, on the device, its rows by sample."""
    data = Dataset.open(path)
    batches = stream.loader(
        data,
        order=Order(data.id, data.counts, seed=0),
        view=augment.crop,
        sizes=[(8, 8)],
        mask=lambda rng: rng.permutation(16) < 4,
        jitter=0.4,
        batch_size=len(data),
        num_steps=epochs,
        views=views,
    )
    for batch in batches:
        rows = torch.tensor(np.argsort(batch["keys"]))
        moved = stream.to_device(batch, torch.device("cpu"))
        yield {name: moved[name][rows] for name in ("images", "mask", "noise")}


# ---- making --------------------------------------------------------------------------------------


def test_other_micro_batches_give_nearly_the_same_codes(recipe, cache, tmp_path):
    make_tokens.make(recipe, ["optim.batch_size=11"], tmp_path / "other")
    assert (codes_of(tmp_path / "other") == codes_of(cache)).mean() >= 0.999


def test_a_dry_run_tells_the_size_and_the_time_and_writes_nothing(recipe, cache, tmp_path):
    planned = make_tokens.make(recipe, [], tmp_path / "none", dry_run=True)
    assert not (tmp_path / "none").exists()
    files = list(cache.glob("*.npy"))
    headers = sum(file.stat().st_size for file in files) - planned.num_bytes  # of the .npy format
    assert headers == 128 * len(files)
    assert planned.num_bytes == 23 * VIEWS * 16 * 2  # 16 codes of two bytes
    assert planned.seconds > 0


KILLED_AT_THE_SECOND_SHARD = """
import os, signal, sys
from mim.__main__ import cli
from mim.data import tokens

honest = tokens.write_codes

def write_codes(folder, shard, codes):
    if shard == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return honest(folder, shard, codes)

tokens.write_codes = write_codes
cli(sys.argv[1:])
"""


def test_a_killed_making_goes_on_and_gives_the_same_bytes(recipe, cache, tmp_path):
    out = tmp_path / "tokens"
    first = out / "codes-00000.json"
    command = [sys.executable, "-c", KILLED_AT_THE_SECOND_SHARD, "tokens", "make", recipe, "--out", str(out)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    kept = first.stat().st_mtime_ns
    assert not (out / LOCK).exists()
    with pytest.raises(ConfigError, match="is no token cache, or one that is not finished"):
        TokenCache.open(out)
    report = make_tokens.make(recipe, [], out)
    assert report.num_reused == 1
    assert first.stat().st_mtime_ns == kept
    assert contents(out) == contents(cache)


def test_parts_joined_are_the_whole(recipe, cache, tmp_path):
    out = tmp_path / "tokens"
    make_tokens.make(recipe, [], out, part=parse_part("2/2"))
    with pytest.raises(ConfigError, match=r"1 of 2 parts are missing: run --part 1/2"):
        make_tokens.join(out)
    make_tokens.make(recipe, [], out, part=parse_part("1/2"))
    assert make_tokens.join(out).num_samples == 23
    assert make_tokens.join(out).num_samples == 23
    assert contents(out) == contents(cache)


def contents(folder):
    """Codes and lock of a cache: all that a reader reads."""
    return {file.name: file.read_bytes() for file in [*folder.glob("*.npy"), folder / LOCK]}


def test_making_again_repairs_what_is_damaged_and_nothing_else(recipe, cache, tmp_path):
    out = tmp_path / "tokens"
    shutil.copytree(cache, out)
    flip(out / "codes-00001.npy")
    report = make_tokens.make(recipe, [], out)
    assert report.num_reused == len(list(cache.glob("*.npy"))) - 1
    assert contents(out) == contents(cache)


def flip(file):
    """Turn one bit of the last code."""
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(("num_codes", "dtype"), [(16, "uint16"), (65535, "uint16"), (65536, "uint32")])
def test_the_type_of_the_codes_has_room_for_them_and_for_none(num_codes, dtype):
    found = code_dtype(num_codes)
    assert found == dtype
    assert missing(found) >= num_codes


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.views=3", r"holds 2 views of an image, but data.views=3; set data.views=2"),
        ("data.views=null", r"holds 2 views of an image, but data.views=None; set data.views=2"),
        ("data.seed=1", r"seed: 0 -> 1"),
        ("data.jitter=0.2", r"jitter: 0.4 -> 0.2"),
        ("data.view.hflip=0.0", r"view.hflip: 0.5 -> 0.0"),
        ("data.view.scale=[0.5,1.0]", r"view.scale: \[0.2, 1.0\] -> \[0.5, 1.0\]"),
        ("data.view.name=gray_crop", r"view.name: 'crop' -> 'gray_crop'"),
        ("data.repeats=2", r"repeats: 1 -> 2"),
        ("data.range=[0,100]", r"range: \[\[0, 255\], .* -> \[\[0, 100\]"),
        ("data.image_size=32", r"grid: \[4, 4\] -> \[8, 8\]; sizes: "),
        ("encoder.patch_size=8", r"grid: \[4, 4\] -> \[2, 2\]; sizes: "),
    ],
)
def test_a_cache_of_other_views_is_refused_with_both_values(recipe, cache, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message) as refused:
        train.main(recipe, [f"train.run={tmp_path / 'run'}", f"tokens={cache}", override])
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_view_that_states_its_defaults_is_the_same_view(recipe, cache):
    overrides = [f"tokens={cache}", "data.view.hflip=0.5", "data.view.scale=[0.2,1.0]"]
    assert train.main(recipe, overrides, dry_run=True) == stopping.DONE


def test_a_cache_of_another_dataset_is_refused_with_both_ids(recipe, cache, shards):
    theirs, ours = TokenCache.open(cache).binding["dataset_id"], Dataset.open(shards / "train").id
    with pytest.raises(ConfigError, match=f"dataset_id: '{theirs}' -> '{ours}'"):
        train.main(recipe, [f"tokens={cache}", f"data.path={shards}"], dry_run=True)


def test_a_cache_of_another_tokenizer_is_refused_with_both_hashes(recipe, cache, tokenizer_folder, tmp_path):
    other = save_tokenizer(tmp_path / "other", seed=1)
    theirs, ours = (tokenizers.file_hash(folder) for folder in (tokenizer_folder, other))
    with pytest.raises(ConfigError, match=f"tokenizer: '{theirs}' -> '{ours}'"):
        train.main(recipe, [f"tokens={cache}", f"tokenizer.path={other}"], dry_run=True)


def test_a_cache_of_another_number_of_codes_is_refused(recipe, cache):
    with pytest.raises(ConfigError, match=r"objective.num_codes=99, but the tokenizer has 16 codes"):
        train.main(recipe, [f"tokens={cache}", "objective.num_codes=99"], dry_run=True)


def test_a_recipe_without_a_tokenizer_refuses_a_cache(recipe, cache):
    with pytest.raises(ConfigError, match="holds the codes of a frozen tokenizer, but this recipe has none"):
        train.main(recipe, [f"tokens={cache}", "tokenizer=null"], dry_run=True)


def test_a_flipped_bit_is_found_before_its_codes_are_trained_on(recipe, cache, tmp_path):
    shutil.copytree(cache, tmp_path / "tokens")
    flip(tmp_path / "tokens" / "codes-00002.npy")
    with pytest.raises(DataError, match=r"codes-00002.npy is damaged: its sha256 is .* again, which makes what is"):
        train.main(recipe, [f"train.run={tmp_path / 'run'}", f"tokens={tmp_path / 'tokens'}"])


@pytest.mark.parametrize("damaged", ["cut", "gone"])
def test_a_cut_or_missing_file_is_found_at_the_start(recipe, cache, tmp_path, damaged):
    shutil.copytree(cache, tmp_path / "tokens")
    file = tmp_path / "tokens" / "codes-00002.npy"
    content = file.read_bytes()
    file.unlink()
    if damaged == "cut":
        file.write_bytes(content[:-1])
    expected = f"has {len(content) - 1} bytes instead of {len(content)}" if damaged == "cut" else "is missing"
    with pytest.raises(DataError, match=f"codes-00002.npy {expected}"):
        train.main(recipe, [f"train.run={tmp_path / 'run'}", f"tokens={tmp_path / 'tokens'}"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 1, "tokenizer": {}}'])
def test_a_lock_that_is_none_is_one_sentence(tmp_path, text):
    (tmp_path / LOCK).write_text(text)
    with pytest.raises(DataError, match="is not a lock of a token cache"):
        TokenCache.open(tmp_path)


def test_a_newer_format_is_refused(tmp_path):
    (tmp_path / LOCK).write_text('{"format": 99}')
    with pytest.raises(DataError, match="has format 99, newer than the 1 that this version reads"):
        TokenCache.open(tmp_path)


def test_another_cache_is_not_written_over(recipe, cache, tmp_path):
    with pytest.raises(ConfigError, match=r"holds another token cache, there -> now: binding.seed: 0 -> 1"):
        make_tokens.make(recipe, ["data.seed=1"], cache)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"is not empty \(it holds 'notes.txt'\)"):
        make_tokens.make(recipe, [], tmp_path)


def test_the_number_of_views_must_be_said_once(recipe, tmp_path):
    with pytest.raises(ConfigError, match=r"--views 3 differs from data.views=2 of the recipe"):
        make_tokens.make(recipe, [], tmp_path / "out", views=3)
    with pytest.raises(ConfigError, match="the number of views is missing; give --views K"):
        make_tokens.make(recipe, ["data.views=null"], tmp_path / "out")
    with pytest.raises(ConfigError, match=r"data.views=0 must be at least 1"):
        train.main(recipe, ["data.views=0"], dry_run=True)


# ---- evaluations ---------------------------------------------------------------------------------


def test_evaluations_of_a_cached_run_load_its_tokenizer_and_say_what_they_say_of_an_uncached_one(
    recipe, cache, uncached, tmp_path
):
    overrides = ["evals.codebook={every: 13 steps, batch_size: 6}"]
    for name, more in (("cached", [f"tokens={cache}"]), ("uncached", [])):
        train.main(recipe, [f"train.run={tmp_path / name}", *more, *overrides])
    assert lines(tmp_path / "cached") == lines(tmp_path / "uncached")
    assert lines(tmp_path / "cached")[-1]["eval"] == "codebook"
    loaded = build.load_run(tmp_path / "cached")
    assert isinstance(loaded.frozen["tokenizer"], torch.nn.Module)


def test_an_evaluation_without_the_tokenizer_is_refused_and_others_are_not(dataset, cache, tmp_path):  # noqa: F811
    path = write_recipe(tmp_path, dataset, tmp_path / "nowhere")
    more = [f"train.run={tmp_path / 'run'}", f"tokens={cache}", f"data.val_path={dataset}"]
    assert train.main(path, [*more, "evals.ridge={every: 13 steps}"]) == stopping.DONE
    assert lines(tmp_path / "run")[-1]["eval"] == "ridge"
    with pytest.raises(ConfigError, match="this evaluation needs the tokenizer, and the run has only its codes"):
        train.main(path, [*more, f"train.run={tmp_path / 'other'}", "evals.reconstruction={every: 1 steps}"])
    loaded = build.load_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="this evaluation needs the tokenizer"):
        dict(reconstruction.run(loaded, reconstruction.Config()))


def test_a_plan_of_a_cached_run_counts_no_tokenizer(recipe, cache, capsys):
    def planned(*overrides):
        assert dry_run.main(recipe, list(overrides), as_json=True) == stopping.DONE
        return json.loads(capsys.readouterr().out)

    cached, uncached = planned(f"tokens={cache}"), planned()
    tokenizer = uncached["parts"].pop("tokenizer")
    assert cached["parts"] == uncached["parts"]
    assert cached["flops_per_image"] == pytest.approx(uncached["flops_per_image"] - tokenizer["forward"])


def test_a_red_tokenizer_is_refused_from_its_cache_too(dataset, tmp_path):  # noqa: F811
    folder = save_tokenizer(tmp_path / "tokenizer")
    description = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**description, "card": {"usage": 0.01, "perplexity": 2.0}}))
    path = write_recipe(tmp_path, dataset, folder)
    with pytest.raises(ConfigError, match="is red: 1% of the codes are used"):
        make_tokens.make(path, [], tmp_path / "tokens")
    make_tokens.make(path, ["tokenizer.force=true"], tmp_path / "tokens")
    with pytest.raises(ConfigError, match=r"is red: 1% of the codes are used.*or set tokenizer.force=true"):
        train.main(path, [f"tokens={tmp_path / 'tokens'}"], dry_run=True)


# ---- rendering -----------------------------------------------------------------------------------


def test_views_of_a_sample_are_decoded_once_and_a_substitute_serves_only_its_own_epoch(dataset, tmp_path, monkeypatch):  # noqa: F811
    shutil.copytree(dataset, tmp_path / "data")
    data = damage.spoil_images(tmp_path / "data", [1])
    decoded = []
    monkeypatch.setattr(stream, "open_image", lambda *options: decoded.append(1) or open_image(*options))
    renderer = stream.Renderer(data, augment.crop, [(8, 8)], None, 3, seed=0, views=4)
    epoch, zero = np.arange(4), np.zeros(4, dtype=np.int64)
    good = renderer.render(Slots(epoch, zero, zero, zero, zero), 4, 4)
    assert good["samples"] == [0] * 4
    assert len(decoded) == 1
    assert len({images.numpy().tobytes() for images in good["images"]}) == 4
    others = [Place(0, 2, 2), Place(0, 3, 3), Place(0, 4, 4), Place(0, 2, 2)]
    bad = renderer.render(Slots(epoch, zero, zero + 1, zero + 1, zero), 4, 4, lambda row, attempt: others[row])
    assert bad["samples"] == [2, 3, 4, 2]


def test_the_loader_of_a_cached_run_is_measured_without_the_tokenizer_s_images(recipe, cache, monkeypatch):
    measured = {}
    found = SimpleNamespace(json=dict)
    monkeypatch.setattr("mim.data.diagnosis.measure", lambda _, **options: measured.update(options) or found)
    for override, sizes in ((f"tokens={cache}", [(16, 16)]), ("tokens=null", [(16, 16), (32, 32)])):
        command = ["bench", "data", recipe, override, "--json"]
        assert CliRunner().invoke(cli, command, catch_exceptions=False).exit_code == 0
        assert measured["sizes"] == sizes
