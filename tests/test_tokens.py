"""The token cache: a cached run is the uncached one, and nothing but its own codes is ever trained on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tokenizer as tokenizers
from mim import build, make_tokens, train
from mim.config import ConfigError, to_yaml
from mim.contracts import DataError
from mim.data import quarantine
from mim.data.parts import parse_part
from mim.data.tokens import LOCK, TokenCache, code_dtype, missing
from tests import damage
from tests.conftest import TINY
from tests.killed import kill_when
from tests.test_train import assert_same, dataset, lines, tensors  # noqa: F401  (dataset is a fixture)
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
    assert train.main(recipe, [f"train.run={folder}"]) == train.DONE
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


def test_a_run_may_change_between_cache_and_tokenizer_when_it_resumes(recipe, cache, uncached, tmp_path):
    run = f"train.run={tmp_path / 'run'}"
    assert train.main(recipe, [run, f"tokens={cache}"], stop=lambda step: step == 4) == train.STOPPED
    assert train.main(recipe, [run], stop=lambda step: step == 8) == train.STOPPED
    assert train.main(recipe, [run, f"tokens={cache}"]) == train.DONE
    assert_same(tmp_path / "run", uncached)


def test_a_run_needs_no_tokenizer_beside_its_cache(dataset, cache, uncached, tmp_path):  # noqa: F811
    path = write_recipe(tmp_path, dataset, tmp_path / "nowhere")
    assert train.main(path, [f"train.run={tmp_path / 'run'}", f"tokens={cache}"]) == train.DONE
    assert_same(tmp_path / "run", uncached)
