"""Mean and deviation of patches that nobody may look at, from those that can be seen.

MAE with normalised targets (He et al. 2022, arXiv 2111.06377, section 4.1) predicts each patch up to its own mean and
deviation. The published notebook takes both from the masked pixels themselves, so the picture holds what the network
was never given. Here they are interpolated from the visible patches, weighted by the inverse of their distance (Shepard
1968, "A two-dimensional interpolation function for irregularly-spaced data").
"""

from __future__ import annotations

import torch
from torch import Tensor

POWER = 4  # of the distance in the weights: above 2, or what is far away outweighs what is near


def statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance (B, N, 1) of patches (B, N, P)."""
    return patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)


def from_visible(patches: Tensor, mask: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, N, 1) of patches (B, N, P) on a grid (h, w): the own of visible ones, else interpolated.

    mask: (B, N) bool, True = masked; at least one patch of each row is visible. Masked values change nothing.
    """
    h, w = grid
    rows, columns = torch.meshgrid(*(torch.arange(n, device=patches.device) for n in grid), indexing="ij")
    places = torch.stack([rows, columns], dim=-1).reshape(h * w, 2).to(patches.dtype)
    apart = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")  # (N, N), not rounded by a product
    distance = apart.clamp_min(1.0)  # that of a patch to itself is not used
    weights = (~mask).unsqueeze(1) / distance**POWER  # (B, N, N), queries before keys
    weights = weights / weights.sum(dim=-1, keepdim=True)
    hidden = mask.unsqueeze(-1)  # (B, N, 1)
    mean, variance = (torch.where(hidden, weights @ own.masked_fill(hidden, 0), own) for own in statistics(patches))
    return mean, variance
