"""Every recipe that ships is complete: it builds, its schedule resolves, and it tells its command."""

import re
from pathlib import Path

import pytest
import torch

from mim import build, config, optim, train

RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def sections(path):
    return config.plain(config.typed(train.Config, config.read(str(path))))


def test_there_are_recipes():
    assert RECIPES


def test_a_recipe_builds_without_its_data_and_without_memory(sections):
    with torch.device("meta"):
        built = build.build(sections, load_frozen=False)
    assert sum(p.numel() for p in built.objective.parameters() if p.requires_grad) > 0
    assert all(p.is_meta for p in built.objective.parameters())
    assert not [p for network in built.frozen.values() for p in network.parameters() if p.requires_grad]


def test_a_recipe_builds_again_from_what_its_run_would_save(sections):
    with torch.device("meta"):
        resolved = build.build(sections, load_frozen=False).sections
        assert build.build(resolved, load_frozen=False).sections == resolved


def test_a_schedule_resolves_for_small_and_large_data_sets(sections):
    cfg = config.typed(train.Config, sections).optim
    for num_images in (4_000, 50_000):
        rates = optim.resolve(cfg, num_images)
        assert rates.total_steps > 0
        assert rates.at(0)[0] > 0
        assert rates.at(rates.total_steps - 1)[0] <= rates.lr


def test_evaluations_and_intervals_are_real(sections):
    for name, section in sections["evals"].items():
        config.component("mim.evals", train.eval_section(name, section), f"evals.{name}")
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
