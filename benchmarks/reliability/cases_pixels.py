"""Group C, continued: images whose pixels are easily mistaken: deep, of inks, transparent, turned, of one row."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms

from benchmarks.reliability.bench import Bench, Case, fired
from benchmarks.reliability.fixtures import SIDE, write_tar
from benchmarks.reliability.verdicts import PASS, SILENT, Verdict, joined, refused

RAMP = np.linspace(0, 1, SIDE * SIDE).reshape(SIDE, SIDE)
COLOURS = np.random.default_rng(4).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
LEFT = np.arange(SIDE) < SIDE // 2  # half of the columns
WHITE = 255


class Kind(NamedTuple):
    data: bytes  # an encoded image
    wanted: np.ndarray  # what a network must be given, (H, W, 3) or broadcast to it, from 0 to 255
    tolerance: float = 1.0


def encoded(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def kinds() -> dict[str, Kind]:
    """An image of each kind; what it shows is computed here without an image library."""
    gray, levels = np.round(255 * RAMP).astype(np.uint8), np.repeat(255 * RAMP[..., None], 3, 2)  # (H, W), (H, W, 3)
    inks = Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    palette = Image.fromarray(COLOURS).quantize(16)
    table = np.array(palette.getpalette()).reshape(-1, 3)
    chosen = np.array(palette)
    clear = int(chosen[0, 0])
    alpha = np.where(LEFT, 0, 255)[None, :, None].repeat(SIDE, 0).astype(np.uint8)  # (H, W, 1)
    bits = COLOURS[..., 0] > 127
    red = np.array([255.0, 0, 0])
    found = {
        "16 bits": Kind(encoded((65535 * RAMP).astype(np.uint16)), levels),
        "floats": Kind(encoded(RAMP.astype(np.float32), "TIFF"), levels, 2),  # the range is that of the percentiles
        "CMYK": Kind(encoded(inks, "JPEG"), red, 16),
        "CMYK with a profile": Kind(encoded(inks, "JPEG", icc_profile=profile), red, 16),
        "palette": Kind(encoded(palette), table[chosen]),
        "palette, a colour transparent": Kind(
            encoded(palette, transparency=clear), np.where((chosen == clear)[..., None], WHITE, table[chosen])
        ),
        "gray and alpha": Kind(
            encoded(np.concatenate([gray[..., None], alpha], 2)), np.where(LEFT[None, :, None], WHITE, gray[..., None])
        ),
        "RGBA": Kind(
            encoded(np.concatenate([COLOURS, alpha], 2)), np.where(LEFT[None, :, None], WHITE, COLOURS).astype(float)
        ),
        "1 bit": Kind(encoded(bits), 255.0 * bits[..., None]),
        "GIF": Kind(encoded(np.full((SIDE, SIDE, 3), 7, np.uint8), "GIF"), np.array(7.0)),
        "1 x 1": Kind(encoded(Image.new("RGB", (1, 1), (200, 100, 50))), np.array([200.0, 100, 50])),
        "1 x 20000": Kind(encoded(Image.new("RGB", (1, 20000), (200, 100, 50))), np.array([200.0, 100, 50])),
    }
    return found | {f"orientation {number}": turned(number) for number in range(1, 9)}


def turned(orientation: int) -> Kind:
    """COLOURS as a camera stores them that was held this way (EXIF 2.3, 4.6.4 A: where row 0 and column 0 are)."""
    transposed = COLOURS.swapaxes(0, 1)
    stored = (
        COLOURS,
        COLOURS[:, ::-1],
        COLOURS[::-1, ::-1],
        COLOURS[::-1],
        transposed,
        np.rot90(COLOURS),
        transposed[::-1, ::-1],
        np.rot90(COLOURS, -1),
    )[orientation - 1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return Kind(encoded(np.ascontiguousarray(stored), exif=exif), COLOURS.astype(float))


def golden(bench: Bench, reader: str) -> Verdict:
    """C4: each kind of image gives the pixels that it shows, or is refused by name."""
    verdicts = []
    for name, kind in kinds().items():
        fired(Image.open(io.BytesIO(kind.data)).size, f"{name} is no image")
        members = [member for i in range(4) for member in ((f"{i:05d}.png", kind.data), (f"{i:05d}.cls", b"0"))]
        tar = write_tar(bench.scratch().with_suffix(".tar"), members)
        results = bench.read_tars(reader, [tar], batch_size=1, num_steps=1, show=True)
        if results[-1].exit != 0 or results[-1].hung or not results[-1].facts:
            verdicts.append(refused(results, tar.name).of(name))
            continue
        (facts,) = results[-1].facts
        pixels = np.array(facts["pixels"])
        error = np.abs(pixels - kind.wanted).max() if pixels.shape[-1] == 3 else np.inf
        right = Verdict(PASS if error <= kind.tolerance else SILENT, f"pixels differ by up to {error:.0f} of 255")
        verdicts.append(right.of(name))
    return joined(verdicts)


CASES = (Case("C4", "16 bits, floats, inks, alpha, EXIF, 1 x 20000", golden),)
