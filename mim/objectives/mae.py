"""Masked autoencoder: encode the visible patches, decode all, compare the masked ones in pixels.

He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377, section 3 and appendix A.
Differences: the mask comes with the batch instead of being drawn here, and the prediction head runs on masked positions
only, which changes no value of the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mim.contracts import Batch, Encoder, Features
from mim.initialization import tie_keys_to_queries
from mim.patches import gather, mask_to_ids, patchify, sincos_positions, unpatchify


@dataclass
class Config:
    decoder_width: int = 512
    decoder_depth: int = 8  # blocks
    decoder_num_heads: int = 16
    decoder_qk_gain: float | None = None  # as encoder.qk_gain
    norm_pix_loss: bool = True  # targets are normalised per patch, with the unbiased variance
    channels: int = 3  # of the images


def build(encoder: Encoder, cfg: Config) -> MAE:
    """Wrap an encoder that can drop patches."""
    if not encoder.can_drop:
        raise ValueError("objective.name=mae needs an encoder that can drop patches; use encoder.name=vit")
    if cfg.decoder_width % cfg.decoder_num_heads:
        raise ValueError(
            f"objective.decoder_width={cfg.decoder_width} does not divide by {cfg.decoder_num_heads} heads"
        )
    return MAE(encoder, cfg)


class MAE(nn.Module):
    """Reads `images` and `mask`; the loss is the mean squared error over masked patches, per sample."""

    per_micro_batch = False
    reads = ("images", "mask")

    def __init__(self, encoder: Any, cfg: Config) -> None:
        super().__init__()
        self.encoder = encoder
        self.cfg = cfg
        width = cfg.decoder_width
        self.decoder_embed = nn.Linear(encoder.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        norm: Any = partial(nn.LayerNorm, eps=1e-6)  # timm asks for a type and takes any callable
        self.decoder_blocks = nn.ModuleList(
            Block(width, cfg.decoder_num_heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm)
            for _ in range(cfg.decoder_depth)
        )
        self.decoder_norm = norm(width)
        self.decoder_pred = nn.Linear(width, encoder.patch_size**2 * cfg.channels)
        self._positions: dict[tuple[tuple[int, int], torch.device], Tensor] = {}
        nn.init.normal_(self.mask_token, std=0.02)
        for module in (self.decoder_embed, *self.decoder_blocks.modules(), self.decoder_pred):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        if cfg.decoder_qk_gain is not None:
            tie_keys_to_queries(self.decoder_blocks, cfg.decoder_qk_gain)

    def forward(self, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return loss (B,)."""
        images = batch["images"]
        ids_keep, ids_mask, ids_restore = mask_to_ids(batch["mask"], batch["num_masked"])
        features = self.encoder(images, ids_keep=ids_keep)
        tokens = self.decode(features, ids_restore, self.encoder.grid(images.shape[-2:]))  # (B, N, D')
        pred = self.decoder_pred(gather(tokens, ids_mask)).float()  # (B, M, P)
        target = gather(self.target(images)[0], ids_mask)  # (B, M, P)
        return {"loss": (pred - target).square().mean(dim=(1, 2))}  # (B,)

    def decode(self, features: Features, ids_restore: Tensor, grid: tuple[int, int]) -> Tensor:
        """Visible features -> decoder tokens (B, N, D') of every patch, in grid order."""
        prefix, visible = self.decoder_embed(features.prefix), self.decoder_embed(features.patches)
        b, num_visible, width = visible.shape
        masked = self.mask_token.to(visible.dtype).expand(b, ids_restore.shape[1] - num_visible, width)
        patches = gather(torch.cat([visible, masked], dim=1), ids_restore)  # (B, N, D')
        patches = patches + self.positions(grid, patches.device).to(patches.dtype)
        x = torch.cat([prefix, patches], dim=1)  # (B, R + N, D'); prefix positions are zero
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, prefix.shape[1] :]

    def target(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the target patches (B, N, P) with the mean and standard deviation (B, N, 1) that undo them."""
        patches = patchify(self.encoder.normalize(images), self.encoder.patch_size).float()
        if not self.cfg.norm_pix_loss:
            return patches, patches.new_zeros(()), patches.new_ones(())
        mean = patches.mean(dim=-1, keepdim=True)
        std = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()  # unbiased, as published
        return (patches - mean) / std, mean, std

    def positions(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """Fixed positions (N, D') of a grid, made once per grid."""
        key = (grid, device)
        if key not in self._positions:
            self._positions[key] = sincos_positions(grid, self.cfg.decoder_width).to(device)
        return self._positions[key]

    @torch.no_grad()
    def reconstruct(self, batch: Batch, frozen: dict[str, Any]) -> Tensor:
        """Predicted images (B, C, H, W) in [0, 1]; normalised targets are undone with the true mean of each patch."""
        images = batch["images"]
        grid = self.encoder.grid(images.shape[-2:])
        ids_keep, _, ids_restore = mask_to_ids(batch["mask"], batch["num_masked"])
        pred = self.decoder_pred(self.decode(self.encoder(images, ids_keep=ids_keep), ids_restore, grid)).float()
        _, mean, std = self.target(images)
        pixels = unpatchify(pred * std + mean, grid, images.shape[1])  # (B, C, H, W)
        return (pixels * self.encoder.std + self.encoder.mean).clamp(0, 1)
