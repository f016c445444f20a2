"""What tests share: a small labelled image folder with structure to learn, its shards, and tiny runs."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tokenizer as tokenizers
from mim import build, config
from mim.contracts import LoadedRun
from mim.data.make import make
from mim.data.shards import Dataset
from mim.patches import patchify, unpatchify
from tests.tiny import shapes
from tokenizer import dvae

torch.set_num_threads(1)  # on tensors this small, threads cost more than they bring

CLASSES = ("columns", "rows", "slopes")
CONVOLUTIONS = {"target": "pixels", "network": "conv", "stride": 8, "width": 8, "depth": 1, "decoder_width": 8}
TINY = {
    "vit": {"model": "vit_tiny_patch16_224", "width": 32, "depth": 2, "num_heads": 2, "patch_size": 8},
    "eva": {"model": "eva02_tiny_patch14_224", "width": 32, "depth": 2, "num_heads": 2, "patch_size": 8},
    "mim.encoders.beit": {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 8},  # a name of two folders
    "dense": {
        "model": "swin_tiny_patch4_window7_224",
        "options": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    },
    "dvae": {"num_codes": 16, "width": 8, "n_init": 8, "num_groups": 4, "blocks_per_group": 1},
    "vqkd": {**CONVOLUTIONS, "num_codes": 16, "code_width": 8},
    "fsq": {**CONVOLUTIONS, "levels": [4, 4]},
    "mae": {"decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 2},
    "beit": {"num_codes": 16},
    "beit2": {"num_codes": 16, "early_layer": 1},
    "segment": {"num_classes": 5, "channels": 16, "auxiliary_channels": 16},
    "classify": {"num_classes": 3},
    "linear": {"epochs": 1, "min_updates": 40},
    "attentive": {"epochs": 1, "min_updates": 20},
}  # options that make a component small; one that is not named here is small enough as it is


def repainted(images, which, patch_size):
    """The same images with other pixels in the patches where `which` (B, N) is True."""
    grid = images.shape[2] // patch_size, images.shape[3] // patch_size
    patches = patchify(images, patch_size)
    return unpatchify(torch.where(which[..., None], 1 - patches, patches), grid, images.shape[1])


def shaken(module):
    """The module in evaluation mode with random weights: tokens, biases and gammas start at zero or equal."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return module.eval()


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """96 images in 3 classes: stripes of a direction and colour of the class's own, with noise; JPEG and PNG."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(96):
        label = i % 3
        rows, columns = np.mgrid[: 36 + i % 5, : 40 + i % 7]
        along = (columns, rows, rows + columns)[label]
        wave = (0.5 + np.sin(along / 2 + rng.uniform(0, 6)))[..., None] * np.eye(3)[label]  # (H, W, 3)
        pixels = (110 + 70 * wave + rng.normal(0, 12, wave.shape)).clip(0, 255).astype(np.uint8)
        path = root / CLASSES[label] / f"{i:02d}.{'jpg' if i % 2 else 'png'}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root


@pytest.fixture(scope="session")
def shards(image_folder, tmp_path_factory):
    """The dataset folder made from the images: train/ and val/, labelled, several shards."""
    out = tmp_path_factory.mktemp("shards") / "stripes"
    make(image_folder, out, labels_from_folders=True, val_ratio=0.3, shard_size=20, workers=1)
    return out


@pytest.fixture(scope="session")
def saved_tokenizer(tmp_path_factory):
    """A folder that holds an untrained tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokenizer")
    options = TINY["dvae"]
    tokenizers.save(dvae.build(dvae.Config(**options)), folder, name="dvae", config=options, card={})
    return folder


@pytest.fixture(scope="session")
def drawn_shapes(tmp_path_factory):
    """A dataset folder with label maps: train/ and val/, 5 classes of pixels."""
    return shapes(tmp_path_factory.mktemp("shapes"), val_ratio=0.3).parent


@pytest.fixture
def recipe(shards, saved_tokenizer, request):
    """`recipe(objective)`: the sections of a tiny recipe, a fresh copy at every call."""

    def sections(objective="mae"):
        found = {
            "data": {"path": str(shards), "image_size": 32, "view": {"name": "crop"}},
            "objective": {"name": objective, **TINY.get(objective, {})},
            "optim": {"batch_size": 8, "length": "2 steps", "warmup": "1 steps", "lr": 1e-3},
        }
        if objective == "tokenize":
            found["tokenizer"] = {"name": "dvae", **TINY["dvae"]}
        else:
            found["encoder"] = {"name": "vit", **TINY["vit"]}
            if objective not in ("classify", "segment"):
                found["mask"] = {"name": "random", "ratio": 0.5}
        if objective in ("beit", "beit2"):
            found["tokenizer"] = {"recipe": "dvae", "path": str(saved_tokenizer)}
        if objective == "segment":
            views = {"view": {"name": "segment_crop"}, "eval_view": {"name": "segment_whole"}}
            found["data"] |= {"path": str(request.getfixturevalue("drawn_shapes")), **views}
        return copy.deepcopy(found)

    return sections


@pytest.fixture
def write(recipe, tmp_path):
    """`write(objective, section__key=value)`: the path of a tiny recipe with changes."""

    def write(objective="mae", **changes):
        sections = recipe(objective) | {"train": {"cpu": True, "workers": 0}}
        for key, value in changes.items():
            section, _, name = key.partition("__")
            sections[section] = sections.get(section, {}) | ({name: value} if name else value)
        path = tmp_path / f"{objective}.yaml"
        path.write_text(config.to_yaml(sections))
        return str(path)

    return write


@pytest.fixture
def loaded_run(recipe, tmp_path):
    """`loaded_run(objective)`: an untrained run of a tiny recipe, as evaluations and exports see it."""

    def load(objective="mae", **encoder):
        sections = recipe(objective)
        sections.get("encoder", {}).update(encoder)
        torch.manual_seed(0)
        built = build.build(sections, dataset=Dataset.open(Path(sections["data"]["path"]) / "train"))
        built.objective.eval().requires_grad_(False)
        return LoadedRun(built.objective, built.encoder, built.frozen, built.views, built.sections, 7, tmp_path / "run")

    return load


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    """A home of its own for every test: caches begin empty, and nobody's are touched."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
