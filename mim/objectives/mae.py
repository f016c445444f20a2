"""Masked autoencoder: encode the visible patches, decode all, compare the masked ones in pixels.

He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377, section 3 and appendix A.
Differences: the mask comes with the batch instead of being drawn here, and the prediction head runs on masked positions
only, which changes no value of the loss.

`decode_ratio` below 1 decodes, and compares, only a share of the masked patches, drawn anew for every sample: the
partial reconstruction of CrossMAE (Fu et al. 2024, arXiv 2401.14391). CrossMAE reads each patch out by cross-attention
alone, so what is left out changes nothing for the others. Here the decoder stays MAE's, over the visible and the chosen
tokens, so chosen tokens also miss the masked ones that were left out.
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
from mim.patch_statistics import from_visible
from mim.patches import gather, mask_to_ids, patchify, sincos_positions, unpatchify
from tokenizer.quantize import uniform_noise

SALT = 0x6D61652D6465636F  # "mae-deco": other uses of the same noise draw other numbers


@dataclass
class Config:
    decoder_width: int = 512
    decoder_depth: int = 8  # blocks
    decoder_num_heads: int = 16
    decoder_qk_gain: float | None = None  # as encoder.qk_gain
    norm_pix_loss: bool = True  # targets are normalised per patch, with the unbiased variance
    decode_ratio: float = 1.0  # share of the masked patches that is decoded and enters the loss; 1 is MAE


def build(encoder: Encoder, cfg: Config) -> MAE:
    """Wrap an encoder that can drop patches."""
    if not encoder.can_drop:
        raise ValueError("objective.name=mae needs an encoder that can drop patches; use encoder.name=vit or eva")
    for name, value in (("depth", cfg.decoder_depth), ("num_heads", cfg.decoder_num_heads)):
        if value < 1:
            raise ValueError(f"objective.decoder_{name}={value} must be at least 1")
    if cfg.decoder_width < 1 or cfg.decoder_width % 4 or cfg.decoder_width % cfg.decoder_num_heads:
        raise ValueError(
            f"objective.decoder_width={cfg.decoder_width} must divide by 4 (sine-cosine positions) and by "
            f"objective.decoder_num_heads={cfg.decoder_num_heads}"
        )
    if not 0 < cfg.decode_ratio <= 1:
        raise ValueError(f"objective.decode_ratio={cfg.decode_ratio} must be above 0 and at most 1")
    return MAE(encoder, cfg)


class MAE(nn.Module):
    """Reads `images` and `mask`; the loss is the mean squared error over masked patches, per sample.

    With a `decode_ratio` below 1 it reads `noise` too.
    """

    per_micro_batch = False
    error = "squared"  # of a pixel, which the loss is the mean of

    def __init__(self, encoder: Any, cfg: Config) -> None:
        super().__init__()
        self.encoder = encoder
        self.cfg = cfg
        self.reads = ("images", "mask") if cfg.decode_ratio == 1 else ("images", "mask", "noise")
        width = cfg.decoder_width
        self.decoder_embed = nn.Linear(encoder.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        norm: Any = partial(nn.LayerNorm, eps=1e-6)  # timm asks for a type and takes any callable
        self.decoder_blocks = nn.ModuleList(
            Block(width, cfg.decoder_num_heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm)
            for _ in range(cfg.decoder_depth)
        )
        self.decoder_norm = norm(width)
        self.decoder_pred = nn.Linear(width, encoder.patch_size**2 * encoder.channels)
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
        ids_keep, ids_mask, _ = mask_to_ids(batch["mask"], batch["num_masked"])
        if self.cfg.decode_ratio < 1:
            ids_mask = self.choose(ids_mask, batch["noise"])  # (B, M'), fewer than were masked
        features = self.encoder(images, ids_keep=ids_keep)
        tokens = self.decode(features, ids_keep, ids_mask, self.encoder.grid(images.shape[-2:]))  # (B, K + M, D')
        pred = self.decoder_pred(tokens[:, ids_keep.shape[1] :]).float()  # (B, M, P)
        target, _, _ = self.target(images, ids_mask)  # (B, M, P)
        return {"loss": (pred - target).square().mean(dim=(1, 2))}  # (B,)

    def choose(self, ids_mask: Tensor, noise: Tensor) -> Tensor:
        """Draw the masked ids (B, M) that are decoded; the same number in every row, at least one, ascending."""
        m = ids_mask.shape[1]
        order = uniform_noise(noise ^ SALT, (m,)).argsort(dim=1, stable=True)  # (B, M)
        chosen = order[:, : max(round(self.cfg.decode_ratio * m), 1)]
        return ids_mask.gather(1, chosen.sort(dim=1).values)  # (B, M')

    def decode(self, features: Features, ids_keep: Tensor, ids_mask: Tensor, grid: tuple[int, int]) -> Tensor:
        """Visible features -> decoder tokens (B, K + M, D') of the patches `ids_keep`, then `ids_mask`."""
        prefix, visible = self.decoder_embed(features.prefix), self.decoder_embed(features.patches)
        b, num_masked = ids_mask.shape
        masked = self.mask_token.to(visible.dtype).expand(b, num_masked, -1)
        positions = self.positions(grid, visible.device).to(visible.dtype)  # (N, D')
        patches = torch.cat([visible, masked], dim=1) + positions[torch.cat([ids_keep, ids_mask], dim=1)]
        x = torch.cat([prefix, patches], dim=1)  # (B, R + K + M, D'); prefix positions are zero
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, prefix.shape[1] :]

    def target(self, images: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the target patches (B, N, P) with the mean and standard deviation (B, N, 1) that undo them.

        Those named by `ids` (B, M) alone, if they are given: (B, M, P).
        """
        patches = patchify(self.encoder.normalize(images), self.encoder.patch_size).float()
        if ids is not None:
            patches = gather(patches, ids)
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

    def truth(self, batch: Batch) -> Tensor:
        """What every patch is (B, N, P)."""
        return self.target(batch["images"])[0]

    @torch.no_grad()
    def reconstruct(self, batch: Batch, frozen: dict[str, Any], *, true_statistics: bool = False) -> Tensor:
        """Predicted images (B, C, H, W) in [0, 1].

        Normalised targets are undone with mean and variance interpolated from the visible patches; `true_statistics`
        takes those of the masked pixels themselves, as the published notebook does: knowledge the network never had.
        """
        images, mask = batch["images"], batch["mask"]
        grid = self.encoder.grid(images.shape[-2:])
        ids_keep, ids_mask, ids_restore = mask_to_ids(mask, batch["num_masked"])
        tokens = self.decode(self.encoder(images, ids_keep=ids_keep), ids_keep, ids_mask, grid)  # (B, N, D')
        pred = gather(self.decoder_pred(tokens).float(), ids_restore)  # (B, N, P)
        _, mean, std = self.target(images)
        if self.cfg.norm_pix_loss and not true_statistics:
            patches = patchify(self.encoder.normalize(images), self.encoder.patch_size).float()
            mean, variance = from_visible(patches, mask, grid)  # (B, N, 1) each
            std = (variance + 1e-6).sqrt()
        pixels = unpatchify(pred * std + mean, grid, images.shape[1])  # (B, C, H, W)
        return (pixels * self.encoder.std + self.encoder.mean).clamp(0, 1)
