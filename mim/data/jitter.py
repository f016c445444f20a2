"""Colour jitter on the device: brightness, contrast and saturation of each sample, the same in all of its views.

BEiT: Bao et al. 2021, arXiv 2106.08254, appendix (strength 0.4). On the device it costs the loader nothing. The draws
are a hash of the sample's `noise`, so no rank, batch or resume can change them.

Differences from torchvision's `ColorJitter`, which BEiT applies before the crop: the contrast is around the mean of the
crop, not of the image; the order is always brightness, contrast, saturation, which makes one affine map of the three;
and it is clamped once, at its end.
"""

from __future__ import annotations

from torch import Tensor

from mim.data.decode import LUMA
from tokenizer.quantize import uniform_noise

SALT = 0x6A69747465720001  # "jitter": other uses of the same noise draw other numbers


def jitter(views: list[Tensor], noise: Tensor, strength: float) -> list[Tensor]:
    """Change the colours of views (B, 3, h, w) in [0, 1]; factors are uniform in 1 - strength to 1 + strength.

    noise (B,) int64. The mean that contrast turns around is that of the first view, for all views.
    """
    draws = uniform_noise(noise ^ SALT, (3,))  # (B, 3)
    brightness, contrast, saturation = (1 + strength * (2 * draws - 1)).T[:, :, None, None, None]  # (B, 1, 1, 1) each
    lumas = [_luma(view) for view in views]  # (B, 1, h, w)
    mean = brightness * lumas[0].mean(dim=(2, 3), keepdim=True)
    gain = brightness * contrast
    changed = []
    for view, luma in zip(views, lumas, strict=True):
        grayed = luma.mul_(gain * (1 - saturation)).add_((1 - contrast) * mean)
        changed.append((view * (gain * saturation)).add_(grayed).clamp_(0, 1))
    return changed


def _luma(view: Tensor) -> Tensor:
    """(B, 3, h, w) -> (B, 1, h, w)"""
    red, green, blue = LUMA
    return (red * view[:, 0:1]).add_(view[:, 1:2], alpha=green).add_(view[:, 2:3], alpha=blue)
