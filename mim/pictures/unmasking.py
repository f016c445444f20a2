"""Iterated unmasking: what is predicted in one round is seen in the next.

Chang et al. 2022, "MaskGIT", arXiv 2202.04200, section 3.2, decodes codes this way, the most probable first. Here it
shows what an objective of masked images makes of its own predictions. Differences: as many patches are revealed in each
round (a linear schedule), nothing is sampled, and a prediction is seen as pixels pasted into the image. Objectives that
tell no probabilities (MAE, SimMIM) reveal patches in a random order, drawn by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mim.contracts import Batch
from mim.data.order import rng

ORDERS = ("confident", "random")


@torch.no_grad()
def unmask(
    objective: Any, batch: Batch, frozen: dict[str, Any], grid: tuple[int, int], *, rounds: int, order: str, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Reveal the masked patches of a batch in so many rounds.

    Yields the images (B, C, H, W) in [0, 1] and the mask (B, N) of what is still hidden, before the first round and
    after each. The batch is left as it is; pixels below the mask are never read.
    """
    state = dict(batch)
    images, mask, num_masked = batch["images"], batch["mask"].clone(), int(batch["num_masked"])
    b, n = mask.shape
    chance = torch.stack([torch.from_numpy(rng("unmask", seed, 0, row).random(n)) for row in range(b)])
    chance = chance.to(images.device, torch.float32)  # (B, N)
    yield images, mask
    for left in range(min(rounds, num_masked), 0, -1):
        state |= {"images": images, "mask": mask, "num_masked": num_masked}
        pred = fitted(objective.reconstruct(state, frozen), images)
        scores = state["confidence"] if order == "confident" and "confidence" in state else chance
        count = -(-num_masked // left)
        chosen = scores.masked_fill(~mask, -1).topk(count, dim=1).indices  # (B, count), of masked patches
        revealed = torch.zeros_like(mask).scatter_(1, chosen, True)
        images = torch.where(pixels_of(revealed, grid, images), pred, images)
        if "predicted_codes" in state:
            state["codes"] = torch.where(revealed, state["predicted_codes"], state["codes"])
        mask, num_masked = mask & ~revealed, num_masked - count
        yield images, mask


def fitted(pred: Tensor, images: Tensor) -> Tensor:
    """Predicted images in the size of the images: a tokenizer may have another."""
    if pred.shape == images.shape:
        return pred
    return F.interpolate(pred, images.shape[-2:], mode="bicubic", antialias=True).clamp(0, 1)


def pixels_of(mask: Tensor, grid: tuple[int, int], images: Tensor) -> Tensor:
    """Masks (B, N) as bool images (B, 1, H, W)."""
    square = mask.reshape(len(mask), 1, *grid).float()
    return F.interpolate(square, images.shape[-2:], mode="nearest").bool()
