"""Bytes -> uint8 image, by rules that are stated rather than inherited from a library.

- JPEG, PNG, WebP, BMP, TIFF by their magic bytes, nothing else: the rarer parsers of Pillow are never reached.
- The header is checked before pixels are decoded: at most MAX_PIXELS, so no decompression bombs.
- Orientation in EXIF is applied. A broken EXIF block counts as absent: it is metadata, the pixels are right.
- Transparency is composited on white. Palettes are expanded. CMYK goes to RGB by Pillow's formula, without ICC.
- 16-bit gray keeps its high byte (Pillow's own conversion clips at 255, which whitens the image); 32-bit is refused.
- Of an animation or a multi-page file, the first frame is taken.
- RGB becomes gray by ITU-R 601 luma; gray becomes RGB by repetition.
- A truncated image is refused, never filled up with gray.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mim.contracts import DataError

MAX_BYTES = 64 << 20  # of one encoded image
MAX_PIXELS = 64 << 20  # width x height
ENDINGS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "TIFF": "tif",
}  # MPO: JPEG of many phones
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
GRAY_MODES = ("1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N")
COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV")
ORIENTATION = 0x0112  # EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(DataError):
    """Bytes that are no image by the rules of this module; the message is the reason."""


class Header(NamedTuple):
    """What an image says of itself."""

    ending: str  # of its true format: jpg, png, webp, bmp or tif
    channels: int  # 1 or 3


def read_header(data: bytes) -> Header:
    """Read format and channels without decoding pixels. Raises BadImage."""
    with _open(data) as image:
        return Header(ENDINGS[str(image.format)], 1 if image.mode in GRAY_MODES else 3)


def decode(data: bytes, channels: int = 3) -> Tensor:
    """Decode an image fully. Returns uint8 (C, H, W), a view of (H, W, C) memory as the resize kernel wants it."""
    if channels not in (1, 3):
        raise ValueError(f"data.channels={channels} is not supported; use 1 or 3")
    with _open(data) as opened:
        try:
            opened.load()
            image = _opaque(_eight_bit(_upright(opened)))
            pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
        except MemoryError:  # says something about the machine, not about the image
            raise
        except Exception as error:  # decoders raise a dozen types on hostile bytes
            raise BadImage(_reason(error)) from error
    return torch.from_numpy(pixels).view(*pixels.shape[:2], channels).permute(2, 0, 1)  # (C, H, W)


def _open(data: bytes) -> Image.Image:
    """Check everything that the header can tell."""
    if len(data) > MAX_BYTES:
        raise BadImage(f"{len(data)} bytes exceed the limit of {MAX_BYTES}")
    if not data:
        raise BadImage("the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise BadImage("not a JPEG, PNG, WebP, BMP or TIFF image") from error
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise BadImage(_reason(error)) from error
    if image.width < 1 or image.height < 1 or image.width * image.height > MAX_PIXELS:
        raise BadImage(
            f"{image.width} x {image.height} pixels; at least 1 x 1 and at most {MAX_PIXELS} pixels are decoded"
        )
    if image.mode not in GRAY_MODES + COLOUR_MODES:
        raise BadImage(f"pixels of mode {image.mode!r}; 8 bits per channel and 16-bit gray are decoded")
    return image


def _eight_bit(image: Image.Image) -> Image.Image:
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # any broken EXIF block
        return image
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _opaque(image: Image.Image) -> Image.Image:
    """Composite on white what is transparent, by alpha channel or by a transparent colour."""
    if image.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and "transparency" not in image.info:
        return image
    background = Image.new("RGBA", image.size, "white")
    background.alpha_composite(image.convert("RGBA"))
    return background.convert("RGB")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
