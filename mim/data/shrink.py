"""Smaller images for `mim shards make --resize`: what is larger than needed is resized once, and not at every epoch.

Only images whose short side exceeds the target are touched: antialiased bicubic (torch's uint8 kernel, as the views
use it), stored as JPEG with 4:2:0 chroma. Orientation and transparency are applied before, as decoding does. All other
images keep their bytes.
"""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mim.contracts import DataError


def shrunk(pixels: Tensor, *, short: int, quality: int) -> bytes | None:
    """Encode an image (C, H, W) with its short side at `short` pixels; None when it is no larger than that."""
    channels, height, width = pixels.shape
    if min(height, width) <= short:
        return None
    if pixels.dtype != torch.uint8 or channels not in (1, 3):
        raise DataError(f"{channels} channels of {pixels.dtype} cannot be stored as JPEG; leave --resize out")
    size = [max(1, round(side * short / min(height, width))) for side in (height, width)]
    batch = pixels[None].contiguous(memory_format=torch.channels_last)  # the layout of the fast uint8 kernel
    small = F.interpolate(batch, size=size, mode="bicubic", antialias=True)[0]  # (C, h, w)
    buffer = io.BytesIO()
    array = small.permute(1, 2, 0).contiguous().numpy()  # (h, w, C)
    Image.fromarray(array[..., 0] if channels == 1 else array).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
