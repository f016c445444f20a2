"""`mim eval attention` and the other pictures, on a run, an export, a timm name, files and shards."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.layers import gen_relative_position_index

from mim import config
from mim.__main__ import pairs
from mim.config import ConfigError
from mim.evals import attention, distance, filters, positions
from mim.evals.filters import components
from mim.evals.positions import _bias_maps, similarities
from mim.looking import write_picture
from mim.pictures.drawing import SIGNED, Animation, _ticks, heat, table
from tests.test_cli import mim, trained  # noqa: F401  (fixtures)

PICTURES = {"attention", "pca", "filters", "positions", "distance", "reconstruction"}


def shown(mim, *arguments):  # noqa: F811
    code, out, err = mim("eval", *arguments)
    assert code == 0, err
    found = json.loads(out)
    assert "protocol" not in found  # of pictures there is nothing to compare by
    return {key: value for key, value in found.items() if str(value).endswith(".png")}


def test_attention_of_a_run_and_of_its_export_is_one_picture(mim, trained, image_folder, tmp_path):  # noqa: F811
    photo = next(image_folder.rglob("*.png"))
    assert mim("export", "timm", trained, tmp_path / "export")[0] == 0
    options = (photo, "size=40", "--out")
    (of_run,) = shown(mim, "attention", trained, *options, tmp_path / "a").values()
    (of_export,) = shown(mim, "attention", tmp_path / "export", *options, tmp_path / "b").values()
    assert Path(of_run).name == f"attention-{photo.stem}-00000002.png"
    assert np.array_equal(np.asarray(Image.open(of_run)), np.asarray(Image.open(of_export)))


def test_a_timm_name_needs_no_dataset(mim, image_folder, tmp_path):  # noqa: F811
    files = sorted(image_folder.rglob("*.png"))[:2]
    common = ("--out", tmp_path, "data.image_size=32")
    assert shown(mim, "attention", "test_vit", *files, *common).keys() == {f"attention-{f.stem}" for f in files}
    assert shown(mim, "pca", "test_vit", image_folder, "num_images=3", *common).keys() == {"pca"}
    assert shown(mim, "filters", "test_vit", *common).keys() == {"filters"}
    code, _, err = mim("eval", "distance", "test_vit", *common)
    assert (code, err.splitlines()[-1][:26]) == (2, "mim: data.path is missing;")


def test_another_picture_of_the_same_name_is_replaced_only_when_told_so(mim, tmp_path):  # noqa: F811
    command = ("filters", "test_vit", "--out", tmp_path)
    first = shown(mim, *command, "num=4")
    assert shown(mim, *command, "num=4") == first  # the same is no other
    code, _, err = mim("eval", *command, "num=5")
    assert code == 2
    assert "is another picture; write to another folder with --out, or add --force to replace it" in err
    assert shown(mim, *command, "num=5", "--force") == first


def test_held_out_images_are_in_one_picture_with_the_patch_that_is_asked(loaded_run):
    pictures = {
        str(query): dict(attention.run(loaded_run("mae"), attention.Config(num_images=2, query=query, rollout=False)))
        for query in ("class", "mean", [0, 3])
    }
    assert all(found.keys() == {"attention"} for found in pictures.values())
    assert len({found["attention"].tobytes() for found in pictures.values()}) == 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"query": [4, 0]}, r"query=\[4, 0\] is none of class, mean or \[row, column\] in a grid of 4x4"),
        ({"mass": 0.0}, "mass=0.0 must be above 0"),
        ({"layer": 3}, "block 3 does not exist: the encoder has 2 blocks"),
        ({"layer": 0}, "blocks are counted from 1"),
    ],
)
def test_a_question_that_attention_cannot_answer_is_one_sentence(loaded_run, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        dict(attention.run(loaded_run("mae"), attention.Config(num_images=1, **options)))


def test_the_encoders_positions_are_shown_as_what_they_are(loaded_run):
    def names(**encoder):
        return dict(positions.run(loaded_run("simmim", **encoder), positions.Config())).keys()

    beit = {"name": "beit", "model": "beit_base_patch16_224"}
    assert names() == {"positions"}
    assert names(**beit, positions="shared_relative") == names(**beit, positions="relative") == {"position_bias"}
    with pytest.raises(ConfigError, match="rotary positions alone"):
        names(name="eva", model="vit_small_patch16_rope_224")


def test_similar_positions_are_those_near_by():
    found = similarities(torch.eye(6).roll(1, 0) + torch.eye(6), (2, 3))
    assert torch.allclose(found[0, 1], torch.tensor([[0.5, 1, 0.5], [0, 0, 0]]), atol=1e-6)


def test_a_bias_is_shown_where_the_patch_lies_that_is_looked_at():
    index = gen_relative_position_index((2, 2), class_token=True)
    values = torch.zeros(3 * 3 + 3, 1)
    values[index[1, 2]] = 1.0  # the first patch looks at its right neighbour
    picture = np.asarray(_bias_maps({"all blocks": (values, (2, 2))}, 9))[34:43, 4:13]
    red = (picture == SIGNED[2]).all(axis=-1)
    assert red[3:6, 6:].all()
    assert red.sum() == 9


def test_filters_of_one_pattern_have_it_as_their_first_component():
    pattern = torch.tensor([[1.0, -0.5], [0.25, 0]])
    shares = torch.tensor([-2.0, 1, 3, -1]).view(4, 1, 1, 1)
    found, explained = components(7 + shares * pattern, 2)
    assert torch.allclose(found[0, 0], pattern / 2 + 0.5, atol=1e-6)
    assert explained[0] > 0.999


def test_the_chart_of_distances_shows_every_head(loaded_run):
    chart = dict(distance.run(loaded_run("mae"), distance.Config(num_images=2)))["distance"]
    assert chart.size == (480, 300)
    assert _ticks(37) == [0, 10, 20, 30, 40]
    assert _ticks(0.07) == pytest.approx([0, 0.02, 0.04, 0.06, 0.08])


def test_colours_go_from_dark_to_bright():
    levels = heat(torch.tensor([[0.0, 1, 2]])).sum(0)[0]
    assert levels[0] < levels[1] < levels[2]


def test_a_table_has_its_cells_where_the_layout_says_and_cuts_long_words():
    red, blue = Image.new("RGB", (10, 8), "red"), Image.new("RGB", (20, 8), "blue")
    found = table([[red, blue], [blue]], heads=["a" * 50, "b"], title="t" * 99)
    assert found.size == (4 + 20 + 4 + 20 + 4, 34 + 2 * (8 + 4))
    assert [found.getpixel(place) for place in [(4, 34), (28, 34), (4, 46)]] == [(255, 0, 0), (0, 0, 255), (0, 0, 255)]


def test_an_animation_is_written_whole(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    write_picture(tmp_path / "new/a.gif", Animation(frames), replace=False)
    with Image.open(tmp_path / "new/a.gif") as gif:
        gif.seek(2)
        assert (gif.n_frames, gif.convert("RGB").getpixel((4, 4))) == (3, (0, 0, 255))


def test_what_has_no_pixels_to_filter_is_refused(loaded_run):
    with pytest.raises(ConfigError, match="trains a tokenizer"):
        dict(filters.run(loaded_run("tokenize"), filters.Config()))


def test_the_page_of_pictures_names_commands_options_and_functions_that_exist(loaded_run):
    page = (Path(__file__).parent.parent / "docs/pictures.md").read_text()
    commands = [shlex.split(line) for line in re.findall(r"^    mim eval (\w+ runs.+)", page, re.MULTILINE)]
    assert {command[0] for command in commands} == PICTURES
    for name, _, *rest in commands:
        options = tuple(argument for argument in rest if "=" in argument)
        config.component("mim.evals", {"name": name, **pairs(options)}, "eval")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    namespace = {"loaded": loaded_run("mae"), "images": torch.rand(2, 3, 32, 32)}
    exec(compile(block, "docs/pictures.md", "exec"), namespace)
    assert namespace["far"].shape == (2, 2)
