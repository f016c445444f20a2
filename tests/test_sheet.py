"""The contact sheet shows what is there, and a hostile name stays text."""

import io
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

from mim.config import ConfigError
from mim.data.index import index
from mim.data.shards import Dataset
from mim.data.sheet import SIDE, write_sheet


def picture(colour, size=(40, 20)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def indexed(tmp_path):
    members = [
        ("a.png", picture("red")),
        ("<script>alert(1)</script>&\".png", picture("blue")),
        ("broken.jpg", b"<b>no image"),
    ]  # fmt: skip
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    index([str(tmp_path / "x.tar")], tmp_path / "out", workers=1)
    return tmp_path / "out"


def test_a_png_shows_every_image_in_its_proportions(indexed, tmp_path):
    with Image.open(write_sheet(indexed, tmp_path / "sheet.png")) as sheet:
        tile = np.asarray(sheet)[4 : 4 + SIDE, 4 : 4 + SIDE]
    red = (tile == (255, 0, 0)).all(-1)
    assert red.any(1).sum() == SIDE // 2
    assert red.any(0).sum() == SIDE


def test_html_is_one_file_that_loads_and_runs_nothing(indexed, tmp_path):
    text = write_sheet(indexed, tmp_path / "sheet.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;&#34;" in text
    assert text.count("<figure>") == 3
    assert "20 x 40, 3 channels" in text
    assert "unreadable: not a JPEG" in text
    sources = re.findall(r"""(?:src|href)=["']?([^"'>\s]+)""", text)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "default-src 'none'" in text


def test_a_large_dataset_shows_the_same_64_samples_each_time(shards, tmp_path):
    one = write_sheet(shards / "train", tmp_path / "one.html").read_bytes()
    assert one == write_sheet(shards / "train", tmp_path / "two.html").read_bytes()
    assert one.count(b"<figure>") == min(64, len(Dataset.open(shards / "train")))


def test_another_ending_is_refused(indexed, tmp_path):
    with pytest.raises(ConfigError, match=r"must end in \.png or \.html"):
        write_sheet(indexed, tmp_path / "sheet.gif")
