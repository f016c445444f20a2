"""What every file of a folder must be, whatever its name: a new one is tested as soon as it lies there."""

import ast
import dataclasses
import importlib
import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import tokenizer as tokenizers
from mim import config
from mim.config import ConfigError
from mim.encoders import dense
from mim.patches import mask_to_ids

FOLDERS = {
    "mim.objectives": "build",
    "mim.encoders": "build",
    "mim.evals": "run",
    "mim.exports": "export",
    "tokenizer": "build",
}  # package -> the one function that its files offer
PARTS = {"card", "codebook", "networks", "quantize", "vectors"}  # of tokenizers
KNOWN = {package: config.known_names(package) for package in FOLDERS}
COMPONENTS = [(package, name) for package, names in KNOWN.items() for name in names]
OBJECTIVES = KNOWN["mim.objectives"]
SIZE, ROWS = (32, 32), 3


def options_of(module):
    """Functions that a recipe can select by name: public, with keyword-only options."""
    functions = inspect.getmembers(importlib.import_module(module), inspect.isfunction)
    return [
        name
        for name, function in functions
        if function.__module__ == module
        and not name.startswith("_")
        and any(p.kind is p.KEYWORD_ONLY for p in inspect.signature(function).parameters.values())
    ]


def files_of(package):
    folder = Path(importlib.import_module(package).__file__).parent
    return sorted(file.stem for file in folder.glob("*.py") if file.stem != "__init__")


def tiny_config(package, name):
    options = TINY.get(f"{package}.{name}", TINY.get(name, {}))
    return config.component(package, {"name": name, **options}, "test")


def an_encoder(name="vit"):
    torch.manual_seed(0)
    module, cfg = tiny_config("mim.encoders", name)
    return module.build(cfg, image_size=SIZE, channels=3)


def a_tokenizer(name="dvae"):
    torch.manual_seed(0)
    module, cfg = tiny_config("tokenizer", name)
    return module.build(cfg)


def an_objective(name, encoder="vit"):
    module, cfg = tiny_config("mim.objectives", name)
    return module.build(a_tokenizer() if name == "tokenize" else an_encoder(encoder), cfg)


def a_batch(grid=(4, 4), num_codes=16):
    """Everything that a batch may hold."""
    generator = torch.Generator().manual_seed(0)
    n = grid[0] * grid[1]
    return {
        "images": torch.rand(ROWS, 3, *SIZE, generator=generator),
        "tokenizer_images": torch.rand(ROWS, 3, *SIZE, generator=generator),
        "mask": torch.stack([torch.randperm(n, generator=generator) < n // 2 for _ in range(ROWS)]),
        "num_masked": n // 2,
        "weight": torch.ones(ROWS),
        "noise": torch.arange(ROWS),
        "codes": torch.randint(num_codes, (ROWS, n), generator=generator),
        "labels": torch.arange(ROWS),
        "label_maps": torch.randint(5, (ROWS, *SIZE), generator=generator),
        "keys": [f"shard.tar/{row}" for row in range(ROWS)],
        "position": ROWS,
        "epoch": 0,
        "fingerprint": 0,
    }


# ---- every component -----------------------------------------------------------------------------


@pytest.mark.parametrize("package", FOLDERS)
def test_the_folder_has_components_and_nothing_that_only_looks_like_one(package):
    assert KNOWN[package]
    assert set(files_of(package)) - set(KNOWN[package]) <= (PARTS if package == "tokenizer" else set())


def test_the_tokenizers_that_load_are_those_that_train():
    assert tokenizers.names() == KNOWN["tokenizer"]


@pytest.mark.parametrize(("package", "name"), COMPONENTS)
def test_a_component_tells_what_it_is(package, name):
    source = Path(importlib.import_module(f"{package}.{name}").__file__).read_text()
    assert len((ast.get_docstring(ast.parse(source)) or "").split()) > 5


@pytest.mark.parametrize(("package", "name"), COMPONENTS)
def test_a_component_offers_its_config_and_its_one_function(package, name):
    module = importlib.import_module(f"{package}.{name}")
    assert dataclasses.is_dataclass(module.Config)
    assert inspect.isfunction(getattr(module, FOLDERS[package]))


@pytest.mark.parametrize(("package", "name"), COMPONENTS)
def test_a_config_has_a_default_for_every_field_and_survives_yaml(package, name, tmp_path):
    module = importlib.import_module(f"{package}.{name}")
    cfg = module.Config()
    (tmp_path / "saved.yaml").write_text(config.to_yaml(cfg))
    assert config.typed(module.Config, config.from_yaml(tmp_path / "saved.yaml")) == cfg
    assert json.loads(json.dumps(config.plain(cfg))) == config.plain(cfg)


# ---- objectives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_returns_one_finite_loss_per_sample_and_detached_values(name):
    out = an_objective(name).train()(a_batch(), torch.tensor(0.5))
    assert out["loss"].shape == (ROWS,)
    assert out["loss"].isfinite().all()
    assert out["loss"].requires_grad
    for key, value in out.items():
        assert value.shape in ((ROWS,), ()), key
        assert key == "loss" or not value.requires_grad, key


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_reaches_every_trained_parameter(name):
    objective = an_objective(name).train()
    objective(a_batch(), torch.tensor(0.5))["loss"].sum().backward()
    unreached = [n for n, p in objective.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert unreached == []


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_says_what_it_wraps_and_what_it_reads(name):
    objective = an_objective(name)
    assert objective.per_micro_batch in (True, False)
    needed = {key: value for key, value in a_batch().items() if key in (*objective.reads, "num_masked", "epoch")}
    assert objective.train()(needed, torch.tensor(0.5))["loss"].shape == (ROWS,)
    inner = [p for n, p in objective.named_parameters() if n.startswith("encoder.")]
    assert bool(inner) == (objective.encoder is not None)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_of_a_sample_does_not_depend_on_the_others(name):
    objective = an_objective(name).eval()
    if objective.per_micro_batch:
        pytest.skip("its loss holds statistics of a micro-batch, and it says so")
    batch = a_batch()
    together = objective(batch, torch.tensor(0.5))["loss"]
    for row in range(ROWS):
        one = {k: v[row : row + 1] if torch.is_tensor(v) else v for k, v in batch.items()}
        assert torch.allclose(objective(one, torch.tensor(0.5))["loss"], together[row], atol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_a_function_of_its_batch(name):
    """No hidden draws: the batch and its seeds decide."""
    objective = an_objective(name).eval()
    torch.manual_seed(1)
    first = objective(a_batch(), torch.tensor(0.5))["loss"]
    torch.manual_seed(2)
    assert torch.equal(objective(a_batch(), torch.tensor(0.5))["loss"], first)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_does_not_change_its_batch(name):
    batch, untouched = a_batch(), a_batch()
    an_objective(name).train()(batch, torch.tensor(0.5))
    assert batch.keys() == untouched.keys()
    for key, value in untouched.items():
        assert torch.equal(batch[key], value) if torch.is_tensor(value) else batch[key] == value, key


# ---- encoders ------------------------------------------------------------------------------------


@pytest.fixture(params=KNOWN["mim.encoders"])
def encoder(request):
    return an_encoder(request.param).eval()


@torch.no_grad()
def test_features_fill_the_grid_of_the_encoder(encoder):
    h, w = encoder.grid(SIZE)
    assert (h * encoder.patch_size, w * encoder.patch_size) == SIZE
    features = encoder(a_batch()["images"])
    assert features.patches.shape == (ROWS, h * w, encoder.width)
    assert features.prefix.shape[2] == encoder.width


@torch.no_grad()
def test_replaced_patches_cannot_be_seen(encoder):
    batch = a_batch(encoder.grid(SIZE))
    h, w = encoder.grid(SIZE)
    hidden = batch["mask"].view(ROWS, 1, h, w).repeat_interleave(encoder.patch_size, 2)
    hidden = hidden.repeat_interleave(encoder.patch_size, 3)  # (B, 1, H, W)
    options = {"mask": batch["mask"], "mask_token": torch.randn(1, 1, encoder.width)}
    before = encoder(batch["images"], **options).patches
    assert torch.equal(encoder(torch.where(hidden, 1 - batch["images"], batch["images"]), **options).patches, before)
    assert not torch.equal(encoder(1 - batch["images"], **options).patches, before)


@torch.no_grad()
def test_an_encoder_that_can_drop_returns_the_kept_patches(encoder):
    if not encoder.can_drop:
        pytest.skip("it says that it cannot")
    batch = a_batch(encoder.grid(SIZE))
    ids_keep, _, _ = mask_to_ids(batch["mask"], batch["num_masked"])
    assert encoder(batch["images"], ids_keep=ids_keep).patches.shape == (ROWS, ids_keep.shape[1], encoder.width)


@torch.no_grad()
def test_the_last_layer_with_the_norm_is_the_output(encoder):
    images = a_batch()["images"]
    first, last = encoder.layers(images, [0, -1], norm=True)
    assert torch.equal(last.patches, encoder(images).patches)
    assert not torch.equal(first.patches, last.patches)
    (raw,) = encoder.layers(images, [-1])
    assert torch.equal(encoder.final_norm(raw.patches), last.patches)


def test_more_blocks_go_on_from_raw_features_and_are_trained(encoder):
    images, grid = a_batch()["images"], encoder.grid(SIZE)
    if isinstance(encoder, dense.Dense):
        pytest.skip("it refuses")
    more = encoder.more_blocks(2, encoder.depth - 1)
    (raw,) = encoder.layers(images, [-2])
    found = more(raw, grid)
    assert found.patches.shape == raw.patches.shape
    assert found.prefix.shape == raw.prefix.shape
    found.patches.square().sum().backward()
    owned = dict(more.named_parameters())
    assert owned
    assert not [name for name, p in owned.items() if p.grad is None or not p.grad.any()]
    assert not {p.data_ptr() for p in owned.values()} & {p.data_ptr() for p in encoder.parameters()}


def test_an_encoder_says_how_many_channels_it_takes(encoder):
    assert encoder.channels == encoder.normalize(a_batch()["images"]).shape[1]


@pytest.mark.parametrize("name", KNOWN["mim.encoders"])
def test_an_objective_trains_an_encoder_of_any_kind_or_refuses_it(name):
    served, refusals = [], []
    for objective in set(OBJECTIVES) - {"tokenize"}:
        try:
            wrapped = an_objective(objective, name).train()
        except ValueError as error:
            refusals.append(str(error))
            continue
        served.append(objective)
        loss = wrapped(a_batch(wrapped.encoder.grid(SIZE)), torch.tensor(0.5))["loss"]
        assert loss.isfinite().all(), objective
        loss.sum().backward()
        reached = [p.grad is not None and p.grad.any() for p in wrapped.encoder.parameters() if p.requires_grad]
        assert sum(reached) > len(reached) / 2, objective
    assert served
    assert all("encoder" in refusal for refusal in refusals)


def test_every_parameter_has_a_depth_and_every_depth_a_parameter(encoder):
    depths = {encoder.depth_of(name) for name, _ in encoder.named_parameters()}
    assert depths == set(range(encoder.depth + 2))


def test_what_is_not_decayed_is_named_as_the_parameters_are(encoder):
    names = {name for name, _ in encoder.named_parameters()}
    unknown = {name for name in encoder.no_weight_decay() if name.split(".")[0] not in {n.split(".")[0] for n in names}}
    assert not unknown
    assert encoder.no_weight_decay() & names
    tokens = {name for name in names if any(part in name for part in ("cls_token", "pos_embed", "reg_token"))}
    assert tokens <= encoder.no_weight_decay()


def test_pixels_are_normalised_per_channel(encoder):
    images = a_batch()["images"]
    back = encoder.normalize(images) * encoder.std + encoder.mean
    assert torch.allclose(back, images, atol=1e-6)


# ---- tokenizers ----------------------------------------------------------------------------------


@pytest.fixture(params=KNOWN["tokenizer"])
def a_tokenizer_and_its_name(request):
    return a_tokenizer(request.param).eval(), request.param


@torch.no_grad()
def test_codes_fill_the_grid_and_lie_in_the_codebook(a_tokenizer_and_its_name):
    tokenizer, _ = a_tokenizer_and_its_name
    h, w = tokenizer.grid(SIZE)
    assert (h * tokenizer.stride, w * tokenizer.stride) == SIZE
    codes = tokenizer.encode(a_batch()["images"])
    assert codes.shape == (ROWS, h * w)
    assert codes.dtype == torch.int64
    assert codes.min() >= 0
    assert codes.max() < tokenizer.num_codes


@torch.no_grad()
def test_codes_decode_to_images(a_tokenizer_and_its_name):
    tokenizer, _ = a_tokenizer_and_its_name
    images = a_batch()["images"]
    decoded = tokenizer.decode(tokenizer.encode(images), tokenizer.grid(SIZE))
    assert decoded.shape == images.shape
    assert decoded.min() >= 0
    assert decoded.max() <= 1


def test_an_image_that_the_stride_does_not_divide_is_refused(a_tokenizer_and_its_name):
    tokenizer, _ = a_tokenizer_and_its_name
    with pytest.raises(ValueError, match=str(tokenizer.stride)):
        tokenizer.grid((SIZE[0] + 1, SIZE[1]))


@torch.no_grad()
def test_a_tokenizer_survives_its_two_files(a_tokenizer_and_its_name, tmp_path):
    tokenizer, name = a_tokenizer_and_its_name
    _, cfg = tiny_config("tokenizer", name)
    tokenizers.save(tokenizer, tmp_path, name=name, config=config.plain(cfg), card={})
    images = a_batch()["images"]
    assert torch.equal(tokenizers.load(tmp_path).encode(images), tokenizer.encode(images))


# ---- evaluations and exports ---------------------------------------------------------------------


@pytest.mark.parametrize("name", KNOWN["mim.evals"])
def test_an_evaluation_yields_names_with_numbers_or_pictures_or_refuses_the_run(name, loaded_run):
    module, cfg = tiny_config("mim.evals", name)
    served = []
    for objective in OBJECTIVES:
        loaded = loaded_run(objective)
        try:
            found = dict(module.run(loaded, cfg))
        except ConfigError:
            continue
        served.append(objective)
        assert found
        for key, value in found.items():
            assert isinstance(key, str)
            assert isinstance(value, (float, Image.Image)), key
            assert not isinstance(value, float) or np.isfinite(value), key
    assert served


@pytest.mark.parametrize("name", KNOWN["mim.evals"])
def test_an_evaluation_gives_the_same_every_time(name, loaded_run):
    module, cfg = tiny_config("mim.evals", name)
    for objective in OBJECTIVES:
        loaded = loaded_run(objective)
        try:
            first, second = (dict(module.run(loaded, cfg)) for _ in range(2))
        except ConfigError:
            continue
        for key, value in first.items():
            assert value == second[key], key  # pictures compare by their pixels


@pytest.mark.parametrize("name", KNOWN["mim.exports"])
def test_an_export_writes_a_folder_and_reports_the_difference(name, loaded_run, tmp_path):
    module, cfg = tiny_config("mim.exports", name)
    report = module.export(loaded_run("mae"), tmp_path / "out", cfg)
    assert report["max_difference"] >= 0
    assert report["step"] == 7
    assert any((tmp_path / "out").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", KNOWN["mim.exports"])
def test_an_export_refuses_a_run_without_an_encoder(name, loaded_run, tmp_path):
    module, cfg = tiny_config("mim.exports", name)
    with pytest.raises(ConfigError):
        module.export(loaded_run("tokenize"), tmp_path / "out", cfg)


# ---- views and masks -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", options_of("mim.data.augment"))
def test_a_view_renders_every_size_in_uint8_as_a_function_of_its_generator(name):
    view = config.bind("mim.data.augment", {"name": name}, "view")
    image = torch.randint(256, (3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sizes = [(32, 32), (16, 24)]
    first, again = (view(image, np.random.default_rng(3), sizes) for _ in range(2))
    if isinstance(first, dict):  # crops (V, C, h, w) by their field
        assert first["images"].shape[1:] == (3, 32, 32)
        first, again = list(first.values()), list(again.values())
    elif name == "segment_native":  # one view of the image's own aspect, which covers the first size
        assert [tuple(v.shape) for v in first] == [(3, 32, 40)]
    else:
        assert [tuple(v.shape) for v in first] == [(3, 32, 32), (3, 16, 24)]
    assert all(v.dtype == torch.uint8 for v in first)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("name", options_of("mim.masking"))
@pytest.mark.parametrize("grid", [(14, 14), (4, 6), (2, 2)])
def test_a_mask_has_one_count_on_a_grid_and_is_a_function_of_its_generator(name, grid):
    mask = config.bind("mim.masking", {"name": name}, "mask")
    draws = [mask(grid, np.random.default_rng(i)) for i in range(20)]
    assert all(d.shape == (grid[0] * grid[1],) and d.dtype == bool for d in draws)
    assert len({int(d.sum()) for d in draws}) == 1
    assert 0 < draws[0].sum() < draws[0].size
    assert all(np.array_equal(d, mask(grid, np.random.default_rng(i))) for i, d in enumerate(draws))
