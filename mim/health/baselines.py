"""What a masked patch can be predicted by without learning anything: the yardsticks of a pretraining loss.

A loss alone says little: that of MAE with normalised targets is near 1 for a network that has learned nothing, that of
BEiT near the entropy of the codes. Of pixels, the mean and a copy of the nearest visible patch; of codes, the most
frequent ones and a copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mim.patches import gather

ERRORS = {"squared": torch.square, "absolute": torch.abs}


def nearest_visible(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """For every patch of masks (B, N) the visible one nearest to it, the first of equally near ones: ids (B, N)."""
    h, w = grid
    rows, columns = (axis.flatten() for axis in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    squared = (rows[:, None] - rows).square() + (columns[:, None] - columns).square()  # (N, N)
    order = (squared * (h * w) + torch.arange(h * w)).to(mask.device)  # (N, N): no two in a row are equal
    beyond = (h * h + w * w) * h * w
    return torch.stack([order.masked_fill(hidden, beyond).argmin(dim=1) for hidden in mask])  # (B, N)


def of_pixels(target: Tensor, ids_mask: Tensor, nearest: Tensor, error: str) -> dict[str, Tensor]:
    """Losses (B,) of trivial predictions of targets (B, N, P) at `ids_mask` (B, M); `error` is a key of `ERRORS`.

    The mean is 0 in any target: of normalised images it is the dataset's mean colour, of normalised patches their own.
    """
    hidden = gather(target, ids_mask)  # (B, M, P)
    copies = gather(target, nearest.gather(1, ids_mask))  # (B, M, P)
    return {
        "baseline_mean_patch": ERRORS[error](hidden).mean(dim=(1, 2)),
        "baseline_copy": ERRORS[error](hidden - copies).mean(dim=(1, 2)),
    }


def copied_codes(codes: Tensor, ids_mask: Tensor, nearest: Tensor) -> Tensor:
    """Share (B,) of the codes (B, N) at `ids_mask` (B, M) that a copy of the nearest visible patch guesses."""
    copies = codes.gather(1, nearest.gather(1, ids_mask))  # (B, M)
    return (copies == codes.gather(1, ids_mask)).double().mean(dim=1)


def entropy(counts: Tensor) -> float:
    """Entropy in nats of how often each code (V,) occurred: the cross-entropy of the best constant prediction."""
    shares = counts[counts > 0].double() / counts.sum()
    return float(-(shares * shares.log()).sum())
