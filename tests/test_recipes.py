"""Every recipe that ships is complete: it builds, its schedule resolves, and it tells its command."""

import functools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mim import build, config, job, looking, optim

IN1K = 1_281_167  # images
PUBLISHED = {  # batch, peak rate, warm-up and all epochs, betas, masked of patches, encoder's million parameters
    "mae_vitb16_in1k": (4096, 2.4e-3, 40, 1600, [0.9, 0.95], (147, 196), 85.8),
    "mae_vitl16_in1k": (4096, 2.4e-3, 40, 1600, [0.9, 0.95], (147, 196), 303.3),
    "mae_vith14_in1k": (4096, 2.4e-3, 40, 1600, [0.9, 0.95], (192, 256), 630.8),
    "beit_vitb16_in1k": (2048, 1.5e-3, 10, 800, [0.9, 0.999], (75, 196), 85.8),
    "beit_vitl16_in1k": (2048, 1.5e-3, 10, 800, [0.9, 0.999], (75, 196), 303.4),
    "beit2_vitb16_in1k": (2048, 1.5e-3, 10, 300, [0.9, 0.98], (75, 196), 85.8),
    "beit2_vitb16_in1k_1600ep": (2048, 1.5e-3, 10, 1600, [0.9, 0.999], (75, 196), 85.8),
    "simmim_vitb16_in1k": (2048, 4e-4, 10, 800, [0.9, 0.999], (120, 196), 85.8),
    "simmim_swinb_in1k": (2048, 8e-4, 10, 100, [0.9, 0.999], (22, 36), 86.7),
}

SEGMENTED = {  # peak rate, where the warm-up begins, positions of the encoder, million parameters of the heads
    "segment_upernet_beitb16_ade20k": (7e-4, 7e-10, "relative", 76.8),
    "segment_upernet_maeb16_ade20k": (1e-4, 1e-10, "learn", 76.8),
}

FINETUNED = {  # batch, peak rate, warm-up and all epochs, layer decay, drop path, head's first std, million parameters
    "classify_maeb16_in1k": (1024, 2e-3, 5, 100, 0.65, 0.1, 2e-5, 85.8),
    "classify_mael16_in1k": (1024, 4e-3, 5, 50, 0.75, 0.2, 2e-5, 303.3),
    "classify_beitb16_in1k": (1024, 4e-3, 20, 100, 0.65, 0.1, 2e-5, 85.8),
    "classify_beitl16_in1k": (1024, 1e-3, 5, 50, 0.75, 0.2, 2e-5, 303.4),
    "classify_beit2b16_in1k": (1024, 5e-4, 20, 100, 0.6, 0.2, 2e-5, 85.8),
    "classify_deits16_in1k": (1024, 1e-3, 5, 300, None, 0.1, 0.02, 21.7),
}

RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def sections(path):
    return config.plain(config.typed(job.Config, config.read(str(path))))


@pytest.fixture
def built(path):
    return built_from(path)


@functools.cache
def built_from(path):
    """What a recipe makes, without memory; no test changes it."""
    with torch.device("meta"):
        return build.build(config.plain(config.typed(job.Config, config.read(str(path)))), load_frozen=False)


def test_there_are_recipes():
    assert RECIPES


def test_a_recipe_builds_without_its_data_and_without_memory(sections, built):
    assert sum(p.numel() for p in built.objective.parameters() if p.requires_grad) > 0
    assert all(p.is_meta for p in built.objective.parameters())
    assert optim.parameter_groups(built.objective, config.typed(job.Config, sections).optim)
    assert not [p for network in built.frozen.values() for p in network.parameters() if p.requires_grad]


def test_a_recipe_builds_again_from_what_its_run_would_save(built):
    with torch.device("meta"):
        assert build.build(built.sections, load_frozen=False).sections == built.sections


def test_a_schedule_resolves_for_small_and_large_data_sets(sections):
    cfg = config.typed(job.Config, sections).optim
    for num_images in (4_000, 50_000):
        rates = optim.resolve(cfg, num_images)
        assert rates.total_steps > 0
        assert rates.at(0)[0] > 0
        assert rates.at(rates.total_steps - 1)[0] <= rates.lr


def test_evaluations_and_intervals_are_real(sections):
    for name, section in sections["evals"].items():
        config.component("mim.evals", looking.eval_section(name, section), f"evals.{name}")
    durations = [section["every"] for section in sections["evals"].values()]
    for duration in (*durations, sections["train"]["log_every"], sections["train"]["save_every"]):
        assert optim.to_steps(duration, batch_size=1, num_images=1000, where="test") > 0


def test_a_tokenizer_s_own_recipe_ships_too(sections):
    if sections["encoder"] is not None and sections["tokenizer"] is not None:
        own = config.read(sections["tokenizer"]["recipe"])
        assert own["tokenizer"]["name"] in config.known_names("tokenizer")


def test_the_header_tells_how_to_run_it(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    commands = re.findall(r"mim train (\S+)", "\n".join(header))
    assert path.stem in commands
    assert path.read_text().startswith("#")


def test_every_section_of_a_recipe_is_a_flat_mapping(path):
    """What can be overridden as section.key=value on the command line is what the file shows."""
    for name, section in config.read(str(path)).items():
        assert isinstance(section, dict), name
        for key, value in section.items():
            inside = value.values() if isinstance(value, dict) else [value]
            assert not any(isinstance(v, dict) for v in inside), f"{name}.{key}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_says_what_was_published(name):
    batch_size, lr, warmup, epochs, betas, masked, millions = PUBLISHED[name]
    cfg = config.typed(job.Config, config.read(name))
    rates = optim.resolve(cfg.optim, IN1K)
    assert (cfg.optim.batch_size, rates.lr, cfg.optim.betas) == (batch_size, pytest.approx(lr), betas)
    assert rates.warmup_steps == math.ceil(warmup * IN1K / batch_size)
    assert rates.total_steps == math.ceil(epochs * IN1K / batch_size)
    with torch.device("meta"):
        built = build.build(config.plain(cfg), load_frozen=False)
    mask = np.asarray(built.views.mask(np.random.default_rng(0)))
    assert (mask.sum(), mask.size) == masked
    assert sum(p.numel() for p in built.encoder.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    assert (cfg.encoder["mean"], cfg.encoder["std"]) == (build.IMAGENET_MEAN, build.IMAGENET_STD)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("beit")])
def test_a_published_recipe_of_codes_reads_them_at_112_pixels(name):
    with torch.device("meta"):
        built = build.build(config.plain(config.typed(job.Config, config.read(name))), load_frozen=False)
    assert built.views.sizes == [(224, 224), (112, 112)]
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in built.frozen["tokenizer"].children()]
    assert sizes == [pytest.approx(53.8, abs=0.05), pytest.approx(43.8, abs=0.05)]  # DALL-E's encoder and decoder


@pytest.mark.parametrize("name", SEGMENTED)
def test_a_published_recipe_of_segmentation_says_what_was_published(name):
    lr, warmup_lr, positions, millions = SEGMENTED[name]
    cfg = config.typed(job.Config, config.read(name))
    rates = optim.resolve(cfg.optim, 20_210)  # images of ADE20K
    assert (rates.total_steps, rates.warmup_steps, cfg.optim.batch_size) == (160_000, 1500, 16)
    assert (rates.lr, cfg.optim.warmup_lr, rates.at(159_999)[0]) == (lr, warmup_lr, 0.0)
    assert rates.at(80_000)[0] == pytest.approx(lr / 2, rel=0.02)  # a line
    assert (cfg.optim.layer_decay, cfg.optim.weight_decay, cfg.encoder["drop_path_rate"]) == (0.65, 0.05, 0.1)
    assert cfg.encoder["positions"] == positions
    objective = built_from(config.find_recipe(name)).objective
    assert [(level.block, level.stride) for level in objective.levels] == [(3, 16), (5, 16), (7, 16), (11, 16)]
    heads = sum(p.numel() for n, p in objective.named_parameters() if not n.startswith("encoder."))
    assert heads / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("name", FINETUNED)
def test_a_published_recipe_of_fine_tuning_says_what_was_published(name):
    batch_size, lr, warmup, epochs, decay, drop_path, std, millions = FINETUNED[name]
    cfg = config.typed(job.Config, config.read(name))
    rates = optim.resolve(cfg.optim, IN1K)
    assert (cfg.optim.batch_size, rates.lr, cfg.optim.betas) == (batch_size, pytest.approx(lr), [0.9, 0.999])
    assert rates.warmup_steps == math.ceil(warmup * IN1K / batch_size)
    assert rates.total_steps == math.ceil(epochs * IN1K / batch_size)
    assert (cfg.optim.layer_decay, cfg.encoder["drop_path_rate"], cfg.optim.weight_decay) == (decay, drop_path, 0.05)
    built = built_from(config.find_recipe(name))
    found = built.objective.cfg
    assert (found.mixup_alpha, found.cutmix_alpha, found.erase_rate, found.label_smoothing) == (0.8, 1.0, 0.25, 0.1)
    assert (found.head_std, found.num_classes) == (std, 1000)
    assert built.views.data.view["policy"] == "rand-m9-mstd0.5-inc1"
    assert sum(p.numel() for p in built.encoder.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("name", [*PUBLISHED, *FINETUNED, *SEGMENTED, "dvae_dalle_in1k"])
def test_every_line_of_a_published_recipe_that_decides_names_its_source(name):
    """The sections of the optimizer and the mask, and what the objective is told."""
    section = ""
    for line in config.find_recipe(name).read_text().splitlines():
        section = line.removesuffix(":") if re.fullmatch(r"\w+:", line) else section
        known = line.strip().startswith(("name:", "num_classes: 1000"))
        if section in ("optim", "objective") and line.startswith("  ") and not known:
            assert "  # " in line, line
