"""Picture: what the patch embedding looks for, as the principal components of its filters.

Dosovitskiy et al. 2021, "An Image Is Worth 16x16 Words", arXiv 2010.11929, figure 7 (left): the leading components
resemble a basis for the fine structure within a patch. The filters are centred, the components come from an exact SVD
and are shown around mid-gray, each at its own contrast, its entry of largest magnitude bright. Of a stem of several
convolutions it is the first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mim.config import ConfigError
from mim.contracts import LoadedRun, NamedValues
from mim.pictures.drawing import picture, table
from mim.probing.features import in_colour


@dataclass
class Config:
    num: int = 28  # components
    columns: int = 7
    height: int = 64  # pixels of a filter


def run(loaded: LoadedRun, cfg: Config) -> NamedValues:
    """Yield the picture of the components, the leading one first."""
    if min(cfg.num, cfg.columns, cfg.height) < 1:
        raise ConfigError(f"num={cfg.num}, columns={cfg.columns} and height={cfg.height} must be at least 1")
    name, weights = _filters(loaded)
    found, shares = components(weights, cfg.num)
    shown = [picture(filter, cfg.height) for filter in in_colour(found).cpu()]
    rows = [shown[start : start + cfg.columns] for start in range(0, len(shown), cfg.columns)]
    title = f"{len(shown)} components of {len(weights)} filters of {name}: {shares.sum():.0%} of their variance"
    yield "filters", table(rows, title=title)


def components(weights: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Principal components (num, C, h, w) in [0, 1] of filters (D, C, h, w), and their shares of the variance (num,).

    0.5 is a weight of zero; there are no more components than filters or weights.
    """
    flat = weights.detach().double().flatten(1)  # (D, C * h * w)
    _, s, v = torch.linalg.svd(flat - flat.mean(dim=0), full_matrices=False)
    v = v[:num]  # (num, C * h * w)
    largest = v.gather(1, v.abs().argmax(dim=1, keepdim=True))  # (num, 1)
    shown = (v / largest / 2 + 0.5).float().unflatten(1, weights.shape[1:])
    shares = s.square() / s.square().sum().clamp_min(1e-300)
    return shown, shares[:num]


def _filters(loaded: LoadedRun) -> tuple[str, Tensor]:
    """The first convolution that sees the pixels: its name and its weights (D, C, h, w)."""
    if loaded.encoder is None:
        raise ConfigError(f"{loaded.path} trains a tokenizer, which embeds no patches; take a run of an encoder")
    for name, module in loaded.encoder.named_modules():
        sees_pixels = isinstance(module, nn.Conv2d) and module.in_channels == loaded.encoder.channels
        if sees_pixels and module.kernel_size != (1, 1):
            return name, module.weight
    raise ConfigError(f"{loaded.path} has no convolution over pixels, so there are no filters to show")
