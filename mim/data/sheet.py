"""A contact sheet: a keyed sample of a dataset as one PNG, or as one HTML file that needs nothing beside it.

The HTML names each image with its size, class and key; all text is escaped, and the page may load nothing. Channels
beyond the first three are not shown; deep images are scaled from their own minimum to their maximum. A label map lies
over its image, a colour for each class.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jinja2 import Environment
from PIL import Image, ImageOps
from torch import Tensor

from mim.config import ConfigError
from mim.contracts import StorageError
from mim.data.decode import BadImage
from mim.data.label_map import colours
from mim.data.picks import keyed_picks
from mim.data.shards import Dataset
from mim.data.write import read_sample

NUM_SHOWN, COLUMNS = 64, 8
SIDE, GAP = 128, 4  # pixels
BROKEN = (200, 30, 30)  # colour of the tile of an image that cannot be decoded
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body { font: 12px sans-serif; margin: 16px; background: #fff; color: #222 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax({{ side }}px, 1fr)); gap: 12px }
figure { margin: 0 } img { width: 100%; height: auto } figcaption { overflow-wrap: anywhere }
</style></head><body>
<h1>{{ title }}</h1><p>{{ tiles | length }} of {{ total }} samples, chosen by a key; {{ dataset_id }}</p>
<main>
{% for tile in tiles %}<figure><img alt="{{ tile.key }}" src="data:image/png;base64,{{ tile.encoded }}">
<figcaption>{{ tile.caption }}<br>{{ tile.key }}</figcaption></figure>
{% endfor %}</main></body></html>
"""


class Tile(NamedTuple):
    """One image of the sheet."""

    key: str
    caption: str
    picture: Image.Image  # SIDE x SIDE

    @property
    def encoded(self) -> str:
        """The picture as base64 of a PNG."""
        buffer = io.BytesIO()
        self.picture.save(buffer, "PNG")
        return base64.b64encode(buffer.getvalue()).decode()


def write_sheet(path: str | Path, file: Path) -> Path:
    """Write the contact sheet of a dataset; return its file. Raises ConfigError, DataError, StorageError."""
    if file.suffix not in (".png", ".html"):
        raise ConfigError(f"--sheet {file} must end in .png or .html")
    dataset = Dataset.open(path)
    tiles = [_tile(dataset, pick) for pick in keyed_picks(len(dataset), NUM_SHOWN, "sheet")]
    try:
        if file.suffix == ".png":
            _grid(tiles).save(file)
        else:
            page = Environment(autoescape=True).from_string(PAGE)
            text = page.render(title=str(path), tiles=tiles, total=len(dataset), dataset_id=dataset.id, side=SIDE)
            file.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error.strerror}") from error
    return file


def _tile(dataset: Dataset, pick: int) -> Tile:
    sample = dataset.read(*dataset.locate(pick), label_map=True)
    label = "" if sample.label is None or dataset.classes is None else f", {dataset.classes[sample.label]}"
    try:
        _, pixels, label_map = read_sample(sample, dataset.pixel_classes)
    except BadImage as error:
        return Tile(sample.key, f"unreadable: {error}{label}", Image.new("RGB", (SIDE, SIDE), BROKEN))
    channels, height, width = pixels.shape
    return Tile(sample.key, f"{height} x {width}, {channels} channels{label}", _thumbnail(pixels, label_map))


def _thumbnail(pixels: Tensor, label_map: Tensor | None) -> Image.Image:
    """(C, H, W) -> the whole image inside a white square, half covered by the colours of its label map (H, W)."""
    shown = pixels.numpy()[: 3 if len(pixels) >= 3 else 1]  # (1 or 3, H, W)
    if shown.dtype != np.uint8:
        low, high = float(shown.min()), float(shown.max())
        shown = ((shown.astype(np.float64) - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8)
    array = np.ascontiguousarray(shown.transpose(1, 2, 0))  # (H, W, 1 or 3)
    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).convert("RGB")
    if label_map is not None:
        image = Image.blend(image, Image.fromarray(colours()[label_map.numpy()]), 0.5)
    return ImageOps.pad(image, (SIDE, SIDE), color="white")


def _grid(tiles: list[Tile]) -> Image.Image:
    rows = -(-len(tiles) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, rows * (SIDE + GAP) + GAP), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile.picture, (GAP + i % COLUMNS * (SIDE + GAP), GAP + i // COLUMNS * (SIDE + GAP)))
    return sheet
