"""Heads of semantic segmentation: maps of an encoder -> class scores on a coarser grid than the image's.

- `Linear`: one linear map per token, after a BatchNorm (DINOv2, Oquab et al. 2023, arXiv 2304.07193, section 7.4).
- `ProgressiveUpsampling`: SETR-PUP (Zheng et al. 2021, arXiv 2012.15840, section 3.3): convolution and doubling in
  turns up to the size of the image. BEiT's first ADE20K number is of such a head.
- `UPerNet` (Xiao et al. 2018, arXiv 1807.10221, section 3.1): pooled context on the coarsest of four levels, a
  top-down path, and a fusion at the finest. `Pyramid` makes the levels of a plain transformer, whose blocks share one
  grid, as BEiT does (arXiv 2106.08254, its semantic_segmentation/backbone/beit.py).
- `FCN` (Long et al. 2015, arXiv 1411.4038): one convolution; the auxiliary head of UPerNet.

Initial weights are mmsegmentation's: convolutions after He et al. 2015, scores with a std of 0.01. Norms are named by
`norm`: `batch` as published, over all ranks; `group` (Wu and He 2018, arXiv 1803.08494; 16 channels each) where a loss
must not depend on how a batch is split.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim.batch_norm import BatchNorm

NORMS = ("group", "batch")
POOLED = (1, 2, 3, 6)  # cells per side of UPerNet's pooled context, published
STRIDES = (4, 8, 16, 32)  # pixels per cell of the levels of a pyramid
GROUP = 16  # channels of a GroupNorm's group


class Level(NamedTuple):
    """A map that an encoder offers."""

    block: int  # counted from 0
    width: int
    stride: int  # pixels per cell


class Linear(nn.Module):
    """Scores of the last map alone, of its own size."""

    def __init__(self, width: int, num_classes: int, *, norm: str, dropout: float) -> None:
        super().__init__()
        self.norm = BatchNorm(width) if norm == "batch" else nn.Identity()  # the encoder's own norm came before
        self.scores = scores(width, num_classes, dropout)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps (B, D, h, w), the last counts -> (B, classes, h, w)."""
        return self.scores(self.norm(maps[-1]))


class ProgressiveUpsampling(nn.Module):
    """Convolution and bilinear doubling in turns: as many as bring a cell of the last map down to a pixel."""

    def __init__(self, level: Level, num_classes: int, *, channels: int, norm: str, dropout: float) -> None:
        super().__init__()
        num_steps = max(math.ceil(math.log2(level.stride)), 1)  # 4 for a stride of 16, as published
        widths = [level.width] + [channels] * num_steps
        self.steps = nn.ModuleList(convolution(a, b, 3, norm=norm) for a, b in itertools.pairwise(widths))
        self.scores = scores(channels, num_classes, dropout)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps (B, D, h, w), the last counts -> (B, classes, h * 2^steps, w * 2^steps)."""
        x = maps[-1]
        for step in self.steps:
            x = resized(step(x), (2 * x.shape[2], 2 * x.shape[3]))
        return self.scores(x)


class Pyramid(nn.Module):
    """Maps of one stride -> maps of strides 4, 8, 16 and 32, by deconvolutions and pooling.

    For patches of 14 pixels the strides are 3.5 to 28: those of patches of 16 on another scale.
    """

    def __init__(self, levels: list[Level], *, norm: str) -> None:
        super().__init__()
        finer = [round(math.log2(level.stride)) - STRIDES[0].bit_length() + 1 - i for i, level in enumerate(levels)]
        self.steps = nn.ModuleList(
            self._step(level.width, times, norm) for times, level in zip(finer, levels, strict=True)
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps (B, D, h, w) -> for patches of 16 pixels maps of 4h x 4w, 2h x 2w, h x w and h/2 x w/2 cells."""
        return [step(x) for step, x in zip(self.steps, maps, strict=True)]

    def _step(self, width: int, times: int, norm: str) -> nn.Module:
        """Make a map `times` times twice as fine, or half as fine where it is negative."""
        if times <= 0:
            return nn.MaxPool2d(2**-times, ceil_mode=True) if times else nn.Identity()
        parts: list[nn.Module] = [nn.ConvTranspose2d(width, width, 2, stride=2)]
        for _ in range(times - 1):
            parts += [norm_of(norm, width), nn.GELU(), nn.ConvTranspose2d(width, width, 2, stride=2)]
        return nn.Sequential(*parts)


class UPerNet(nn.Module):
    """Scores at the finest of several levels, each of which is half as fine as the one before."""

    def __init__(self, widths: list[int], num_classes: int, *, channels: int, norm: str, dropout: float) -> None:
        super().__init__()
        *finer, coarsest = widths
        self.pooled = nn.ModuleList(convolution(coarsest, channels, 1, norm=norm) for _ in POOLED)
        self.context = convolution(coarsest + len(POOLED) * channels, channels, 3, norm=norm)
        self.lateral = nn.ModuleList(convolution(width, channels, 1, norm=norm) for width in finer)
        self.smooth = nn.ModuleList(convolution(channels, channels, 3, norm=norm) for _ in finer)
        self.fuse = convolution(len(widths) * channels, channels, 3, norm=norm)
        self.scores = scores(channels, num_classes, dropout)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps (B, D_i, h_i, w_i), finest first -> (B, classes, h_0, w_0)."""
        top = self.look_around(maps[-1])  # (B, channels, h, w)
        path = [top]
        for lateral, x in zip(reversed(self.lateral), reversed(maps[:-1]), strict=True):
            path.insert(0, lateral(x) + resized(path[0], x.shape[2:]))
        smooth = [smooth(x) for smooth, x in zip(self.smooth, path[:-1], strict=True)]
        joined = torch.cat([resized(x, path[0].shape[2:]) for x in (*smooth, top)], dim=1)  # (B, levels * channels, ..)
        return self.scores(self.fuse(joined))

    def look_around(self, x: Tensor) -> Tensor:
        """The pyramid pooling of PSPNet (Zhao et al. 2017, arXiv 1612.01105): (B, D, h, w) -> (B, channels, h, w)."""
        seen = [
            resized(squeeze(F.adaptive_avg_pool2d(x, cells)), x.shape[2:])
            for squeeze, cells in zip(self.pooled, POOLED, strict=True)
        ]
        return self.context(torch.cat([x, *seen], dim=1))


class FCN(nn.Module):
    """One convolution and scores, of the map's own size."""

    def __init__(self, width: int, num_classes: int, *, channels: int, norm: str, dropout: float) -> None:
        super().__init__()
        self.convolution = convolution(width, channels, 3, norm=norm)
        self.scores = scores(channels, num_classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, D, h, w) -> (B, classes, h, w)."""
        return self.scores(self.convolution(x))


def resized(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Bilinear, corners not aligned, as mmsegmentation has it: (B, D, h, w) -> (B, D, *size)."""
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def convolution(width: int, channels: int, kernel: int, *, norm: str) -> nn.Module:
    """Convolution, norm and ReLU, of the same size."""
    conv = nn.Conv2d(width, channels, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, norm_of(norm, channels), nn.ReLU())


def scores(width: int, num_classes: int, dropout: float) -> nn.Module:
    """Dropout of whole channels, then one linear map per cell."""
    conv = nn.Conv2d(width, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return nn.Sequential(nn.Dropout2d(dropout), conv)


def norm_of(norm: str, channels: int) -> nn.Module:
    """The norm called `batch` or `group`."""
    return BatchNorm(channels) if norm == "batch" else nn.GroupNorm(channels // math.gcd(channels, GROUP), channels)
