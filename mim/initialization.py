"""How weights start, where the library's own start is not the one a recipe wants."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def initialize_as_beit(model: Any) -> None:
    """Weights of a timm transformer as BEiT starts them (Bao et al. 2022, arXiv 2106.08254, and its published code).

    Normal with std 0.02, cut at one standard deviation, which leaves an effective std of 0.0108; zero biases; the last
    Linear of both branches of block i (from 1) divided by sqrt(2 i). timm's own Beit and Eva rescale alike, but cut at
    +-2 and leave the patch embedding to torch. What lies before a hybrid's projection, norms, LayerScale and position
    biases stay as they are.
    """
    tokens = [getattr(model, name, None) for name in ("cls_token", "reg_token", "pos_embed")]
    for weight in (*(layer.weight for layer in _projections(model)), *(t for t in tokens if t is not None)):
        nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)
    for layer in _projections(model):
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    for i, block in enumerate(model.blocks, start=1):
        if not (hasattr(block, "attn") and hasattr(block, "mlp")):
            kind = type(block).__name__
            raise ValueError(f"encoder.weight_init=beit is for blocks with attn and mlp; timm's {kind} has others")
        block.attn.proj.weight /= math.sqrt(2 * i)
        block.mlp.fc2.weight /= math.sqrt(2 * i)


@torch.no_grad()
def initialize_as_mae(model: Any) -> None:
    """Weights of a timm transformer as MAE starts them (He et al. 2022, arXiv 2111.06377, and its published code).

    Xavier uniform, the patch embedding as the Linear that it is; zero biases except that of the patch embedding, which
    is torch's; class token and registers normal with std 0.02. timm's `jax` differs in the patch embedding (LeCun
    normal), the class token (1e-6) and the biases of the MLPs.
    """
    for layer in _projections(model):
        nn.init.xavier_uniform_(layer.weight.flatten(1))
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
    for token in (getattr(model, name, None) for name in ("cls_token", "reg_token")):
        if token is not None:
            nn.init.normal_(token, std=0.02)


PUBLISHED: dict[str, Callable[[Any], None]] = {"beit": initialize_as_beit, "mae": initialize_as_mae}


def _projections(model: Any) -> list[Any]:
    """The projection of the patch embedding and every Linear of the blocks."""
    layers = (model.patch_embed.proj, *model.blocks.modules())
    return [layer for layer in layers if isinstance(layer, nn.Linear | nn.Conv2d)]


@torch.no_grad()
def tie_keys_to_queries(blocks: Iterable[Any], gain: float) -> None:
    """Start keys equal to queries, both scaled by `gain`, in transformer blocks with a fused `attn.qkv` (D -> 3 D).

    A token then first attends to tokens like itself. With positions in the tokens that means near by, from which a
    masked patch can be guessed at once; attention that starts uniform has to find that out first. After mimetic
    initialization (Trockman and Kolter 2023, arXiv 2305.09828, section 4), which draws W_Q W_K' close to a multiple of
    the identity: here W_Q is as it was drawn, times `gain`, and values and projection stay as they are.
    """
    for block in blocks:
        queries, keys, _ = block.attn.qkv.weight.chunk(3)  # each (D, D), views of the weight
        queries.mul_(gain)
        keys.copy_(queries)
