"""BEiT's transformer: timm's, with absolute or (shared) relative positions, whose patches can be replaced.

Bao et al. 2022, arXiv 2106.08254, section 2.1 and appendix A: blocks with LayerScale, keys without bias, and a learned
bias of the attention for every relative position of two patches (Raffel et al. 2020, arXiv 1910.10683), in pretraining
one for all blocks, afterwards one for each. The bias covers the whole grid, so patches cannot be dropped.
Differences: the final norm is over tokens, as in pretraining, where timm's fine-tuned models norm their mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from timm.models.beit import Beit
from torch import Tensor, nn

from mim import backbone
from mim.contracts import Features
from mim.last_block import let_read, rows_of
from mim.patches import grid_of, replace

POSITIONS = {
    "absolute": (True, False, False),  # a learned vector for every patch, added to it
    "relative": (False, True, False),  # a bias table for each block
    "shared_relative": (False, False, True),  # one for all
}


@dataclass
class Config:
    model: str = "beit_base_patch16_224"  # any of timm's Beit; set fields below override it
    width: int | None = None
    depth: int | None = None  # blocks
    num_heads: int | None = None
    patch_size: int | None = None  # pixels
    layer_scale: float | None = None  # initial gamma: 0.1 base, 1e-5 large, 0 none; timm's beitv2_base has 1e-5
    drop_path_rate: float = 0.0  # of the last block, rising linearly over the blocks
    positions: str = "shared_relative"  # absolute | relative | shared_relative (as published)
    weight_init: str = "beit"  # beit, mae: as published; "" timm's
    mean: list[float] | None = None  # per channel, of pixels in [0, 1]; null: the dataset's own
    std: list[float] | None = None


def build(cfg: Config, *, image_size: tuple[int, int], channels: int) -> BEiT:
    """Build the encoder for images of one size; the grid must divide."""
    if cfg.positions not in POSITIONS:
        raise ValueError(f"encoder.positions={cfg.positions!r} is unknown; choose {', '.join(POSITIONS)}")
    return BEiT(cfg, image_size=image_size, channels=channels)


def create(cfg: Config, *, image_size: tuple[int, int], channels: int, depth: int | None = None) -> Beit:
    """timm's module as the recipe wants it, or one of another depth."""
    absolute, relative, shared = POSITIONS[cfg.positions]
    options = {
        "use_abs_pos_emb": absolute,
        "use_rel_pos_bias": relative,
        "use_shared_rel_pos_bias": shared,
        "use_fc_norm": False,  # the norm is over tokens
    }
    return backbone.create(Beit, cfg, options, image_size=image_size, channels=channels, depth=depth)


def as_scores(bias: Tensor | None) -> Tensor | None:
    """A position bias in the precision that autocast gives the scores it is added to, which so stay in it.

    A block casts for itself: so the gradients of the blocks add up in the precision of the table.
    """
    if bias is None or not torch.is_autocast_enabled(bias.device.type):
        return bias
    return bias.to(torch.get_autocast_dtype(bias.device.type))


class BEiT(nn.Module):
    """timm's Beit as an `Encoder` of images of one size. It carries its own pixel mean and std."""

    can_drop = False

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
        """Encode images (B, C, H, W); `mask` (B, N) with `mask_token` (1, 1, D) replaces; `ids_keep` is refused."""
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
        if ids_keep is not None:
            raise ValueError("encoder.name=beit cannot drop patches: its position bias covers the whole grid; use vit")
        wanted = [i % self.depth for i in indices]
        x = self._embed(images, mask, mask_token)  # (B, 1 + N, D)
        bias = self.position_bias()
        rows = rows_of(ids_read, 1)
        outputs = {}
        for i, block in enumerate(self.vit.blocks[: max(wanted) + 1]):
            read = {"rows": rows} if rows is not None and i == self.depth - 1 else {}
            x = block(x, shared_rel_pos_bias=as_scores(bias), **read)
            if i in wanted:
                y = self.vit.norm(x) if norm else x
                outputs[i] = Features(y[:, :1], y[:, 1:])
        return [outputs[i] for i in wanted]

    @property
    def final_norm(self) -> nn.Module:
        return self.vit.norm

    def more_blocks(self, num: int, start: int) -> MoreBlocks:
        """Further blocks on top of block `start`, as a deeper encoder of this recipe has them."""
        deeper = self.create(depth=max(self.depth, start + num))
        return MoreBlocks(deeper.blocks[start : start + num], self.position_bias)

    def position_bias(self) -> Tensor | None:
        """What all blocks add to their attention, (heads, 1 + N, 1 + N), if they share it."""
        return None if self.vit.rel_pos_bias is None else self.vit.rel_pos_bias()

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are never decayed, as published: not the tables of relative positions (as timm)."""
        return {"vit.cls_token", "vit.pos_embed"}

    def depth_of(self, parameter: str) -> int:
        """Depth of a parameter for layer-wise decay: 0 stem, i + 1 block i, depth + 1 final norm and shared bias."""
        _, top, *rest = parameter.split(".")
        if top == "blocks":
            return int(rest[0]) + 1
        return self.depth + 1 if top in ("norm", "rel_pos_bias") else 0

    def _embed(self, images: Tensor, mask: Tensor | None, mask_token: Tensor | None) -> Tensor:
        """Patches with class token and absolute positions, if any, as timm embeds them, with some replaced."""
        vit = self.vit
        size = (images.shape[2], images.shape[3])
        if size != vit.patch_embed.img_size:
            height, width = vit.patch_embed.img_size
            raise ValueError(
                f"images of {size[0]}x{size[1]}, but the positions of encoder.name=beit are for {height}x{width}; "
                f"images of several sizes need encoder.name=vit or eva"
            )
        x = vit.patch_embed(self.normalize(images))  # (B, N, D)
        if mask is not None:
            x = replace(x, mask, mask_token)  # before positions, so masked tokens keep theirs
        x = torch.cat([vit.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # (B, 1 + N, D)
        return vit.pos_drop(x if vit.pos_embed is None else x + vit.pos_embed)


class MoreBlocks(nn.Module):
    """Blocks that go on from an encoder's raw features, with its shared position bias."""

    def __init__(self, blocks: nn.ModuleList, position_bias: Callable[[], Tensor | None]) -> None:
        super().__init__()
        self.blocks = blocks
        self.position_bias = position_bias  # of the encoder, which owns it

    def forward(self, features: Features, grid: tuple[int, int]) -> Features:
        """Features of all patches of a grid -> features, not normed."""
        x = torch.cat(features, dim=1)  # (B, 1 + N, D)
        bias = self.position_bias()
        for block in self.blocks:
            x = block(x, shared_rel_pos_bias=as_scores(bias))
        return Features(x[:, :1], x[:, 1:])
