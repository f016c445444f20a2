"""What is done to a batch on the device before a classifier sees it: random erasing, mixup and CutMix, timm's.

Zhong et al. 2020, arXiv 1708.04896; Zhang et al. 2018, arXiv 1710.09412; Yun et al. 2019, arXiv 1905.04899. First
erased, then mixed, as BEiT, MAE and DeiT do it. Draws come from the default generators (erasing: python's and torch's;
mixing: numpy's), which the loop seeds by name before each micro-batch.
"""

from __future__ import annotations

import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor


def erase(images: Tensor, rate: float, *, mean: Tensor, std: Tensor) -> Tensor:
    """Images (B, C, H, W) in [0, 1] in which a share has a box of noise, normal in the network's normalised pixels.

    mean and std (1, C, 1, 1) are the network's. The noise is not limited to [0, 1]. timm erases normalised images;
    here the noise is made beside them, so that no other pixel changes in its last bit.
    """
    noise = torch.full_like(images, float("nan"))
    RandomErasing(rate, mode="pixel", device=str(images.device))(noise)
    return torch.where(noise.isnan(), images, noise * std + mean)


class Mixing:
    """Mixup and CutMix of a micro-batch: each row with the one that mirrors it, by one share for all rows."""

    def __init__(self, mixup_alpha: float, cutmix_alpha: float, *, smoothing: float, num_classes: int) -> None:
        self._mixup = Mixup(mixup_alpha, cutmix_alpha, label_smoothing=smoothing, num_classes=num_classes)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and labels (B,) -> mixed images, soft labels (B, classes).

        A row whose label or whose partner's is unknown (-1) gets a soft label of zeros.
        """
        b, half = len(labels), len(labels) // 2
        rows = torch.arange(b, device=labels.device)
        if b % 2:  # the middle row is its own partner; timm wants an even number, so it comes twice
            rows = torch.cat([rows[: half + 1], rows[half:]])  # (B + 1,)
        mixed, targets = self._mixup(images[rows], labels[rows].clamp(min=0))  # in place, on a copy
        if b % 2:
            mixed, targets = (torch.cat([t[:half], t[half + 1 :]]) for t in (mixed, targets))
        known = (labels >= 0) & (labels.flip(0) >= 0)
        return mixed, targets * known[:, None]
