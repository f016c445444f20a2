"""Tiny inputs that several tests write: pictures of noise, tars, label maps, and a recipe that trains in a second."""

import io
import tarfile

import numpy as np
from PIL import Image

from benchmarks.shapes import write_shapes
from mim.config import to_yaml
from mim.data.make import make


def picture(i, size=(20, 30), kind="JPEG"):
    """An encoded image of noise, (height, width) pixels; another one for every i."""
    pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    """A tar of (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_recipe(path, data, length, **more):
    """A recipe of MAE on images of 16 pixels; `data` are its options of the data."""
    sections = {
        "data": {**data, "image_size": 16, "view": {"name": "crop"}},
        "mask": {"name": "random", "ratio": 0.75},
        "encoder": {"name": "vit", "model": "vit_tiny_patch16_224", "width": 24, "depth": 1, "num_heads": 2,
                    "patch_size": 4},
        "objective": {"name": "mae", "decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 2},
        "optim": {"batch_size": 6, "length": length, "warmup": "2 steps", "lr": 3e-3},
        "train": {"log_every": "4 steps", "save_every": "5 steps", "workers": 0, "cpu": True},
        **more,
    }  # fmt: skip
    path.write_text(to_yaml(sections))
    return str(path)


def shapes(out, count=24, size=(40, 48), *, coloured=True, **options):
    """A dataset of drawn shapes with label maps, each class of a hue of its own; `options` are those of `make`."""
    write_shapes(out / "drawn", count=count, size=size, coloured=coloured)
    drawn = {"masks": out / "drawn/masks", "classes": str(out / "drawn/classes.txt"), "workers": 1}
    return make(out / "drawn/images", out / "shards", **drawn | options).path
