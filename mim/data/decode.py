"""Bytes -> image, by rules that are stated rather than inherited from a library.

- JPEG, PNG, WebP, BMP, TIFF and `.npy` by their magic bytes, nothing else: Pillow's rarer parsers are never reached.
- The header is checked before pixels are decoded: at most MAX_PIXELS and MAX_BYTES, so no decompression bombs.
- Orientation in EXIF is applied. A broken EXIF block counts as absent: it is metadata, the pixels are right.
- Transparency is composited on white. Palettes are expanded. CMYK goes to RGB by Pillow's formula, without ICC.
- 8 and 16 bits are kept (PNG and TIFF, gray and colour; Pillow would clip or halve them), float32 too (TIFF, .npy);
  other depths are refused. Asked for another depth, 8 bits become 16 by 257 and 16 become 8 by their high byte.
- Of an animation or a multi-page file, the first frame is taken.
- RGB becomes gray by ITU-R 601 luma; gray becomes RGB by repetition; other numbers of channels stay what they are.
- A truncated image is refused, never filled up with gray.

What is accepted is Pillow's verdict (`tiff.py` and `npy.py` for what they read) in every environment; `jpeg.py` is a
faster way to the same pixels.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mim.data import jpeg, npy, tiff
from mim.data.formats import BadImage, Header, on_white

__all__ = ["BadImage", "Encoded", "Header", "decode", "open_image", "read_header"]

MAX_BYTES = 64 << 20  # of one encoded image
MAX_PIXELS = 64 << 20  # width x height
MAX_DECODED = 1 << 30  # bytes: many channels at the largest size would not fit a loader's memory
ENDINGS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "TIFF": "tif",
    "NPY": "npy",
}  # MPO: JPEG of many phones
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # that Pillow opens
DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
GRAY_MODES = ("1", "L", "LA", "La", *DEEP_MODES)
COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV")
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601


def read_header(data: bytes | memoryview) -> Header:
    """Read format, channels, depth and size without decoding pixels. Raises BadImage."""
    data = bytes(data)
    header = _own_header(data)
    if header is None:
        with _open(data) as image:
            header = _pillow_header(data, image)
    return header


def decode(data: bytes | memoryview, channels: int = 3, dtype: str = "uint8") -> Tensor:
    """Decode an image fully. Returns (C, H, W) of `dtype`, a view of (H, W, C) memory as the resize kernel wants it."""
    _check_bytes(data)
    found = jpeg.parse(data)
    pixels = None
    if found is not None:
        _check_size(found.height, found.width, found.channels)
        pixels = jpeg.pixels(data, found)
    if found is None or pixels is None:
        data = bytes(data)
        header = _own_header(data)
        pixels = _with_pillow(data) if header is None else _own_pixels(data, header)
    else:
        pixels = _turn(pixels, found.orientation)
    return _tensor(pixels, channels, dtype)


def open_image(data: bytes | memoryview, channels: int = 3, dtype: str = "uint8") -> Tensor | Encoded:
    """Decode an image, or leave it encoded where decoding a box of it is cheaper. Raises BadImage."""
    _check_bytes(data)
    found = jpeg.parse(data)
    if found is None or found.orientation != 1 or dtype != "uint8":
        return decode(data, channels, dtype)
    _check_size(found.height, found.width, found.channels)
    return Encoded(data, found, channels)


@dataclass(frozen=True)
class Encoded:
    """A JPEG of which boxes can be decoded: it has the shape of its tensor, and `cut` in the place of a slice."""

    data: bytes | memoryview
    structure: jpeg.Jpeg
    channels: int
    when_cut: Callable[[], None] | None = None  # called when a box was decoded, by who measures that apart

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.structure.height, self.structure.width

    def cut(self, top: int, left: int, h: int, w: int) -> Tensor:
        """Pixels (C, h, w) of a box, equal to those of full decoding. Raises BadImage."""
        pixels = jpeg.pixels(self.data, self.structure, (top, left, h, w))
        if pixels is None:
            cut = decode(self.data, self.channels)[:, top : top + h, left : left + w]
        else:
            cut = _tensor(pixels, self.channels, "uint8")
        if self.when_cut is not None:
            self.when_cut()
        return cut

    def whole(self) -> Tensor:
        """All pixels (C, H, W): cheaper than two boxes. Raises BadImage."""
        return decode(self.data, self.channels)


def _check_bytes(data: bytes | memoryview) -> None:
    if len(data) > MAX_BYTES:
        raise BadImage(f"{len(data)} bytes exceed the limit of {MAX_BYTES}")


def _check_size(height: int, width: int, channels: int, itemsize: int = 1) -> None:
    """Refuse what would take too much memory, before it is taken."""
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels; at least 1 x 1 and at most {MAX_PIXELS} pixels are decoded")
    if height * width * channels * itemsize > MAX_DECODED:
        raise BadImage(f"{width} x {height} pixels of {channels} channels exceed {MAX_DECODED} bytes when decoded")


def _own_header(data: bytes) -> Header | None:
    """The header of what Pillow does not read, or would change; None for the rest."""
    _check_bytes(data)
    if data.startswith(npy.MAGIC):
        header = npy.header(data)
    elif not tiff.is_tiff(data) or (found := tiff.header(data)) is None:
        return None
    else:
        header = found
    _check_size(header.height, header.width, header.channels, np.dtype(header.dtype).itemsize)
    return header


def _own_pixels(data: bytes, header: Header) -> np.ndarray:
    return npy.pixels(data) if header.ending == "npy" else tiff.pixels(data, header)


def _pillow_header(data: bytes, image: Image.Image) -> Header:
    deep_png = _is_deep_png(data)
    deep = deep_png or image.mode in DEEP_MODES
    channels = 1 if image.mode in GRAY_MODES or (deep_png and data[25] == 4) else 3
    return Header(ENDINGS[str(image.format)], channels, "uint16" if deep else "uint8", image.height, image.width)


def _is_deep_png(data: bytes) -> bool:
    """Whether a PNG has 16 bits in several channels, of which Pillow keeps 8: the header block is always the first."""
    return data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10" and data[25] in (2, 4, 6)


def _with_pillow(data: bytes) -> np.ndarray:
    """Decode the first frame to (H, W, 1 or 3), uint8 or uint16, upright and opaque. Raises BadImage."""
    with _open(data) as image:
        try:
            image.load()
            orientation = _orientation(image)
            if _is_deep_png(data):
                pixels = _deep_png(data)
            elif image.mode in DEEP_MODES:
                pixels = _deep_gray(image)
            else:
                gray = image.mode in GRAY_MODES
                pixels = np.array(_opaque(image).convert("L" if gray else "RGB"))
        except MemoryError:  # says something about the machine, not about the image
            raise
        except Exception as error:  # decoders raise a dozen types on hostile bytes
            raise BadImage(_reason(error)) from error
    return _turn(pixels.reshape(*pixels.shape[:2], -1), orientation)


def _open(data: bytes) -> Image.Image:
    """Check everything that the header can tell."""
    _check_bytes(data)
    if not data:
        raise BadImage("the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise BadImage("not a JPEG, PNG, WebP, BMP, TIFF or .npy image") from error
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"more pixels than the {MAX_PIXELS} that are decoded ({_reason(error)})") from error
    except Exception as error:  # as above
        raise BadImage(_reason(error)) from error
    _check_size(image.height, image.width, 3)
    if image.mode not in GRAY_MODES + COLOUR_MODES:
        raise BadImage(f"pixels of mode {image.mode!r}; 8 or 16 bits per channel and float32 are decoded")
    return image


def _deep_gray(image: Image.Image) -> np.ndarray:
    """16-bit gray (H, W); the level that a PNG names transparent becomes white."""
    pixels = np.asarray(image).astype(np.uint16)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        pixels[pixels == transparent] = 65535
    return pixels


def _deep_png(data: bytes) -> np.ndarray:
    """16 bits in several channels -> (H, W, 1 or 3) uint16.

    Pillow unpacks such a file to the high bytes; told that its bytes are swapped, it unpacks the low ones. Gray with
    alpha has the four bytes of RGBA.
    """
    rawmodes = {2: ("RGB;16B", "RGB;16L"), 4: ("RGBA",), 6: ("RGBA;16B", "RGBA;16L")}[data[25]]
    planes = []
    for rawmode in rawmodes:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.tile = [tile._replace(args=rawmode) for tile in image.tile]
            planes.append(np.asarray(image).astype(np.uint16))
            transparent = image.info.get("transparency")
    if data[25] == 4:
        high, low = planes[0][..., 0::2], planes[0][..., 1::2]
    else:
        high, low = planes
    pixels = high << 8 | low  # (H, W, 2 to 4)
    if data[25] != 2:
        pixels = on_white(pixels[..., :-1], pixels[..., -1:])
    elif isinstance(transparent, tuple):
        pixels[(pixels == transparent).all(axis=2)] = 65535
    return pixels


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(jpeg.ORIENTATION, 1)
    except Exception:  # any broken EXIF block
        return 1


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Stored pixels (H, W, C) -> upright ones, by the EXIF orientation; unknown ones change nothing."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _opaque(image: Image.Image) -> Image.Image:
    """Composite on white what is transparent, by alpha channel or by a transparent colour."""
    if image.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and "transparency" not in image.info:
        return image
    background = Image.new("RGBA", image.size, "white")
    background.alpha_composite(image.convert("RGBA"))
    return background.convert("RGB")


def _tensor(pixels: np.ndarray, channels: int, dtype: str) -> Tensor:
    """(H, W, c) -> (C, H, W) of `dtype`; the memory stays (H, W, C)."""
    if pixels.dtype != np.dtype(dtype):
        found = pixels.dtype.name
        if {found, dtype} - {"uint8", "uint16"}:
            raise BadImage(f"pixels of {found} where the dataset has {dtype}")
        pixels = pixels.astype(np.uint16) * 257 if dtype == "uint16" else (pixels >> 8).astype(np.uint8)
    if pixels.shape[2] != channels:
        pixels = _convert(pixels, channels)
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)  # (C, H, W)


def _convert(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Gray to colour and back, (H, W, c) -> (H, W, C)."""
    height, width, found = pixels.shape
    if (found, channels) == (1, 3):
        return np.repeat(pixels, 3, axis=2)
    if (found, channels) != (3, 1):
        raise BadImage(f"{found} channels, but data.channels={channels}; only 1 and 3 are converted into each other")
    if pixels.dtype == np.uint8:
        return np.array(Image.fromarray(np.ascontiguousarray(pixels)).convert("L")).reshape(height, width, 1)
    gray = pixels @ np.array(LUMA)
    return (gray.round() if pixels.dtype.kind == "u" else gray).astype(pixels.dtype)[..., None]


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
