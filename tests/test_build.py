"""The wiring: numbers that contradict each other are refused before anything runs, with the number that is right."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

import tokenizer as tokenizers
from mim import build, frozen_networks
from mim.config import ConfigError

GRAY = SimpleNamespace(path="gray", mean=[0.4], std=[0.2], gray=None, dtype="uint8")
COLOUR = SimpleNamespace(path="colour", mean=[0.5, 0.4, 0.3], std=[0.3, 0.2, 0.1], gray=None, dtype="uint8")
MEASURED = SimpleNamespace(**vars(COLOUR) | {"gray": {"mean": 0.42, "std": 0.15}})
FIVE = SimpleNamespace(path="five", mean=[0.5] * 5, std=[0.2] * 5, gray=None, dtype="uint16")


def refusal(sections) -> str:
    with pytest.raises(ConfigError) as error:
        build.build(sections)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- pixel statistics ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "dataset", "mean", "std"),
    [
        (3, COLOUR, COLOUR.mean, COLOUR.std),
        (1, GRAY, GRAY.mean, GRAY.std),
        (1, COLOUR, [0.4], [0.2]),  # an older lock: the means over the channels
        (1, MEASURED, [0.42], [0.15]),
        (5, FIVE, FIVE.mean, FIVE.std),
        (3, GRAY, [0.4] * 3, [0.2] * 3),
        (3, None, build.IMAGENET_MEAN, build.IMAGENET_STD),
        (1, None, [0.5], [0.5]),
    ],
)
def test_statistics_are_the_dataset_s_own_in_the_channels_that_are_read(channels, dataset, mean, std):
    found = build.statistics(channels, dataset)
    assert found[0] == pytest.approx(mean)
    assert found[1] == pytest.approx(std)


def test_statistics_of_the_recipe_go_before_the_dataset_s(recipe):
    sections = recipe()
    sections["encoder"] |= {"mean": [0.1, 0.2, 0.3]}
    built = build.build(sections, dataset=COLOUR)
    assert built.encoder.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert built.encoder.std.flatten().tolist() == pytest.approx(COLOUR.std)
    assert built.sections["encoder"]["std"] == COLOUR.std


# ---- tokenizer and encoder -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image_size", "stated", "message"),
    [
        (32, 64, "gives a grid of 8x8 codes, but the encoder has 4x4 patches; use tokenizer.image_size=32,"),
        (
            [32, 48],
            32,
            "gives a grid of 4x4 codes, but the encoder has 4x6 patches; use tokenizer.image_size=[32, 48],",
        ),
    ],
)
def test_a_tokenizer_s_image_size_must_give_the_grid_of_the_patches(recipe, image_size, stated, message):
    sections = recipe("beit")
    sections["data"]["image_size"] = image_size
    sections["tokenizer"]["image_size"] = stated
    assert refusal(sections) == f"tokenizer.image_size={stated} {message} or leave it out"


def test_the_tokenizer_s_image_size_follows_from_its_stride_and_the_patches(recipe):
    sections = recipe("beit")
    sections["encoder"]["patch_size"] = 16  # 2 x 2 patches, and codes of 8 pixels
    assert build.build(sections).views.sizes == [(32, 32), (16, 16)]
    sections["tokenizer"]["image_size"] = 16
    assert build.build(sections).views.sizes == [(32, 32), (16, 16)]


def test_the_number_of_codes_must_be_the_tokenizer_s(recipe):
    sections = recipe("beit")
    sections["objective"]["num_codes"] = 8192
    expected = "objective.num_codes=8192, but the tokenizer has 16 codes; set objective.num_codes=16"
    assert refusal(sections) == expected


def test_beit_without_a_tokenizer_is_refused(recipe):
    sections = recipe("beit")
    del sections["tokenizer"]
    expected = "objective.name=beit needs a tokenizer; add tokenizer: {recipe: NAME, path: RUN}"
    assert refusal(sections) == expected


@pytest.mark.parametrize("exists", [True, False])
def test_a_path_without_a_trained_tokenizer_is_refused_with_the_command_that_trains_it(recipe, tmp_path, exists):
    path = tmp_path / "run"
    if exists:
        path.mkdir()
    sections = recipe("beit")
    sections["tokenizer"]["path"] = str(path)
    assert refusal(sections) == (
        f"tokenizer.path={str(path)!r} holds no trained tokenizer; train one first, e.g. "
        f"`mim train dvae train.run={path}`"
    )


def test_a_tokenizer_without_a_path_is_refused(recipe):
    sections = recipe("beit")
    del sections["tokenizer"]["path"]
    assert refusal(sections).startswith("tokenizer.path is missing: the run of a trained tokenizer")


def test_a_mistyped_key_of_a_frozen_tokenizer_is_refused(recipe):
    sections = recipe("beit")
    sections["tokenizer"]["img_size"] = 32
    assert refusal(sections) == "tokenizer.img_size is not a known key; known here: recipe, path, image_size, force"


@pytest.mark.parametrize(("usage", "force", "refused"), [(0.01, False, True), (0.01, True, False), (0.9, False, False)])
def test_a_red_tokenizer_is_refused_unless_forced(saved_tokenizer, tmp_path, usage, force, refused):
    shutil.copytree(saved_tokenizer, tmp_path / "tokenizer")
    description = tmp_path / "tokenizer" / "tokenizer.json"
    card = {"usage": usage, "perplexity": 10.0}
    description.write_text(json.dumps({**json.loads(description.read_text()), "card": card}))
    section = {"recipe": "dvae", "path": str(tmp_path / "tokenizer"), "force": force}
    if refused:
        with pytest.raises(ConfigError, match=r"is red: 1% of the codes are used.*or set tokenizer.force=true"):
            frozen_networks.check_tokenizer(section, tokenizers.load(section["path"]))
    else:
        (line,) = frozen_networks.check_tokenizer(section, tokenizers.load(section["path"]))
        assert (" is red: " if force else " is green: ") in line


# ---- objective -----------------------------------------------------------------------------------


def test_an_objective_of_one_crop_refuses_several(recipe):
    sections = recipe("mae")
    sections["data"]["view"] = {"name": "multi_crop"}
    assert refusal(sections) == "data.view.name=multi_crop, but objective.name=mae reads one crop; use crop"


@pytest.mark.parametrize("objective", ["mae", "beit"])
def test_an_objective_that_reads_a_mask_needs_one(recipe, objective):
    sections = recipe(objective)
    del sections["mask"]
    expected = f"objective.name={objective} needs a mask; add e.g. mask: {{name: random, ratio: 0.75}}"
    assert refusal(sections) == expected


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize(("objective", "head"), [("mae", "decoder_pred"), ("simmim", "head")])
def test_the_pixels_that_are_predicted_have_the_channels_of_the_data(recipe, objective, head, channels):
    sections = recipe(objective)
    sections["data"]["channels"] = channels
    assert getattr(build.build(sections).objective, head).out_features == 8 * 8 * channels


def test_the_channels_of_the_tokenizer_must_be_those_of_the_data(recipe):
    sections = recipe("tokenize")
    sections["tokenizer"]["channels"] = 1
    assert "takes 1 channels, but data.channels=3" in refusal(sections)


# ---- channels and range --------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "dataset"), [(3, FIVE), (1, FIVE), (5, COLOUR)])
def test_other_numbers_of_channels_than_the_dataset_s_are_refused_with_its_own(channels, dataset):
    found = len(dataset.mean)
    with pytest.raises(ConfigError, match=f"data.channels={channels}, .* have {found}; set data.channels={found}"):
        build.statistics(channels, dataset)


def test_gray_views_of_five_channels_or_sixteen_bits_are_refused(recipe):
    sections = recipe()
    sections["data"] |= {"channels": 5, "view": {"name": "gray_crop"}}
    expected = "data.view.name=gray_crop takes 8-bit images of 1 or 3 channels, not 5 of uint8; use crop"
    assert refusal(sections) == expected
    sections["data"]["channels"] = 1
    with pytest.raises(ConfigError, match="not 1 of uint16; use crop"):
        build.build(sections, dataset=SimpleNamespace(**vars(GRAY) | {"dtype": "uint16"}))


@pytest.mark.parametrize(
    "found", [[], [1], [3, 2], [0, 1, 2], [[0, 1], [0, 1]], [[0, 1]] * 4, ["a", "b"], [[0, 1], 2, 3]]
)
def test_a_range_that_is_none_is_refused(recipe, found):
    sections = recipe()
    sections["data"]["range"] = found
    with pytest.raises(ConfigError, match=r"data\.range=.* must be \[low, high\] with low < high, or one such pair"):
        build.open_data(sections)


def test_an_address_in_place_of_a_dataset_folder_is_refused_without_its_password(recipe):
    sections = recipe()
    sections["data"]["path"] = "https://me:planted@example.org/a.tar?X-Amz-Signature=planted"
    with pytest.raises(ConfigError, match=r"https://example\.org/a\.tar is an address .*mim shards index") as raised:
        build.open_data(sections)
    assert "planted" not in str(raised.value)


def test_the_range_of_the_recipe_goes_before_the_dataset_s_and_moves_its_statistics(recipe):
    sections = recipe()
    plain, _ = build.open_data(sections)
    sections["data"]["range"] = [0, 510]
    train, held_out = build.open_data(sections)
    assert train.range == held_out.range == [[0, 510]] * 3
    assert train.mean == pytest.approx([value / 2 for value in plain.mean])
    assert train.std == pytest.approx([value / 2 for value in plain.std])
    assert train.gray["std"] == pytest.approx(plain.gray["std"] / 2)


@pytest.mark.parametrize(
    ("channels", "strength", "message"),
    [(1, 0.4, "changes colours, but data.channels=1; use jitter=0"), (3, 1.5, "must be from 0 to 1")],
)
def test_jitter_is_for_colour_and_at_most_one(recipe, channels, strength, message):
    sections = recipe()
    sections["data"] |= {"channels": channels, "jitter": strength}
    assert refusal(sections) == f"data.jitter={strength} {message}"


# ---- statistics of a micro-batch -----------------------------------------------------------------


@pytest.mark.parametrize(("model", "depends"), [("mobilevitv2_050", True), ("convnext_atto", False)])
def test_a_run_with_batch_norm_says_that_its_loss_depends_on_the_micro_batch(recipe, model, depends):
    sections = recipe("simmim") | {"encoder": {"name": "dense", "model": model}}
    sections["data"]["image_size"] = 64
    objective = build.build(sections).objective.train()
    assert objective.per_micro_batch == depends
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, False, True, False]]).expand(3, -1)
    three, two = (
        objective({"images": images[:n], "mask": mask[:n], "num_masked": 2}, torch.tensor(0.0))["loss"] for n in (3, 2)
    )
    assert torch.allclose(three[:2], two, atol=1e-5) == (not depends)
