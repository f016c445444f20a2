"""Views: functions from one image (C, H, W) to views (C, h, w) of the same type, one per asked size.

All sizes share one box and one flip, so that a tokenizer at another resolution sees what the encoder sees. A recipe
selects a view by name; its keyword-only options are the keys of the section. Draws come from the sample's own
generator.

A view draws its box from the shape alone, so an image may come encoded (`decode.Encoded`) and only the box be decoded.

Resizing is antialiased bicubic on uint8, the same filter as Pillow's within one level and three times as fast; uint16
and float32, of any number of channels, take the same filter in float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mim.data.decode import LUMA, Encoded
from mim.data.randaugment import rand_augment

Sizes = list[tuple[int, int]]  # (h, w) of each view
Image = Tensor | Encoded  # (C, H, W)


class Box(NamedTuple):
    """A rectangle of source pixels."""

    top: int
    left: int
    h: int
    w: int


def crop(
    image: Image,
    rng: np.random.Generator,
    sizes: Sizes,
    *,
    scale: tuple[float, float] = (0.2, 1.0),  # share of the area (MAE, appendix A.1)
    ratio: tuple[float, float] = (3 / 4, 4 / 3),  # width / height, log-uniform (Inception; torchvision's default)
    hflip: float = 0.5,  # probability
) -> list[Tensor]:
    """Random resized crop and horizontal flip, distributed as torchvision's `RandomResizedCrop`."""
    box = _random_box(image.shape[1], image.shape[2], rng, scale, ratio)
    flip = rng.random() < hflip
    views = _render(image, box, sizes)
    return [view.flip(2) for view in views] if flip else views


def center(
    image: Image,
    rng: np.random.Generator,
    sizes: Sizes,
    *,
    crop_ratio: float = 0.875,  # crop side / resized short side: 224 / 256
) -> list[Tensor]:
    """Centre crop for evaluation, without randomness: the framing of "resize the short side, then crop".

    The box is cut first, in whole source pixels (so it differs by less than one from resizing first), with the aspect
    of the first size, and shared by all sizes.
    """
    height, width = image.shape[1:]
    h, w = sizes[0]
    unit = min(height / h, width / w) * crop_ratio  # source pixels per view pixel
    box_h, box_w = max(1, round(h * unit)), max(1, round(w * unit))
    box = Box((height - box_h) // 2, (width - box_w) // 2, box_h, box_w)
    return _render(image, box, sizes)


def multi_crop(
    image: Image,
    rng: np.random.Generator,
    sizes: Sizes,
    *,
    num_global: int = 2,
    global_scale: tuple[float, float] = (0.4, 1.0),  # share of the area (DINO, appendix C; 0.25 in its longest runs)
    num_local: int = 8,
    local_scale: tuple[float, float] = (0.05, 0.4),
    local_size: int = 96,  # pixels, square
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
) -> dict[str, Tensor]:
    """Several crops of one image (SwAV, arXiv 2006.09882, section 3.2; DINO, arXiv 2104.14294, section 3.1).

    Returns `images` (V, C, H, W) at the run's size and `local_images` (n, C, h, w), each of a box and flip of its own.
    """
    whole = image.whole() if isinstance(image, Encoded) else image  # together the boxes cover most of it
    kinds = {
        "images": (num_global, global_scale, sizes[0]),
        "local_images": (num_local, local_scale, (local_size,) * 2),
    }
    return {
        name: torch.stack([crop(whole, rng, [size], scale=scale, ratio=ratio, hflip=hflip)[0] for _ in range(num)])
        for name, (num, scale, size) in kinds.items()
        if num
    }


def gray_crop(
    image: Image,
    rng: np.random.Generator,
    sizes: Sizes,
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
) -> list[Tensor]:
    """`crop` in gray with random contrast, brightness and inversion: shape tells, colour and polarity do not."""
    return _gray(crop(image, rng, sizes, scale=scale, ratio=ratio, hflip=hflip), rng)


def gray_center(
    image: Image,
    rng: np.random.Generator,
    sizes: Sizes,
    *,
    crop_ratio: float = 0.875,
) -> list[Tensor]:
    """`center` with the photometric change of `gray_crop`: evaluation sees the distribution of training."""
    return _gray(center(image, rng, sizes, crop_ratio=crop_ratio), rng)


def rand_augment_crop(
    image: Image,
    rng: np.random.Generator,
    sizes: Sizes,
    *,
    scale: tuple[float, float] = (0.08, 1.0),  # as timm's training script, and with it BEiT, MAE and DeiT
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    policy: str = "rand-m9-mstd0.5-inc1",  # timm's notation; BEiT, MAE and DeiT alike
    fill: tuple[int, int, int] = (124, 116, 104),  # levels outside a moved image; ImageNet's mean
) -> list[Tensor]:
    """`crop`, then RandAugment: for supervised training on 8-bit images of 1 or 3 channels."""
    views = crop(image, rng, sizes, scale=scale, ratio=ratio, hflip=hflip)
    seed = int(rng.integers(2**63))
    return [rand_augment(view, seed, policy=policy, fill=tuple(fill)) for view in views]


def _random_box(
    height: int, width: int, rng: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Draw area and aspect until the box fits; after ten tries take the largest centred box of an allowed aspect."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return Box(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    h, w = max(1, min(height, round(width / aspect))), max(1, min(width, round(height * aspect)))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def _render(image: Image, box: Box, sizes: Sizes) -> list[Tensor]:
    """Cut a box and resize it to each size. (C, H, W) -> (C, h, w)"""
    if isinstance(image, Encoded):
        cut = image.cut(*box)
    else:
        cut = image[:, box.top : box.top + box.h, box.left : box.left + box.w]
    if cut.dtype == torch.uint8:
        # (1, C, H, W) over (H, W, C) memory, for which the kernel is fastest and which it keeps. The batch is added to
        # (H, W, C): added to (C, H, W) it gets a stride that torch does not take for this layout, and the result is
        # transposed, which costs as much as the resize.
        batch = cut.permute(1, 2, 0)[None].contiguous().permute(0, 3, 1, 2)
    else:
        batch = cut[None].float()
    return [cut if cut.shape[1:] == size else _resize(batch, size, cut.dtype) for size in map(torch.Size, sizes)]


def _resize(batch: Tensor, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """(1, C, H, W) -> (C, h, w) of `dtype`"""
    resized = F.interpolate(batch, size=size, mode="bicubic", antialias=True)[0]  # (C, h, w)
    return resized.round_().clamp_(0, 65535).to(dtype) if dtype == torch.uint16 else resized


def _gray(views: list[Tensor], rng: np.random.Generator) -> list[Tensor]:
    """Gray level g -> (g - mean) * contrast + mean + shift, half of the time inverted; the same change in all views."""
    if views[0].dtype != torch.uint8 or views[0].shape[0] not in (1, 3):
        c, depth = views[0].shape[0], str(views[0].dtype).removeprefix("torch.")
        raise ValueError(
            f"gray views take 8-bit images of 1 or 3 channels, not {c} of {depth}; use view crop or center"
        )
    contrast, shift, invert = rng.uniform(0.5, 1.5), rng.uniform(-48, 48), rng.random() < 0.5  # shift in levels of 255
    grays = [_luma(view) for view in views]
    mean = grays[0].mean(dtype=torch.float64).item()
    levels = (torch.arange(256, dtype=torch.float64) - mean) * contrast + mean + shift
    table = levels.round().clamp(0, 255).to(torch.uint8)
    if invert:
        table = 255 - table
    return [table[gray.long()].expand_as(view) for gray, view in zip(grays, views, strict=True)]


def _luma(view: Tensor) -> Tensor:
    """(C, h, w) -> (1, h, w) gray levels"""
    if view.shape[0] == 1:
        return view
    weights = torch.tensor(LUMA).view(3, 1, 1)
    return (view * weights).sum(0, keepdim=True).round().to(torch.uint8)  # (1, h, w)
