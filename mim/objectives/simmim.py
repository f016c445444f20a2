"""SimMIM: replace masked patches by a learned token and regress their raw pixels with one linear layer.

Xie et al. 2022, "SimMIM: A Simple Framework for Masked Image Modeling", arXiv 2111.09886, section 3. The published head
is a 1x1 convolution to stride**2 * C channels and a pixel shuffle: one linear map per token. Here it is that map, its
outputs in the order of `patchify` (row, column, channel) where the pixel shuffle has (channel, row, column), and it
runs on masked positions only. The published loss divides by the masked pixels of the batch; every row masks the same
number, so the mean over rows of the loss here is that value (without its 1e-5 in the denominator).

A hierarchical encoder says its total stride as `patch_size` (32 of a Swin, the size of SimMIM's mask units); the mask
lies on its output grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mim.contracts import Batch, Encoder
from mim.patches import gather, mask_to_ids, patchify, unpatchify


@dataclass
class Config:
    """No fields: mask units belong to the mask (`cells`), the rest follows from the encoder."""


def build(encoder: Encoder, cfg: Config) -> SimMIM:
    """Wrap any encoder that can replace patches."""
    return SimMIM(encoder)


class SimMIM(nn.Module):
    """Reads `images` and `mask`; the loss is the mean absolute error of the masked pixels, per sample."""

    per_micro_batch = False
    error = "absolute"  # of a pixel, which the loss is the mean of
    reads = ("images", "mask")

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.width))
        self.head = nn.Linear(encoder.width, encoder.patch_size**2 * encoder.channels)  # starts as the convolution
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def forward(self, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return loss (B,)."""
        images = batch["images"]
        _, ids_mask, _ = mask_to_ids(batch["mask"], batch["num_masked"])
        features = self.encoder(images, mask=batch["mask"], mask_token=self.mask_token, ids_read=ids_mask)
        pred = self.head(features.patches).float()  # (B, M, P)
        target = gather(self.target(images), ids_mask)  # (B, M, P)
        return {"loss": (pred - target).abs().mean(dim=(1, 2))}  # (B,)

    def target(self, images: Tensor) -> Tensor:
        """Pixels as the encoder normalises them, (B, N, P)."""
        return patchify(self.encoder.normalize(images), self.encoder.patch_size).float()

    def truth(self, batch: Batch) -> Tensor:
        """What every patch is (B, N, P)."""
        return self.target(batch["images"])

    @torch.no_grad()
    def reconstruct(self, batch: Batch, frozen: dict[str, Any]) -> Tensor:
        """Predicted images (B, C, H, W) in [0, 1]."""
        images = batch["images"]
        features = self.encoder(images, mask=batch["mask"], mask_token=self.mask_token)
        pred = self.head(features.patches).float()  # (B, N, P)
        pixels = unpatchify(pred, self.encoder.grid(images.shape[-2:]), images.shape[1])  # (B, C, H, W)
        return (pixels * self.encoder.std + self.encoder.mean).clamp(0, 1)
