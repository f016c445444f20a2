"""Recipes: what is wrong is said in one line with the remedy, and nothing outside the file can leak in."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mim import config, job
from mim.config import ConfigError
from mim.data import stream


@dataclass
class Inner:
    weight_decay: float = 0.05
    steps: int = 3


@dataclass
class Outer:
    name: str
    size: int = 1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    inner: Inner = field(default_factory=Inner)
    free: dict[str, Any] = field(default_factory=dict)


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "recipe.yaml").write_text(text)
        return str(tmp_path / "recipe.yaml")

    return write


def refusal(call, *arguments) -> str:
    """The message of the ConfigError that a call raises; it has one line."""
    with pytest.raises(ConfigError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- reading -------------------------------------------------------------------------------------


def test_a_recipe_is_plain_data_with_overrides_parsed_as_yaml(write):
    path = write("optim: {lr: 1.0e-3, length: 10 epochs}\n")
    read = config.read(path, ["optim.lr=2e-3", "data.size=[16, 24]", "optim.clip=null", "optim.length=20 epochs"])
    assert read == {"optim": {"lr": 0.002, "length": "20 epochs", "clip": None}, "data": {"size": [16, 24]}}
    assert type(read["data"]["size"]) is list


def test_a_section_of_null_is_taken_out(write):
    path = write("evals: {knn: {every: 1 epochs}}\noptim: {lr: 1.0e-3}\n")
    assert config.read(path, ["evals=null", "optim.clip=null"]) == {"optim": {"lr": 0.001, "clip": None}}


@pytest.mark.parametrize("name", ["mae_vittiny_cifar10", "mae_vittiny_cifar10.yaml"])
def test_a_recipe_that_ships_is_found_by_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.find_recipe(name).name == "mae_vittiny_cifar10.yaml"


def test_a_file_in_the_working_folder_goes_before_a_shipped_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mae_vittiny_cifar10").write_text("mine: {}")
    assert config.read("mae_vittiny_cifar10") == {"mine": {}}


def test_an_unknown_recipe_lists_the_known_ones_and_the_closest():
    message = refusal(config.read, "mae_vitiny_cifar10")
    assert "no recipe 'mae_vitiny_cifar10'" in message
    assert message.endswith("did you mean 'mae_vittiny_cifar10'?")
    shipped = Path(__file__).parent.parent / "configs"
    assert all(file.stem in message for file in shipped.glob("*.yaml"))


@pytest.mark.parametrize("text", ["a: {b: '${oc.env:HOME}'}", "a: {b: [1, {c: 'x ${a.d}'}]}"])
def test_an_interpolation_is_refused(write, text):
    message = refusal(config.read, write(text))
    assert "holds an interpolation" in message
    assert "a.b" in message


def test_an_interpolation_on_the_command_line_is_refused(write):
    assert "a.b='${oc.env:HOME}'" in refusal(config.read, write("a: {b: 1}"), ["a.b=${oc.env:HOME}"])


def test_an_interpolation_is_refused_wherever_a_section_comes_from():
    """A run directory that someone else made must not read this machine's environment."""
    for section in ({"name": "${oc.env:HOME}"}, {"name": "x", "free": {"deep": ["${oc.env:HOME}"]}}):
        assert "holds an interpolation" in refusal(config.typed, Outer, section, "objective")


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("a: 1\na: 2\n", "duplicate key a"),
        ("a: [1\n", "did not find expected ',' or ']'"),
        ("a: !!python/object/apply:os.system [true]\n", "could not determine a constructor"),
        ("- 1\n- 2\n", "is not a recipe: a mapping of sections"),
    ],
)
def test_broken_yaml_is_named_with_its_file_in_one_line(write, text, fact):
    path = write(text)
    message = refusal(config.read, path)
    assert message.startswith(path)
    assert fact in message


@pytest.mark.parametrize("override", ["optim.lr", "--optim.lr=1", "lr 3"])
def test_what_is_no_override_is_refused_with_an_example(write, override):
    message = refusal(config.read, write("a: 1"), [override])
    assert repr(override) in message
    assert "optim.lr=1e-3" in message


def test_an_override_that_does_not_parse_is_refused(write):
    assert "did not find expected" in refusal(config.read, write("a: 1"), ["a=[1"])


# ---- typed sections ------------------------------------------------------------------------------


def test_a_section_becomes_its_dataclass_with_defaults_and_nested_dataclasses():
    cfg = config.typed(Outer, {"name": "x", "inner": {"steps": 5}, "free": {"any": [1, {"thing": 2}]}})
    assert cfg == Outer("x", inner=Inner(steps=5), free={"any": [1, {"thing": 2}]})
    assert type(cfg.betas) is list
    assert type(cfg.free["any"]) is list


def test_a_mistyped_key_is_refused_with_the_nearest_and_the_known():
    message = refusal(config.typed, Outer, {"name": "x", "betsa": [1.0]}, "optim")
    assert message.startswith("optim.betsa is not a known key; did you mean 'betas'?")
    assert message.endswith("known here: name, size, betas, inner, free")


def test_a_mistyped_key_inside_a_section_is_compared_with_the_keys_of_that_section():
    message = refusal(config.typed, Outer, {"name": "x", "inner": {"wieght_decay": 1}})
    assert message.startswith("inner.wieght_decay is not a known key; did you mean 'weight_decay'?")
    assert message.endswith("known here: weight_decay, steps")


def test_a_key_like_no_other_is_refused_without_a_guess():
    assert "did you mean" not in refusal(config.typed, Outer, {"name": "x", "zzzzzz": 1})


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ({"size": "many"}, "optim.size", "many"),
        ({"size": 3.5}, "optim.size", "3.5"),
        ({"betas": 0.9}, "optim.betas", ""),
        ({"inner": {"steps": "few"}}, "optim.inner.steps", "few"),
        ({"free": 1}, "optim.free", ""),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_its_key(change, key, value):
    message = refusal(config.typed, Outer, {"name": "x", **change}, "optim")
    assert message.startswith(f"{key}: ")
    assert value in message


def test_a_missing_value_is_named_in_full_with_how_to_set_it():
    for section in ({}, {"name": "???"}):
        message = refusal(config.typed, Outer, section, "data")
        assert message == "data.name is missing; set it in the recipe or as data.name=..."


@pytest.mark.parametrize("section", ["data", "objective", "optim"])
def test_a_missing_section_is_named(section):
    recipe = {"data": {"path": "x"}, "objective": {"name": "mae"}, "optim": {"lr": 1e-3}}
    del recipe[section]
    assert refusal(config.typed, job.Config, recipe) == f"{section} is missing; add this section to the recipe"


def test_a_recipe_without_a_dataset_is_refused_with_the_key():
    message = refusal(config.typed, stream.Config, {"image_size": 32}, "data")
    assert message == "data.path is missing; set it in the recipe or as data.path=..."


@pytest.mark.parametrize("value", ["mae", 3, None, [1]])
def test_what_is_no_section_is_refused(value):
    assert refusal(config.typed, Outer, value, "objective").startswith(f"objective={value!r} must be a section")
    inside = refusal(config.typed, Outer, {"name": "x", "inner": value}, "optim")
    assert inside.startswith(f"optim.inner={value!r} must be a section")


# ---- components ----------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of two components, and of a file and a folder that are none."""
    folder = tmp_path / "animals"
    folder.mkdir()
    source = "from dataclasses import dataclass\n@dataclass\nclass Config:\n    legs: int = 4\n"
    for name in ("dog", "cat"):
        (folder / f"{name}.py").write_text(source)
    (folder / "__init__.py").write_text("")
    (folder / "arithmetic.py").write_text("raise RuntimeError('a file without a Config is not imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "animals"
    for name in [name for name in sys.modules if name.split(".")[0] == "animals"]:
        del sys.modules[name]


def test_the_folder_is_the_registry(package):
    assert config.known_names(package) == ["cat", "dog"]


def test_a_component_is_its_module_and_its_typed_config(package):
    module, cfg = config.component(package, {"name": "dog", "legs": 3}, "animal")
    assert module.__name__ == "animals.dog"
    assert cfg == module.Config(legs=3)


@pytest.mark.parametrize("name", ["dgo", "arithmetic", "os.path", "../dog", "__init__", None, ["dog"]])
def test_an_unknown_component_is_refused_with_the_known_ones(package, name):
    message = refusal(config.component, package, {"name": name}, "animal")
    assert message.startswith(f"animal.name={name!r} is unknown")
    assert message.endswith("choose one of cat, dog")


@pytest.mark.parametrize("section", [None, {}, {"legs": 3}, "dog"])
def test_a_component_without_a_name_is_refused_with_the_known_ones(package, section):
    assert refusal(config.component, package, section, "animal").endswith("missing; choose one of cat, dog")


def test_an_option_of_a_component_is_named_with_its_section(package):
    message = refusal(config.component, package, {"name": "dog", "lgs": 3}, "animal")
    assert message.startswith("animal.lgs is not a known key; did you mean 'legs'?")


# ---- views and masks by name ---------------------------------------------------------------------


def test_a_mask_is_bound_to_its_options():
    mask = config.bind("mim.masking", {"name": "random", "ratio": 0.5}, "mask")
    assert mask((4, 4), np.random.default_rng(0)).sum() == 8


def test_a_view_is_bound_to_its_options():
    view = config.bind("mim.data.augment", {"name": "crop", "scale": [1.0, 1.0], "ratio": [1.0, 1.0], "hflip": 0}, "v")
    image = torch.arange(192, dtype=torch.uint8).reshape(3, 8, 8)
    (whole,) = view(image, np.random.default_rng(0), [(8, 8)])
    assert torch.equal(whole, image)


def test_what_the_section_does_not_give_keeps_the_function_s_own_default():
    mask = config.bind("mim.masking", {"name": "random"}, "mask")
    assert mask((4, 4), np.random.default_rng(0)).sum() == 12


@pytest.mark.parametrize("name", ["blok", "_add_block", "np", "math", "Mask", None, ["block"]])
def test_only_functions_with_options_can_be_selected_by_name(name):
    message = refusal(config.bind, "mim.masking", {"name": name}, "mask")
    assert message.startswith(f"mask.name={name!r} is unknown")
    assert message.endswith("choose one of block, cells, random")


def test_a_function_without_options_is_no_view_and_no_mask(package, tmp_path):
    source = "def chosen(x, *, option: int = 1):\n    return x + option\n\n\ndef other(x):\n    return x\n"
    (tmp_path / package / "functions.py").write_text(source)
    assert config.bind("animals.functions", {"name": "chosen", "option": 2}, "x")(3) == 5
    message = refusal(config.bind, "animals.functions", {"name": "other"}, "x")
    assert message.endswith("choose one of chosen")


@pytest.mark.parametrize(
    ("option", "start"),
    [
        ({"ratoi": 0.5}, "mask.ratoi is not a known key; did you mean 'ratio'?"),
        ({"ratio": "half"}, "mask.ratio: "),
        ({"ratio": None}, "mask.ratio: "),
    ],
)
def test_a_wrong_option_of_a_mask_is_refused(option, start):
    assert refusal(config.bind, "mim.masking", {"name": "random", **option}, "mask").startswith(start)


def test_a_pair_of_numbers_must_have_two():
    message = refusal(config.bind, "mim.data.augment", {"name": "crop", "scale": [0.1, 0.2, 0.3]}, "data.view")
    assert message.startswith("data.view")
    assert "length 3" in message


# ---- identity ------------------------------------------------------------------------------------


def test_the_digest_is_independent_of_the_order_of_keys_and_of_the_kind_of_container():
    one = {"a": 1, "b": {"c": [1, 2], "d": 0.5}}
    other = {"b": {"d": 0.5, "c": (1, 2)}, "a": 1}
    assert config.digest(one) == config.digest(other)
    assert config.digest(Inner()) == config.digest({"steps": 3, "weight_decay": 0.05})


@pytest.mark.parametrize("changed", [{"a": 2, "b": [1, 2]}, {"a": 1, "b": [2, 1]}, {"a": 1}, {"a": "1", "b": [1, 2]}])
def test_the_digest_changes_with_any_value(changed):
    assert config.digest(changed) != config.digest({"a": 1, "b": [1, 2]})


def test_a_difference_is_one_line_per_key_with_both_values():
    old = {"a": {"b": 1, "same": [1]}, "gone": "x"}
    new = {"a": {"b": 2, "same": [1]}, "new": None, "added": 0.5}
    assert config.difference(old, new) == ["a.b: 1 -> 2", "added: None -> 0.5", "gone: 'x' -> None"]
    assert config.difference(old, old) == []


def test_plain_data_survives_yaml(tmp_path):
    value = {"a": {"b": [1, 2.5, None, "null", "1e-3"], "path": Path("x/y")}, "c": Inner()}
    file = tmp_path / "saved.yaml"
    file.write_text(config.to_yaml(value))
    assert config.from_yaml(file) == config.plain(value)
