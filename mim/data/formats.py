"""What the readers of image formats share: what a header says, and how bytes are refused."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mim.contracts import DataError

DTYPES = {"uint8": 255, "uint16": 65535, "float32": 1}  # what pixels may be -> the raw value that stands for 1


class BadImage(DataError):
    """Bytes that are no image by the rules of `decode.py`; the message is the reason."""


class Header(NamedTuple):
    """What an image says of itself. Height and width are those of the stored pixels, before EXIF turns them."""

    ending: str  # of its true format: jpg, png, webp, bmp, tif or npy
    channels: int  # 1, 3, or any number (npy, tif); transparency is not counted, it is composited
    dtype: str  # of DTYPES
    height: int
    width: int


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Composite 16-bit pixels (H, W, C) on white by their alpha (H, W, 1), rounded to the nearest level."""
    share = alpha.astype(np.uint64)
    return ((colour * share + 65535 * (65535 - share) + 32767) // 65535).astype(np.uint16)
