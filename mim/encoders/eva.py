"""EVA-02: a transformer with rotary positions and SwiGLU, timm's, opened so that patches can be replaced or dropped.

Fang et al. 2023, "EVA-02: A Visual Representation for Neon Genesis", arXiv 2303.11331, section 2.1; rotary positions:
Su et al. 2021, arXiv 2104.09864. timm's `Eva` also is DINOv3 and the ViTs with rotary positions (vit_*_rope_*).
Differences: the final norm is over tokens for every model, as in pretraining, where timm's fine-tuned models of this
family norm their mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import apply_keep_indices_nlc
from timm.models.eva import Eva
from torch import Tensor, nn

from mim import backbone
from mim.contracts import Features
from mim.last_block import let_read, rows_of
from mim.patches import embed, gather, grid_of, patchify, replace


@dataclass
class Config:
    model: str = "eva02_base_patch14_224"  # any of timm's Eva; set fields below override it
    width: int | None = None
    depth: int | None = None  # blocks
    num_heads: int | None = None  # width / num_heads must divide by 4
    patch_size: int | None = None  # pixels
    layer_scale: float | None = None  # initial gamma; null: as the model (EVA-02 none, DINOv3 1e-5)
    drop_path_rate: float = 0.0  # of the last block, rising linearly over the blocks
    num_registers: int | None = None
    qk_norm: bool | None = None  # norm of queries and keys in each head
    weight_init: str = ""  # "" truncated normal 0.02 with BEiT's rescaling: timm's; beit, mae: as published
    mean: list[float] | None = None  # per channel, of pixels in [0, 1]; null: the dataset's own
    std: list[float] | None = None


def build(cfg: Config, *, image_size: tuple[int, int], channels: int) -> EVA:
    """Build the encoder for images of one size; the grid must divide."""
    if cfg.layer_scale == 0:
        raise ValueError(
            "encoder.layer_scale=0 would silence all blocks; leave it out, or choose a model that has none"
        )
    return EVA(cfg, image_size=image_size, channels=channels)


def create(cfg: Config, *, image_size: tuple[int, int], channels: int, depth: int | None = None) -> Eva:
    """timm's module as the recipe wants it, or one of another depth."""
    options: dict[str, Any] = {"num_reg_tokens": cfg.num_registers, "qk_norm": cfg.qk_norm}
    options = {key: value for key, value in options.items() if value is not None}
    options |= {
        "use_fc_norm": False,  # the norm is over tokens
        "use_post_transformer_norm": True,
        "dynamic_img_size": True,  # images of another size get their own rotary table
    }
    return backbone.create(Eva, cfg, options, image_size=image_size, channels=channels, depth=depth)


class EVA(nn.Module):
    """timm's Eva as an `Encoder`. It carries its own pixel mean and std."""

    can_drop = True

    mean: Tensor  # (1, C, 1, 1), as std
    std: Tensor

    def __init__(self, cfg: Config, *, image_size: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.create = partial(create, cfg, image_size=image_size, channels=channels)
        self.vit = vit = self.create()
        self.channels = channels
        self.width = vit.embed_dim
        self.depth = len(vit.blocks)
        let_read(vit.blocks[-1])
        self.patch_size = vit.patch_embed.patch_size[0]
        self.num_prefix = vit.num_prefix_tokens
        self.grid(image_size)
        backbone.keep_statistics(self, cfg.mean, cfg.std, channels)

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return (h, w) for an image size (H, W) in pixels."""
        return grid_of(image_size, self.patch_size)

    def normalize(self, images: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [0, 1] -> zero mean, unit variance per channel."""
        return (images - self.mean) / self.std

    def forward(
        self,
        images: Tensor,
        *,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        ids_keep: Tensor | None = None,
        ids_read: Tensor | None = None,
    ) -> Features:
        """Encode images (B, C, H, W); `mask` (B, N) with `mask_token` (1, 1, D) replaces, `ids_keep` (B, K) drops."""
        (features,) = self.layers(
            images, [-1], norm=True, mask=mask, mask_token=mask_token, ids_keep=ids_keep, ids_read=ids_read
        )
        return features

    def layers(
        self,
        images: Tensor,
        indices: list[int],
        *,
        norm: bool = False,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        ids_keep: Tensor | None = None,
        ids_read: Tensor | None = None,
    ) -> list[Features]:
        """Return the outputs of the blocks named by `indices` (negative: from the end), normed if asked.

        Of the encoder's last block only patches `ids_read` (B, M), if they are given.
        """
        wanted = [i % self.depth for i in indices]
        x, rotary = self._embed(images, mask, mask_token, ids_keep)
        rows = rows_of(ids_read, self.num_prefix)
        outputs = {}
        for i, block in enumerate(self.vit.blocks[: max(wanted) + 1]):
            read = {"rows": rows} if rows is not None and i == self.depth - 1 else {}
            x = block(x, rope=_table(rotary, i, self.vit.rope_mixed), **read)
            if i in wanted:
                y = self.vit.norm(x) if norm else x
                outputs[i] = Features(y[:, : self.num_prefix], y[:, self.num_prefix :])
        return [outputs[i] for i in wanted]

    @property
    def final_norm(self) -> nn.Module:
        return self.vit.norm

    def more_blocks(self, num: int, start: int) -> MoreBlocks:
        """Further blocks on top of block `start`, as a deeper encoder of this recipe has them."""
        if self.vit.rope_mixed and start + num > self.depth:
            raise ValueError(
                f"the blocks of this model learn their own rotary frequencies, and {num} more on top of block {start} "
                f"need those of {start + num} blocks, not {self.depth}; choose a model that is not *_rope_mixed_*"
            )
        deeper = self.create(depth=max(self.depth, start + num))
        return MoreBlocks(deeper.blocks[start : start + num], start, self.rotary, self.vit.rope_mixed)

    def rotary(self, grid: tuple[int, int]) -> Tensor | None:
        """Sines and cosines (N, 2 D / heads) of a grid; (depth, heads, N, 2 D / heads) where blocks have their own."""
        rope: Any = self.vit.rope
        return None if rope is None else rope.get_embed(shape=list(grid))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are never decayed (timm's list)."""
        return {f"vit.{name}" for name in self.vit.no_weight_decay()}

    def depth_of(self, parameter: str) -> int:
        """Depth of a parameter for layer-wise decay: 0 stem, i + 1 block i, depth + 1 final norm."""
        _, top, *rest = parameter.split(".")
        if top == "blocks":
            return int(rest[0]) + 1
        return self.depth + 1 if top == "norm" else 0

    def _embed(
        self, images: Tensor, mask: Tensor | None, mask_token: Tensor | None, ids_keep: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Patches with prefix, as timm embeds them, some replaced or dropped, and their rotary table."""
        assert mask is None or ids_keep is None, "replace or drop, not both"
        pixels = self.normalize(images)
        if ids_keep is not None:
            x, rotary = self._embed_kept(pixels, ids_keep)
        else:
            x = self.vit.patch_embed(pixels)  # (B, h, w, D)
            if mask is not None:
                x = replace(x, mask, mask_token)
            x, rotary = self.vit._pos_embed(x)  # (B, R + N, D), and what `rotary` returns
        return self.vit.norm_pre(x), rotary

    def _embed_kept(self, pixels: Tensor, ids_keep: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embed the kept patches alone (B, K), with positions and prefix: (B, R + K, D), and their rotary table."""
        stem = self.vit.patch_embed
        kept = stem.norm(embed(gather(patchify(pixels, self.patch_size), ids_keep), stem.proj))  # (B, K, D)
        h, w = self.grid((pixels.shape[2], pixels.shape[3]))
        table, rotary = self.vit._pos_embed(self.mean.new_zeros(1, h, w, self.width))  # (1, R + N, D): what timm adds
        prefix, positions = table.expand(len(kept), -1, -1).split([self.num_prefix, h * w], dim=1)
        x = torch.cat([prefix, kept + gather(positions, ids_keep)], dim=1)  # (B, R + K, D)
        if rotary is not None:
            rotary = apply_keep_indices_nlc(x, rotary, ids_keep)  # (B, K, 2 D / heads) or (B, depth, heads, K, ..)
            rotary = rotary.transpose(0, 1) if self.vit.rope_mixed else rotary.unsqueeze(1)  # beside heads
        return x, rotary


class MoreBlocks(nn.Module):
    """Blocks that go on from an encoder's raw features, with its rotary table."""

    def __init__(
        self, blocks: nn.ModuleList, start: int, rotary: Callable[[tuple[int, int]], Tensor | None], own_tables: bool
    ) -> None:
        super().__init__()
        self.blocks = blocks
        self.start = start
        self.rotary = rotary  # of the encoder, which owns it
        self.own_tables = own_tables

    def forward(self, features: Features, grid: tuple[int, int]) -> Features:
        """Features of all patches of a grid -> features, not normed."""
        x = torch.cat(features, dim=1)  # (B, R + N, D)
        rotary = self.rotary(grid)
        for i, block in enumerate(self.blocks, start=self.start):
            x = block(x, rope=_table(rotary, i, self.own_tables))
        num_prefix = features.prefix.shape[1]
        return Features(x[:, :num_prefix], x[:, num_prefix:])


def _table(rotary: Tensor | None, block: int, own_tables: bool) -> Tensor | None:
    """The rotary table of a block: the one of all blocks, or its own."""
    return rotary[block] if rotary is not None and own_tables else rotary
