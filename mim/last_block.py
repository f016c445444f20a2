"""The last block of a transformer, of which only some tokens are read: its second half runs on these alone.

Attention mixes tokens; what follows it in a block, the MLP with its norm, sees each token by itself. A head over masked
patches so needs the MLP of the last block at their tokens only. Nothing else is computed otherwise, so values and
gradients are those of the whole block. Leaving out the queries and the output projection of the others, too, would save
a quarter more operations, at the price of an attention of our own for each family.

A block's `forward` is replaced, not the block, as in mim/blocks.py: names of parameters stay, and what is hooked to the
block, compiled or recomputed comes around it.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from timm.models import beit, eva, vision_transformer
from torch import Tensor, nn

from mim.patches import gather

HALVED = (vision_transformer.Block, beit.Block, eva.EvaBlock)  # x + attention(norm1(x)), then x + mlp(norm2(x))


def let_read(block: nn.Module) -> None:
    """Give the forward of a block a further argument `rows` (B, M): the tokens that are read, all if it is None."""
    block.forward = MethodType(_halved if type(block) in HALVED else _whole, block)


def rows_of(ids: Tensor | None, num_prefix: int) -> Tensor | None:
    """The tokens of the prefix and of the patches `ids` (B, M): (B, R + M); None for all patches."""
    if ids is None:
        return None
    prefix = torch.arange(num_prefix, device=ids.device).expand(len(ids), -1)
    return torch.cat([prefix, ids + num_prefix], dim=1)


def _halved(block: Any, x: Tensor, *args: Any, rows: Tensor | None = None, **options: Any) -> Tensor:
    """Tokens (B, N, D) -> (B, N, D), or (B, M, D) if only `rows` are read."""
    if rows is None:
        return type(block).forward(block, x, *args, **options)
    mixed = gather(block.attn(block.norm1(x), *args, **options), rows)  # (B, M, D)
    x = gather(x, rows) + block.drop_path1(_scaled(block, "1", mixed))
    return x + block.drop_path2(_scaled(block, "2", block.mlp(block.norm2(x))))


def _whole(block: Any, x: Tensor, *args: Any, rows: Tensor | None = None, **options: Any) -> Tensor:
    """The same of a block that has other halves: computed for all tokens."""
    x = type(block).forward(block, x, *args, **options)
    return x if rows is None else gather(x, rows)


def _scaled(block: Any, half: str, y: Tensor) -> Tensor:
    """LayerScale, which is a module in timm's ViT, and a parameter or nothing in its others."""
    if hasattr(block, f"ls{half}"):
        return getattr(block, f"ls{half}")(y)
    gamma = getattr(block, f"gamma_{half}")
    return y if gamma is None else gamma * y
