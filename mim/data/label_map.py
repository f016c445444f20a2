"""Label maps: the class of every pixel of an image, as a PNG beside it, and how it is read and written.

A label map is an 8-bit PNG: the gray level, or the index into the palette, is the class; colours mean nothing. 255
(`IGNORE`) is no class: the boundary of VOC, what a loss must not see. It belongs to the upright image, as one sees it
and as OpenCV loads it: an orientation in the image's EXIF is applied to the image and not to the map, and the size of
the map must be that of the upright image. A map that states an orientation of its own is refused.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mim.contracts import IGNORE
from mim.data.decode import Encoded
from mim.data.formats import BadImage
from mim.data.jpeg import ORIENTATION

ENDING = "seg.png"  # of the member: what WebDataset's decoders take for a PNG
MAGIC = b"\x89PNG\r\n\x1a\n"
KINDS = {0: "gray", 2: "RGB", 3: "palette", 4: "gray with transparency", 6: "RGB with transparency"}  # of PNG
STEPS = {2: 85, 4: 17}  # between the gray levels that Pillow makes of so many bits


class Pair(NamedTuple):
    """An image and its label map, as views of segmentation take them."""

    image: Tensor | Encoded  # (C, H, W)
    label_map: Tensor  # (H, W) uint8


def decode_label_map(data: bytes | memoryview, size: tuple[int, ...], num_classes: int | None = None) -> Tensor:
    """Decode the label map of an image whose upright size is (H, W). Returns (H, W) uint8.

    Raises BadImage for what is no 8-bit PNG of that size, and for classes from `num_classes` on other than IGNORE.
    """
    data = bytes(data)
    if data[:8] != MAGIC or data[12:16] != b"IHDR":
        raise BadImage("its label map is no PNG")
    bits, kind = data[24], data[25]
    if kind not in (0, 3) or bits > 8:
        raise BadImage(
            f"its label map is a PNG of {bits} bits {KINDS.get(kind, '')}; the class of a pixel is the gray level, or "
            f"the palette's index, of 8 bits"
        )
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if (image.height, image.width) != tuple(size):
                raise BadImage(
                    f"its label map is {image.height} x {image.width}, but the image {size[0]} x {size[1]} "
                    f"(height x width, turned by its EXIF)"
                )
            image.load()
            pixels = np.array(image).astype(np.uint8, copy=False)  # (H, W); of a palette, the indices
            turned = image.getexif().get(ORIENTATION, 1) != 1
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # decoders raise a dozen types on hostile bytes
        raise BadImage(f"its label map: {' '.join(str(error).split()) or type(error).__name__}") from error
    if turned:
        raise BadImage("its label map states an EXIF orientation of its own; save it upright")
    if kind == 0:
        pixels //= STEPS.get(bits, 1)
    if num_classes is not None and (found := largest(pixels)) >= num_classes:
        raise BadImage(f"its label map holds class {found}, but there are {num_classes} classes, from 0 on")
    return torch.from_numpy(pixels)


def largest(label_map: np.ndarray) -> int:
    """The largest class of a map; -1 when all is ignored."""
    return int((label_map + np.uint8(1)).max()) - 1  # IGNORE wraps around to 0


def encode_label_map(label_map: Tensor) -> bytes:
    """A map (H, W) uint8 as gray PNG."""
    buffer = io.BytesIO()
    Image.fromarray(label_map.numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def without_zero(label_map: Tensor) -> Tensor:
    """Class 0 becomes IGNORE and all others move down by one, as ADE20K is read."""
    table = torch.arange(-1, 255).to(torch.uint8)  # uint8 wraps -1 around to IGNORE
    table[IGNORE] = IGNORE
    return table[label_map.long()]


def resized(label_map: Tensor, size: tuple[int, ...]) -> Tensor:
    """A map (H, W) as (h, w): the class at the centre of each pixel, where bicubic resizing has its pixels too."""
    if tuple(label_map.shape) == tuple(size):
        return label_map
    rows, columns = (
        ((np.arange(new) + 0.5) * (old / new)).astype(np.int64).clip(max=old - 1)
        for old, new in zip(label_map.shape, size, strict=True)
    )
    return torch.from_numpy(label_map.numpy()[rows][:, columns])  # torch's indexing takes ten times as long


def colours() -> np.ndarray:
    """A colour for every class, for pictures: (256, 3) uint8, as VOC's tools make them; IGNORE is white."""
    table = np.zeros((256, 3), np.uint8)
    number = np.arange(256)
    for bit in range(8):
        for channel in range(3):
            table[:, channel] |= ((number >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    table[IGNORE] = 255
    return table
