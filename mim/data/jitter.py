"""Colour jitter on the device: brightness, contrast and saturation of each sample, the same in all of its views.

BEiT: Bao et al. 2021, arXiv 2106.08254, appendix (strength 0.4). On the device it costs the loader nothing. The draws
are a hash of the sample's `noise`, so no rank, batch or resume can change them.

Differences from torchvision's `ColorJitter`, which BEiT applies before the crop: the contrast is around the mean of the
crop, not of the image; the order is always brightness, contrast, saturation, which makes one affine map of the three;
and it is clamped once, at its end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mim.data.decode import LUMA
from tokenizer.quantize import uniform_noise

SALT = 0x6A69747465720001  # "jitter": other uses of the same noise draw other numbers


def jitter_(views: list[Tensor], noise: Tensor, strength: float) -> None:
    """Change the colours of views (B, 3, h, w) in [0, 1], in place.

    noise (B,) int64. Factors are uniform in 1 - strength to 1 + strength. Contrast turns around the mean of the first
    view in all views.
    """
    draws = uniform_noise(noise ^ SALT, (3,))  # (B, 3)
    factors = (1 + strength * (2 * draws - 1))[:, :, None, None]  # (B, 3, 1, 1)
    step = 1 if noise.device.type == "cpu" else len(noise)  # on a CPU a sample at a time stays in its cache
    for start in range(0, len(noise), step):
        rows = slice(start, start + step)
        _change_([view[rows] for view in views], factors[rows])


def jitter_crops_(crops: list[Tensor], noise: Tensor, strength: float) -> None:
    """Change the colours of crops (B, V, 3, h, w), in place: each crop by draws of its own."""
    for number, crop in enumerate(crop for views in crops for crop in views.unbind(dim=1)):
        jitter_([crop], noise + number, strength)


def _change_(views: list[Tensor], factors: Tensor) -> None:
    brightness, contrast, saturation = factors.split(1, dim=1)  # (B, 1, 1, 1) each
    lumas = [_luma(view) for view in views]  # (B, 1, h, w)
    shift = (1 - contrast) * brightness * lumas[0].mean(dim=(2, 3), keepdim=True)
    gain = brightness * contrast
    for view, luma in zip(views, lumas, strict=True):
        grayed = torch.addcmul(shift, luma, gain * (1 - saturation))  # (B, 1, h, w)
        torch.addcmul(grayed, view, gain * saturation, out=view).clamp_(0, 1)


def _luma(view: Tensor) -> Tensor:
    """(B, 3, h, w) -> (B, 1, h, w)"""
    red, green, blue = LUMA
    return (red * view[:, 0:1]).add_(view[:, 1:2], alpha=green).add_(view[:, 2:3], alpha=blue)
