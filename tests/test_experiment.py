"""What a run learns and what it says at its start."""

import pytest

import tokenizer as tokenizers
from mim import build, experiment, train
from mim.config import to_yaml
from mim.data.shards import Dataset


def identity(sections):
    built = build.build(sections, dataset=Dataset.open(f"{sections['data']['path']}/train"))
    return experiment.identity(built.sections, Dataset.open(f"{sections['data']['path']}/train"))


def test_a_run_stays_the_same_when_its_tokenizer_is_measured_but_not_when_it_changes(recipe, tmp_path):
    sections = recipe("beit")
    folder = tmp_path / "tokenizer"
    tokenizer = tokenizers.load(sections["tokenizer"]["path"])
    options = {"num_codes": 16, "width": 8, "n_init": 8, "num_groups": 4, "blocks_per_group": 1}
    tokenizers.save(tokenizer, folder, name="dvae", config=options, card={})
    sections["tokenizer"]["path"] = str(folder)
    before = identity(sections)
    tokenizers.write_card(folder, {"usage": 0.9})
    assert tokenizers.score_card(folder) == {"usage": 0.9}
    assert identity(sections) == before
    tokenizers.save(tokenizer, folder, name="dvae", config={**options, "kl_weight": 1.0}, card={})
    assert identity(sections)["tokenizer"] != before["tokenizer"]
    next(tokenizer.parameters()).add_(1)
    tokenizers.save(tokenizer, folder, name="dvae", config=options, card={})
    assert identity(sections)["tokenizer"] != before["tokenizer"]


def a_tokenizer_run(name, **options):
    """What is built of a recipe that trains a tokenizer on 64 px, as far as the line on patches reads it."""
    sections = {"data": {"path": "unused", "image_size": 64}, "objective": {"name": "tokenize"},
                "tokenizer": {"name": name, "target": "pixels", "network": "conv", "stride": 8, "width": 8, "depth": 1,
                              "decoder_width": 8, **options}}  # fmt: skip
    return build.build(sections)


@pytest.mark.parametrize(
    ("num_images", "proposal"), [(4 * 512, None), (4 * 512 - 1, 256), (1025, 256), (1023, 128), (8, 2), (1, 2)]
)
def test_a_smaller_codebook_is_proposed_below_256_patches_per_code(num_images, proposal):
    line = experiment.patches_per_code(a_tokenizer_run("vqkd", num_codes=512), num_images)
    assert line.startswith(f"codebook: {64 * num_images} patches for 512 codes, {64 * num_images / 512:.0f} per code")
    if proposal is None:
        assert line.endswith("per code")
    else:
        assert f"fewer than 256: many may stay unused; consider tokenizer.num_codes={proposal}, " in line
        assert proposal == 2 or 64 * num_images >= 256 * proposal


def test_levels_are_proposed_where_they_are_the_codebook():
    line = experiment.patches_per_code(a_tokenizer_run("fsq", levels=[8, 8, 8]), 1030)
    assert "consider tokenizer.levels with a product of at most 256, or more images" in line


def test_the_line_stands_among_those_of_a_tokenizer_s_start_and_not_of_others(recipe, capsys, tmp_path):
    for objective, expected in (("tokenize", 1), ("mae", 0)):
        path = tmp_path / f"{objective}.yaml"
        path.write_text(to_yaml({**recipe(objective), "train": {"cpu": True, "workers": 0}}))
        train.main(str(path), [f"train.run={tmp_path / objective}"], dry_run=True)
        assert capsys.readouterr().err.count("codebook: ") == expected
