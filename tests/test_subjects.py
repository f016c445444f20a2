"""The images of a picture: whole, in a size that the encoder takes, under names of their own."""

import pytest
import torch
from PIL import Image

from mim.config import ConfigError
from mim.contracts import DataError
from mim.pictures.subjects import at_size, subjects


@pytest.fixture
def photo(tmp_path):
    Image.linear_gradient("L").resize((60, 41)).convert("RGB").save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def test_a_file_is_shown_whole_in_the_nearest_multiple_of_a_patch_and_so_it_is_said(loaded_run, photo, capsys):
    (found,) = subjects(loaded_run("mae"), [photo], num_images=1)
    assert (found.name, found.size) == ("photo", (32, 48))
    assert "photo.png: 41x60 pixels shown as 32x48, a grid of 4x6 patches" in capsys.readouterr().err
    top, bottom = found.batch["images"][0, :, 0].mean(), found.batch["images"][0, :, -1].mean()
    assert (top < 0.05, bottom > 0.95) == (True, True)
    (larger,) = subjects(loaded_run("mae"), [photo], num_images=1, size=70)
    assert larger.size == (72, 104)


def test_files_of_one_name_a_folder_and_shards_all_come_with_names_of_their_own(
    loaded_run, photo, image_folder, shards
):
    found = subjects(loaded_run("mae"), [photo, photo, str(image_folder), str(shards / "val")], num_images=2)
    names = [subject.name for subject in found]
    assert names[:2] == ["photo", "photo-2"]
    assert len(names) == len(set(names)) == 6


@pytest.mark.parametrize("positions", ["shared_relative", "relative", "absolute"])
def test_beit_is_resampled_as_a_copy(loaded_run, positions):
    options = {"name": "beit", "model": "beit_base_patch16_224", "positions": positions}
    encoder = loaded_run("simmim", **options).encoder
    other = at_size(encoder, (16, 48))
    assert other(torch.rand(1, 3, 16, 48)).patches.shape == (1, 12, 32)
    assert encoder(torch.rand(1, 3, 32, 32)).patches.shape == (1, 16, 32)
    assert at_size(encoder, (32, 32)) is encoder


@pytest.mark.parametrize(
    ("content", "error", "sentence"),
    [(None, ConfigError, "is not a file, a folder"), (b"text", DataError, "cannot be decoded: not a JPEG")],
)
def test_what_is_no_image_is_one_sentence(loaded_run, tmp_path, content, error, sentence):
    path = tmp_path / "strange.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=sentence):
        subjects(loaded_run("mae"), [str(path)], num_images=1)
