"""Masked patch prediction: the Vision Transformer's own self-supervision, which predicts the mean colour of patches.

Dosovitskiy et al. 2021, "An Image Is Worth 16x16 Words", arXiv 2010.11929, appendix B.1.2, after BERT (Devlin et al.
2019, arXiv 1810.04805): half of the patches are corrupted; 80 % of those become a [mask] token, 10 % a random other
patch, 10 % stay. At each corrupted position the mean colour is predicted, in 3 bits per channel: 512 classes.

Differences: which patches are corrupted comes with the batch (`mask: {name: random, ratio: 0.5}`), so the counts are
exact instead of expected; a random other patch is one of the same image, its pixels copied before the embedding, so it
carries the position where it stands; C channels have 8**C colours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mim.code_loss import code_loss
from mim.contracts import Batch, Encoder
from mim.patches import gather, mask_to_ids, patchify, unpatchify
from tokenizer.quantize import uniform_noise

LEVELS = 8  # per channel: 3 bits
MAX_COLOURS = 8192  # classes of the largest head; as many as BEiT has codes
SALT_SHARES, SALT_SOURCES = 0x6D70702D73686172, 0x6D70702D736F7572  # "mpp-shar", "mpp-sour": draws of their own


@dataclass
class Config:
    mask_ratio: float = 0.8  # share of the corrupted patches that become the mask token
    swap_ratio: float = 0.1  # share that becomes a random other patch; the rest stays as it is


def build(encoder: Encoder, cfg: Config) -> MaskedPatchPrediction:
    """Wrap any encoder that can replace patches."""
    channels = encoder.channels
    if LEVELS**channels > MAX_COLOURS:
        raise ValueError(
            f"objective.name=mpp would need {LEVELS}**{channels} = {LEVELS**channels} colours for images of {channels} "
            f"channels, more than {MAX_COLOURS}; use objective.name=simmim"
        )
    if min(cfg.mask_ratio, cfg.swap_ratio) < 0 or not 0 < cfg.mask_ratio + cfg.swap_ratio <= 1:
        raise ValueError(
            f"objective.mask_ratio={cfg.mask_ratio} and objective.swap_ratio={cfg.swap_ratio} must not be negative, "
            f"and their sum must be above 0 and at most 1"
        )
    return MaskedPatchPrediction(encoder, cfg)


class MaskedPatchPrediction(nn.Module):
    """Reads `images`, `mask` and `noise`; the loss is the cross-entropy over corrupted positions, per sample."""

    per_micro_batch = False
    reads = ("images", "mask", "noise")

    def __init__(self, encoder: Any, cfg: Config) -> None:
        super().__init__()
        self.encoder = encoder
        self.cfg = cfg
        self.num_codes = LEVELS**encoder.channels
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.width))
        self.head = nn.Linear(encoder.width, self.num_codes)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02, a=-0.02, b=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return loss (B,) and accuracy (B,) of the predicted colours on corrupted positions."""
        images, num_masked = batch["images"], batch["num_masked"]
        _, ids_mask, _ = mask_to_ids(batch["mask"], num_masked)
        replaced, swapped = self.shares(ids_mask, batch["noise"])
        corrupted = self.swap(images, swapped, batch["noise"])
        mask = torch.zeros_like(batch["mask"]).scatter_(1, replaced, True)  # (B, N)
        features = self.encoder(corrupted, mask=mask, mask_token=self.mask_token, ids_read=ids_mask)
        logits = self.head(features.patches)  # (B, M, 8**C)
        loss, accuracy = code_loss(logits, self.colours(images).gather(1, ids_mask))
        return {"loss": loss, "accuracy": accuracy}

    def shares(self, ids_mask: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Split the corrupted ids (B, M): those that become the token, and those that become another patch."""
        m = ids_mask.shape[1]
        num_replaced = round(self.cfg.mask_ratio * m)
        num_swapped = min(round(self.cfg.swap_ratio * m), m - num_replaced)
        order = uniform_noise(noise ^ SALT_SHARES, (m,)).argsort(dim=1, stable=True)  # (B, M)
        shuffled = ids_mask.gather(1, order)
        return shuffled[:, :num_replaced], shuffled[:, num_replaced : num_replaced + num_swapped]

    def swap(self, images: Tensor, ids: Tensor, noise: Tensor) -> Tensor:
        """Put a random other patch of the same image in the place of each patch of `ids` (B, S)."""
        if not ids.shape[1]:
            return images
        patches = patchify(images, self.encoder.patch_size)  # (B, N, P)
        n = patches.shape[1]
        steps = (uniform_noise(noise ^ SALT_SOURCES, (ids.shape[1],)) * (n - 1)).long().clamp_(max=n - 2)  # (B, S)
        others = gather(patches, (ids + 1 + steps) % n)  # never the patch itself
        patches = patches.scatter(1, ids.unsqueeze(-1).expand_as(others), others)
        return unpatchify(patches, self.encoder.grid(images.shape[-2:]), images.shape[1])  # (B, C, H, W)

    def colours(self, images: Tensor) -> Tensor:
        """Mean colour of each patch as a class (B, N) in [0, 8**C), the first channel in the highest bits."""
        b, c = images.shape[:2]
        patches = patchify(images, self.encoder.patch_size)  # (B, N, P)
        means = patches.float().view(b, patches.shape[1], -1, c).mean(dim=2)  # (B, N, C)
        levels = (means * LEVELS).long().clamp(0, LEVELS - 1)
        weights = LEVELS ** torch.arange(c - 1, -1, -1, device=images.device)
        return (levels * weights).sum(dim=-1)  # (B, N)

    def truth(self, batch: Batch) -> Tensor:
        """The colour of every patch (B, N)."""
        return self.colours(batch["images"])

    @torch.no_grad()
    def reconstruct(self, batch: Batch, frozen: dict[str, Any]) -> Tensor:
        """Every patch in the colour predicted for it, with all of the mask hidden: (B, C, H, W) in [0, 1].

        How probable these colours are goes into the batch.
        """
        images = batch["images"]
        c, grid = images.shape[1], self.encoder.grid(images.shape[-2:])
        features = self.encoder(images, mask=batch["mask"], mask_token=self.mask_token)
        batch["confidence"], colours = self.head(features.patches).float().softmax(dim=-1).max(dim=-1)  # (B, N) each
        weights = LEVELS ** torch.arange(c - 1, -1, -1, device=images.device)
        levels = colours.unsqueeze(-1) // weights % LEVELS  # (B, N, C)
        patches = ((levels + 0.5) / LEVELS).repeat(1, 1, self.encoder.patch_size**2)  # (B, N, P)
        return unpatchify(patches, grid, c)
