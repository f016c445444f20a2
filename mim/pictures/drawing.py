"""Pictures put together with Pillow alone: captioned tables of images, heat maps, a chart, an animation.

Everything lies on an opaque light ground with dark text, so it reads the same on a light and on a dark page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GROUND, INK, FAINT, ACCENT = (255, 255, 255), (32, 32, 32), (200, 200, 200), (31, 98, 180)
GAP, LETTERS = 4, 11  # pixels between cells, height of letters
WARM = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis, dark to bright
SIGNED = ((33, 82, 160), (247, 247, 247), (178, 24, 43))  # below zero, zero, above


@dataclass
class Animation:
    """Frames of one size that are written as a GIF that runs for ever, the last one longer."""

    frames: list[Image.Image]
    seconds: float = 0.4  # of a frame
    suffix = ".gif"

    def save(self, file: IO[bytes], format: str) -> None:
        """Write all frames in 64 colours that they share: what does not change from one to the next takes no bytes."""
        wide = Image.new("RGB", (self.frames[0].width, sum(frame.height for frame in self.frames)))
        for number, frame in enumerate(self.frames):
            wide.paste(frame, (0, number * frame.height))
        palette = wide.quantize(64)
        first, *rest = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in self.frames)
        milliseconds = round(self.seconds * 1000)
        durations = [milliseconds] * len(rest) + [4 * milliseconds]
        first.save(file, format, save_all=True, append_images=rest, duration=durations, loop=0, disposal=1)


def picture(image: Tensor, height: int) -> Image.Image:
    """An image (3, H, W) in [0, 1], `height` pixels high; enlarged, its pixels stay squares."""
    levels = (image.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    found = Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
    width = max(round(height * found.width / found.height), 1)
    enlarged = height >= found.height
    return found.resize((width, height), Image.Resampling.NEAREST if enlarged else Image.Resampling.BOX)


def heat(values: Tensor, colours: Sequence[tuple[int, int, int]] = WARM, *, top: float | None = None) -> Tensor:
    """Values (h, w) from 0 (SIGNED: from -top) to `top` (null: the largest) as colours (3, h, w) in [0, 1]."""
    values = values.detach().float().cpu()
    top = max(float(values.abs().max() if top is None else top), 1e-12)
    share = (values / top + 1) / 2 if colours is SIGNED else values / top
    place = share.clamp(0, 1) * (len(colours) - 1)  # (h, w)
    lower = place.floor().clamp(max=len(colours) - 2)
    table = torch.tensor(colours, dtype=torch.float32) / 255  # (k, 3)
    index, part = lower.long(), (place - lower).unsqueeze(-1)
    return torch.lerp(table[index], table[index + 1], part).permute(2, 0, 1)  # (3, h, w)


def spread(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """Values (..., h, w) of patches as pixels (..., H, W), each patch a square."""
    rows, columns = size[0] // cells.shape[-2], size[1] // cells.shape[-1]
    return cells.repeat_interleave(rows, -2).repeat_interleave(columns, -1)


def table(rows: Sequence[Sequence[Image.Image]], *, heads: Sequence[str] = (), title: str = "") -> Image.Image:
    """Images in rows below a title and the heads of the columns; a column is as wide as its widest image.

    Words that do not fit their column, or the table, are cut.
    """
    count = max(map(len, rows))
    widths = [max(row[i].width for row in rows if i < len(row)) for i in range(count)]
    heights = [max(cell.height for cell in row) for row in rows]
    line = LETTERS + GAP
    top = GAP + line * (bool(title) + bool(heads))
    sheet = Image.new("RGB", (sum(widths) + GAP * (count + 1), top + sum(heights) + GAP * len(rows)), GROUND)
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((GAP, GAP), fitted(title, sheet.width - 2 * GAP), INK, _font())
    left = GAP
    for column, width in enumerate(widths):
        if heads:
            pen.text((left, top - line), fitted(heads[column], width), INK, _font())
        below = top
        for row, height in zip(rows, heights, strict=True):
            if column < len(row):
                sheet.paste(row[column], (left, below))
            below += height + GAP
        left += width + GAP
    return sheet


def stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures one below the other."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), GROUND)
    below = 0
    for found in pictures:
        sheet.paste(found, (0, below))
        below += found.height
    return sheet


def scatter(
    columns: Sequence[Sequence[float]], *, title: str, below: str, beside: str, size: tuple[int, int] = (480, 300)
) -> Image.Image:
    """Values of every column as dots over 1, 2, ..., with a line through their means; the scale starts at 0."""
    width, height = size
    left, top, right, bottom = 48, 3 * LETTERS + 3 * GAP, width - 12, height - 36
    ticks = _ticks(max((max(column) for column in columns), default=1.0))
    sheet = Image.new("RGB", size, GROUND)
    pen = ImageDraw.Draw(sheet)

    def at(number: int, value: float) -> tuple[float, float]:
        return left + (number + 0.5) / len(columns) * (right - left), bottom - value / ticks[-1] * (bottom - top)

    pen.text((GAP, GAP), fitted(title, width - 2 * GAP), INK, _font())
    pen.text((GAP, GAP + LETTERS + 2), fitted(beside, width - 2 * GAP), INK, _font())
    for tick in ticks:
        y = at(0, tick)[1]
        pen.line((left, y, right, y), FAINT)
        pen.text((left - GAP, y), f"{tick:g}", INK, _font(), anchor="rm")
    every = -(-len(columns) // 16)
    for number in range(0, len(columns), every):
        pen.text((at(number, 0)[0], bottom + GAP), str(number + 1), INK, _font(), anchor="mt")
    pen.text(((left + right) / 2, height - GAP), below, INK, _font(), anchor="mb")
    means = [at(number, sum(column) / len(column)) for number, column in enumerate(columns)]
    pen.line(means, INK, 1)
    for number, column in enumerate(columns):
        for value in column:
            x, y = at(number, value)
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), ACCENT, GROUND)
    return sheet


def fitted(text: str, width: int) -> str:
    """The text, cut to what fits `width` pixels."""
    while text and _font().getlength(text) > width:
        text = text[:-1]
    return text


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own font: every machine draws the same letters."""
    return ImageFont.load_default(LETTERS)


def _ticks(top: float) -> list[float]:
    """Round numbers from 0 to at least `top`, about five."""
    raw = max(top, 1e-9) / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw * (1 - 1e-9))
    return [number * step for number in range(math.ceil(top / step - 1e-9) + 1)]
