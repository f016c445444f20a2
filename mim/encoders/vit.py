"""Vision Transformer with LayerScale: timm's, opened at two places so that patches can be replaced or dropped.

ViT: Dosovitskiy et al. 2021 (arXiv 2010.11929). LayerScale: Touvron et al. 2021 (CaiT, arXiv 2103.17239, section 2).
The module inside is a plain `timm.models.VisionTransformer`; without a mask the output equals its `forward_features`
bit for bit, so an export to timm is the module itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import Attention, HybridEmbed, PatchEmbed
from timm.models import is_model_in_modules
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mim import backbone
from mim.contracts import Features
from mim.initialization import tie_keys_to_queries
from mim.last_block import let_read, rows_of
from mim.patches import blank, embed, gather, grid_of, ids_to_mask, patchify, replace, sincos_positions

TIMM_INITS = ("jax", "moco")


@dataclass
class Config:
    model: str = "vit_base_patch16_224"  # any timm VisionTransformer, hybrids too; set fields below override it
    width: int | None = None
    depth: int | None = None  # blocks
    num_heads: int | None = None
    patch_size: int | None = None  # pixels
    layer_scale: float | None = None  # initial gamma: BEiT 0.1 (base), 1e-5 (large); 0 none (MAE)
    drop_path_rate: float = 0.0  # of the last block, rising linearly over the blocks
    num_registers: int | None = None
    positions: str = "learn"  # learn | sincos (fixed, as MAE has them)
    # "" truncated normal 0.02, jax Xavier uniform (better below width 512), moco: timm's; beit, mae: as published
    weight_init: str = ""
    qk_norm: bool | None = None  # LayerNorm of queries and keys in each head (Dehghani et al. 2023, arXiv 2302.05442)
    qk_gain: float | None = None  # keys start equal to queries, scaled by this: short runs learn where to look sooner
    mean: list[float] | None = None  # per channel, of pixels in [0, 1]; null: the dataset's own
    std: list[float] | None = None


def build(cfg: Config, *, image_size: tuple[int, int], channels: int) -> ViT:
    """Build the encoder for images of one size; the grid must divide."""
    if cfg.positions not in ("learn", "sincos"):
        raise ValueError(f"encoder.positions={cfg.positions!r} is unknown; choose learn or sincos")
    return ViT(cfg, image_size=image_size, channels=channels)


def create(cfg: Config, *, image_size: tuple[int, int], channels: int, depth: int | None = None) -> VisionTransformer:
    """timm's module as the recipe wants it, or one of another depth."""
    hybrid = is_model_in_modules(cfg.model.split(".")[0], ["vision_transformer_hybrid"])
    if hybrid and cfg.patch_size is not None:
        raise ValueError(f"encoder.model={cfg.model!r} has the stride of its stem; leave encoder.patch_size out")
    options: dict[str, Any] = {"reg_tokens": cfg.num_registers, "qk_norm": cfg.qk_norm}
    options = {key: value for key, value in options.items() if value is not None}
    options |= {
        "weight_init": cfg.weight_init if cfg.weight_init in TIMM_INITS else "",
        "dynamic_img_size": True,  # images of another size get resampled positions
    }
    vit = backbone.create(
        VisionTransformer, cfg, options, image_size=image_size, channels=channels, depth=depth, known_inits=TIMM_INITS
    )
    plain = all(isinstance(getattr(block, "attn", None), Attention) for block in vit.blocks)
    if cfg.qk_gain is not None and not plain:
        raise ValueError(
            f"encoder.qk_gain is for plain attention; the blocks of encoder.model={cfg.model!r} have another"
        )
    if cfg.positions == "sincos" and vit.pos_embed is None:
        raise ValueError(f"encoder.positions=sincos, but encoder.model={cfg.model!r} has no table of positions")
    if any(isinstance(module, nn.BatchNorm2d) for module in vit.modules()):
        raise ValueError(
            f"encoder.model={cfg.model!r} has BatchNorm in its stem, so the loss would depend on how a batch is split; "
            f"choose a stem with GroupNorm, e.g. vit_small_r26_s32_224 or vit_base_r50_s16_224"
        )
    if cfg.qk_gain is not None:
        tie_keys_to_queries(vit.blocks, cfg.qk_gain)
    return vit


class ViT(nn.Module):
    """timm's VisionTransformer as an `Encoder`. It carries its own pixel mean and std."""

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
        self.patch_size = _stride(vit.patch_embed, image_size)
        self.num_prefix = vit.num_prefix_tokens
        self.stem_overlaps = isinstance(vit.patch_embed, HybridEmbed)
        self.stem_is_linear = type(vit.patch_embed) is PatchEmbed  # one product per patch
        backbone.keep_statistics(self, cfg.mean, cfg.std, channels)
        if cfg.positions == "sincos":
            self._fix_positions()

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
        x = self._embed(images, mask, mask_token, ids_keep)  # (B, R + N, D)
        rows = rows_of(ids_read, self.num_prefix)
        outputs = {}
        for i, block in enumerate(self.vit.blocks[: max(wanted) + 1]):
            x = block(x, rows=rows) if rows is not None and i == self.depth - 1 else block(x)
            if i in wanted:
                y = self.vit.norm(x) if norm else x
                outputs[i] = Features(y[:, : self.num_prefix], y[:, self.num_prefix :])
        return [outputs[i] for i in wanted]

    @property
    def final_norm(self) -> nn.Module:
        return self.vit.norm

    def more_blocks(self, num: int, start: int) -> MoreBlocks:
        """Further blocks on top of block `start`, as a deeper encoder of this recipe has them."""
        deeper = self.create(depth=max(self.depth, start + num))
        return MoreBlocks(deeper.blocks[start : start + num])

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are never decayed (timm's list)."""
        return {f"vit.{name}" for name in self.vit.no_weight_decay()}

    def depth_of(self, parameter: str) -> int:
        """Depth of a parameter for layer-wise decay: 0 stem, i + 1 block i, depth + 1 final norm."""
        _, top, *rest = parameter.split(".")
        if top == "blocks":
            return int(rest[0]) + 1
        return self.depth + 1 if top in ("norm", "fc_norm") else 0

    def _embed(self, images: Tensor, mask: Tensor | None, mask_token: Tensor | None, ids_keep: Tensor | None) -> Tensor:
        """Patches with positions and prefix, as timm embeds them, with some replaced or dropped."""
        assert mask is None or ids_keep is None, "replace or drop, not both"
        pixels = self.normalize(images)
        if self.stem_overlaps:  # a stem that sees beyond a patch must not see masked pixels: they become the mean
            grid = self.grid((images.shape[2], images.shape[3]))
            if mask is not None:
                pixels = blank(pixels, mask, grid)
            elif ids_keep is not None:
                pixels = blank(pixels, ids_to_mask(ids_keep, grid[0] * grid[1]), grid)
        if ids_keep is not None and self.stem_is_linear:
            return self.vit.norm_pre(self._embed_kept(pixels, ids_keep))
        x = self.vit.patch_embed(pixels)  # (B, h, w, D)
        if mask is not None:
            x = replace(x, mask, mask_token)  # before positions, so masked tokens keep theirs
        x = self.vit._pos_embed(x)  # (B, R + N, D)
        if ids_keep is not None:
            prefix, patches = x[:, : self.num_prefix], x[:, self.num_prefix :]
            x = torch.cat([prefix, gather(patches, ids_keep)], dim=1)  # (B, R + K, D)
        return self.vit.norm_pre(x)

    def _embed_kept(self, pixels: Tensor, ids_keep: Tensor) -> Tensor:
        """Embed the kept patches alone (B, K), with positions and prefix: (B, R + K, D)."""
        stem = self.vit.patch_embed
        kept = stem.norm(embed(gather(patchify(pixels, self.patch_size), ids_keep), stem.proj))  # (B, K, D)
        h, w = self.grid((pixels.shape[2], pixels.shape[3]))
        table = self.vit._pos_embed(self.mean.new_zeros(1, h, w, self.width))  # (1, R + N, D): what timm adds
        prefix, positions = table.expand(len(kept), -1, -1).split([self.num_prefix, h * w], dim=1)
        return torch.cat([prefix, kept + gather(positions, ids_keep)], dim=1)  # (B, R + K, D)

    def _fix_positions(self) -> None:
        """Store sine-cosine positions in timm's own `pos_embed`, frozen; the prefix gets zeros."""
        positions = sincos_positions(self.vit.patch_embed.grid_size, self.width)  # (N, D)
        table = self.vit.pos_embed
        assert table is not None
        prefix = table.shape[1] - len(positions)
        with torch.no_grad():
            table.copy_(torch.cat([positions.new_zeros(prefix, self.width), positions]).unsqueeze(0))
        table.requires_grad_(False)


def _stride(stem: Any, image_size: tuple[int, int]) -> int:
    """Pixels per token. Of a convolutional stem timm knows only what it makes of these images: it rounds up."""
    rows, columns = stem.feat_ratio(as_scalar=False)
    if isinstance(stem, HybridEmbed) and (rows != columns or rows.bit_count() != 1):
        raise ValueError(
            f"image size {image_size[0]}x{image_size[1]} does not divide by the stride of the stem; use multiples of 32"
        )
    grid_of(image_size, rows)
    return rows


class MoreBlocks(nn.Module):
    """Blocks that go on from an encoder's raw features."""

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, features: Features, grid: tuple[int, int]) -> Features:
        """Features of all patches -> features, not normed; positions are in the tokens already."""
        x = self.blocks(torch.cat(features, dim=1))  # (B, R + N, D)
        num_prefix = features.prefix.shape[1]
        return Features(x[:, :num_prefix], x[:, num_prefix:])
