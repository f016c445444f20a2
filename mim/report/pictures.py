"""What evaluations drew, inside the page: recompressed, and no more than a budget allows; what is left out is said."""

from __future__ import annotations

import base64
import functools
import io
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from mim.report.runs import Run

BUDGET = 1_800_000  # bytes of all pictures of a page, as base64
PER_NAME = 6  # pictures of one kind: the newest, the first, and some between
NEWEST_WIDTH, OTHER_WIDTH = 960, 420  # pixels
QUALITY = 82  # of WebP
LARGEST = 64_000_000  # pixels of a picture that is opened


@dataclass(frozen=True)
class Picture:
    """A picture as a data URI."""

    step: int
    uri: str
    width: int
    height: int


@dataclass
class Strip:
    """The pictures of one name of one run: the newest first, then from the first on."""

    run: int
    name: str
    pictures: list[Picture] = field(default_factory=list)
    count: int = 0  # of the pictures in the directory
    unread: list[str] = field(default_factory=list)


def strips(runs: list[Run]) -> list[Strip]:
    """Pictures of all runs within the budget: of every name the newest, then the first, then those between."""
    found = {
        (i, name): Strip(i, name, count=len(files))
        for i, run in enumerate(runs)
        for name, files in run.pictures.items()
    }
    per_name = PER_NAME if len(runs) == 1 else 1
    queue = []
    for i, run in enumerate(runs):
        for name, files in run.pictures.items():
            queue += [(rank, i, name, *files[at]) for rank, at in enumerate(_chosen(len(files), per_name))]
    left = BUDGET
    for rank, i, name, step, file in sorted(queue, key=lambda one: one[0]):
        strip = found[i, name]
        try:
            stat = file.stat()
            uri, width, height = encoded(
                file, stat.st_mtime_ns, stat.st_size, NEWEST_WIDTH if rank == 0 else OTHER_WIDTH
            )
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            strip.unread.append(f"{file.name} cannot be read: {error}")
            continue
        if len(uri) <= left:
            left -= len(uri)
            strip.pictures.append(Picture(step, uri, width, height))
    for strip in found.values():
        strip.pictures[1:] = sorted(strip.pictures[1:], key=lambda picture: picture.step)
    return [strip for strip in found.values() if strip.count]


@functools.lru_cache(maxsize=96)
def encoded(file: Path, changed: int, size: int, width: int) -> tuple[str, int, int]:
    """A picture of at most a width as (data URI, width, height); `changed` and `size` are of the file, for the cache.

    Raises OSError or ValueError when the file holds no picture that can be shown.
    """
    with Image.open(file) as opened:
        if opened.width * opened.height > LARGEST:
            raise ValueError(f"{opened.width} x {opened.height} pixels are more than are opened here")
        moving = getattr(opened, "is_animated", False)
        if moving or (opened.width <= width and opened.format == "WEBP"):
            return _uri(file.read_bytes(), str(opened.format).lower()), opened.width, opened.height
        picture = opened.convert("RGB")
    if picture.width > width:
        picture = picture.resize(
            (width, max(1, round(picture.height * width / picture.width))), Image.Resampling.LANCZOS
        )
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=QUALITY, method=2)
    return _uri(buffer.getvalue(), "webp"), picture.width, picture.height


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _chosen(count: int, most: int) -> list[int]:
    """Which of `count` pictures, oldest first, are shown, the most important first: newest, oldest, evenly between."""
    between = [round(k * (count - 1) / (most - 1)) for k in range(1, most - 1)] if most > 1 else []
    return list(dict.fromkeys([count - 1, *([0] if most > 1 else []), *between]))
