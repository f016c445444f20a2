"""A segmentation dataset of drawn shapes: images/ and masks/ for `mim shards make --masks`.

    python benchmarks/shapes.py OUT --count 2000 --size 128
    mim shards make OUT/images shards/shapes --masks OUT/masks --classes OUT/classes.txt --val-ratio 0.1

Every image has a background of smooth noise and two to five shapes, in any size, place, turn and colour; the later
ones cover the earlier. The colour says nothing about the class (`--coloured`: a hue per class), so a network has to
see the outline, and of stripes the pattern. Image i is a function of the seed and i alone.
"""

from __future__ import annotations

import argparse
import colorsys
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("background", "circle", "square", "triangle", "stripes")


def scene(rng: np.random.Generator, size: tuple[int, int], *, coloured: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3) and its label map (H, W), both uint8."""
    pixels = _background(rng, size)
    label_map = np.zeros(size, np.uint8)
    for _ in range(int(rng.integers(2, 6))):
        kind = int(rng.integers(1, len(CLASSES)))
        inside, paint = _shape(rng, size, kind, coloured)
        pixels[inside] = paint[inside]
        label_map[inside] = kind
    noisy = pixels + rng.normal(0, 0.02, pixels.shape)
    return (noisy.clip(0, 1) * 255).round().astype(np.uint8), label_map


def write_shapes(out: Path, *, count: int, size: tuple[int, int], seed: int = 0, coloured: bool = False) -> None:
    """Write images/00000.jpg ..., masks/00000.png ... and classes.txt."""
    for name in ("images", "masks"):
        (out / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels, label_map = scene(np.random.default_rng([seed, i]), size, coloured=coloured)
        Image.fromarray(pixels).save(out / f"images/{i:05d}.jpg", quality=95)
        Image.fromarray(label_map).save(out / f"masks/{i:05d}.png")
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))


def _background(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Smooth noise (H, W, 3) in [0, 1]: coarse and fine grids, enlarged."""
    total = np.zeros((*size, 3))
    for cells, share in ((3, 0.6), (9, 0.4)):
        grid = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += share * np.asarray(grid.resize(size[::-1], Image.Resampling.BICUBIC)) / 255
    return total


def _shape(rng: np.random.Generator, size: tuple[int, int], kind: int, coloured: bool) -> tuple[np.ndarray, np.ndarray]:
    """Which pixels (H, W) a shape covers, and its paint (H, W, 3)."""
    radius = min(size) * rng.uniform(0.14, 0.3)
    centre = [side * rng.uniform(0.15, 0.85) for side in size]
    turn = rng.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[: size[0], : size[1]]
    y, x = (rows - centre[0]) / radius, (columns - centre[1]) / radius
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    corners = [np.cos(turn + k * 2 * np.pi / 3) * x + np.sin(turn + k * 2 * np.pi / 3) * y for k in range(3)]
    inside = {
        1: x**2 + y**2 < 1,
        2: np.maximum(abs(u), abs(v)) < 0.85,
        3: np.max(corners, axis=0) < 0.6,
        4: np.maximum(abs(u), abs(v) * 1.4) < 1,
    }[kind]
    hue = kind / (len(CLASSES) - 1) if coloured else rng.uniform()
    colour = np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.5, 1), rng.uniform(0.5, 1)))
    paint = np.broadcast_to(colour, (*size, 3)).copy()
    if kind == 4:
        paint[np.sin(u * radius * 2 * np.pi / max(4.0, radius / 2.5)) > 0] *= 0.2
    return inside, paint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--size", type=int, default=128, help="pixels, square")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--coloured", action="store_true", help="a hue per class: easier")
    given = parser.parse_args()
    write_shapes(given.out, count=given.count, size=(given.size, given.size), seed=given.seed, coloured=given.coloured)
    print(f"{given.count} images and masks of {len(CLASSES)} classes: {given.out}")


if __name__ == "__main__":
    main()
