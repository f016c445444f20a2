"""Samples that prove what was delivered: each PNG carries its number in its first pixels, and noise in the others.

A number is written twice, plain and inverted, so that pixels of anything else have none. What a reader delivers is a
row `[number, CRC32 of the pixels, label]`; it is right when it equals the row of the fixture.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mim.data.make import make
from mim.data.shards import LOCK

SIDE = 72  # pixels
BITS = 16  # of a number
NUM_CLASSES = 3
NOBODY = -1  # the number of an image that carries none

Row = tuple[int, int, int]  # number, CRC32 of the pixels, label


def pixels_of(number: int) -> np.ndarray:
    """The image of a number, (H, W, C) uint8: 4 to 16 KB as PNG, by the share of noise."""
    rng = np.random.default_rng(number)
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    noisy = rng.integers(SIDE // 4, SIDE + 1)
    pixels[:noisy] = rng.integers(0, 256, (noisy, SIDE, 3))
    bits = np.array([number >> i & 1 for i in range(BITS)], np.uint8)
    pixels[0, : 2 * BITS] = 255 * np.concatenate([bits, 1 - bits])[:, None]
    return pixels


def number_of(pixels: np.ndarray) -> int:
    """The number in an image, or NOBODY."""
    if pixels.ndim != 3 or pixels.shape[1] < 2 * BITS:
        return NOBODY
    marks = pixels[0, : 2 * BITS, 0] > 127
    plain, inverted = marks[:BITS], marks[BITS:]
    return int(sum(int(bit) << i for i, bit in enumerate(plain))) if (plain != inverted).all() else NOBODY


def row_of(pixels: np.ndarray, label: int) -> Row:
    """What a delivered image is, as a row."""
    return number_of(pixels), zlib.crc32(np.ascontiguousarray(pixels).tobytes()), label


def expected(number: int) -> Row:
    """The row that must be delivered for a number."""
    return row_of(pixels_of(number), number % NUM_CLASSES)


def png(number: int) -> bytes:
    """The encoded image of a number."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_of(number)).save(buffer, format="PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class Fixture:
    """A dataset folder that is whole, and the rows that reading it must give."""

    path: Path
    rows: frozenset[Row]

    @property
    def tars(self) -> list[Path]:
        return sorted(self.path.glob("*.tar"))

    def copy(self, out: Path) -> Fixture:
        """A copy to be damaged."""
        shutil.copytree(self.path, out)
        return Fixture(out, self.rows)


def fixture(root: Path, num: int, *, shard_size: int, first: int = 0) -> Fixture:
    """Make a labelled dataset of the numbers from `first` on, through the public `make`."""
    for number in range(first, first + num):
        file = root / "images" / str(number % NUM_CLASSES) / f"{number:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(number))
    make(root / "images", root / "shards", labels_from_folders=True, shard_size=shard_size, workers=1)
    assert json.loads((root / "shards" / LOCK).read_bytes())["schema"]["classes"] == ["0", "1", "2"]
    return Fixture(root / "shards", frozenset(expected(number) for number in range(first, first + num)))


def members_of(number: int, key: str | None = None) -> list[tuple[str, bytes]]:
    """The two members of a sample as (name, content)."""
    key = key or f"{number:05d}"
    return [(f"{key}.png", png(number)), (f"{key}.cls", str(number % NUM_CLASSES).encode())]


def write_tar(file: Path, members: list[tuple[str, bytes] | tarfile.TarInfo]) -> Path:
    """Write a tar by the standard library, as a stranger would: names and types are not checked."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=tarfile.GNU_FORMAT) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return file


def write_many(file: Path, count: int, *, ending: str = "x") -> Path:
    """Write a tar of up to 10^7 empty members, each with a name of its own: header blocks as numpy counts them."""
    template = np.frombuffer(tarfile.TarInfo(f"0000000.{ending}").tobuf(tarfile.USTAR_FORMAT), np.uint8)
    with file.open("wb") as tar:
        for start in range(0, count, 10_000):
            numbers = np.arange(start, min(start + 10_000, count))
            blocks = np.tile(template, (len(numbers), 1))  # (members, 512)
            blocks[:, :7] += (numbers[:, None] // 10 ** np.arange(6, -1, -1) % 10).astype(np.uint8)
            blocks[:, 148:156] = ord(" ")  # a checksum counts itself as blanks
            sums = blocks.sum(1, dtype=np.int64)
            blocks[:, 148:154] = sums[:, None] // 8 ** np.arange(5, -1, -1) % 8 + ord("0")
            blocks[:, 154] = 0
            tar.write(blocks.tobytes())
        tar.write(bytes(1024))
    return file


def member_starts(file: Path) -> list[int]:
    """The bytes at which the headers of a tar begin, and the end of the last member."""
    with tarfile.open(file) as tar:
        members = tar.getmembers()
        return [member.offset for member in members] + [tar.offset]


def flip(data: bytes, bit: int) -> bytes:
    """The data with one bit inverted."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
