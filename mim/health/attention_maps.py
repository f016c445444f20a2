"""Attention maps of an encoder: who looks where, how far, and what the blocks together look at.

The weights are those that the blocks themselves compute: fused kernels never hold them, so for one call the blocks of
timm multiply and take the softmax in the open, and a hook reads it where the dropout of attention would begin. Biases,
rotary positions, normed queries and registers are in it, because nothing is computed anew here.

Maps are of all tokens with all tokens: ViT, EVA, BEiT and ViTs with relative positions. Attention in windows (Swin),
over channels (XCiT) or of pooled tokens has no such map and is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import Attention, AttentionRope
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn

from mim.config import ConfigError

KINDS = (Attention, AttentionRope, BeitAttention, EvaAttention, RelPosAttention)
Reduce = Callable[[Tensor], Tensor]
EXACT = "donot_use_mm_for_euclid_dist"  # a matrix product would round distances, on GPUs to TF32


@torch.no_grad()
def attention_maps(
    encoder: Any, images: Tensor, layers: Sequence[int], *, reduce: Reduce | None = None
) -> list[Tensor]:
    """The softmax of attention (B, heads, R + N, R + N) of blocks, queries before keys, prefix tokens first.

    images: (B, C, H, W) in [0, 1], of any size that the encoder takes. layers: blocks from 0, negative from the end.
    reduce: what is kept of each map, so that those of all blocks need not be held at once. Fused attention, compiled
    code and replaced forwards are off during the call alone. Raises ConfigError for encoders without such maps.
    """
    wanted = [layer_of(encoder, layer) for layer in layers]
    modules = {layer: attention_of(encoder, layer) for layer in wanted}
    found: dict[int, Tensor] = {}

    def keep(layer: int, dropout: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[layer] = inputs[0] if reduce is None else reduce(inputs[0])

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(explicit(list(modules.values())))
        for layer, module in modules.items():
            stack.callback(module.attn_drop.register_forward_pre_hook(partial(keep, layer)).remove)
        encoder.layers(images, [max(wanted)])
    return [found[layer] for layer in wanted]


def attention_of(encoder: Any, layer: int) -> Any:
    """The attention module of block `layer`. Raises ConfigError where it has no map of all tokens with all tokens."""
    backbones = [child for _, child in encoder.named_children() if hasattr(child, "blocks")]
    blocks = list(getattr(backbones[0], "blocks", [])) if backbones else []
    module = getattr(blocks[layer], "attn", None) if len(blocks) == encoder.depth else None
    if not isinstance(module, KINDS):
        name = type(backbones[0] if backbones else next(encoder.children(), encoder)).__name__
        how = f"its block {layer + 1} has {type(module).__name__}" if module is not None else "its blocks are others"
        raise ConfigError(
            f"{name} has no attention of all patches with all patches ({how}); attention maps are for models of the "
            f"classes VisionTransformer, Eva and Beit of timm"
        )
    return module


def layer_of(encoder: Any, layer: int) -> int:
    """A block counted from 0; negative numbers count from the end. Raises ConfigError beyond the depth."""
    if not -encoder.depth <= layer < encoder.depth:
        raise ConfigError(
            f"block {layer + 1 if layer >= 0 else layer} does not exist: the encoder has {encoder.depth} blocks"
        )
    return layer % encoder.depth


def named_layer(encoder: Any, layer: int) -> int:
    """The block, counted from 0, that an option names: from 1, or from the end with negative numbers."""
    if layer == 0:
        raise ConfigError("layer=0 does not exist: blocks are counted from 1, or from the end with negative numbers")
    return layer_of(encoder, layer - 1 if layer > 0 else layer)


@contextlib.contextmanager
def explicit(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let attention modules compute their softmax in the open while the block runs, by the forward of their class."""
    before = [(module, module.fused_attn, module.__dict__.pop("forward", None)) for module in modules]
    try:
        for module in modules:
            module.fused_attn = False  # type: ignore[assignment]
        yield
    finally:
        for module, fused, forward in before:
            module.fused_attn = fused
            if forward is not None:
                module.__dict__["forward"] = forward


def rollout(maps: Sequence[Tensor]) -> Tensor:
    """What flows from each token of the input (last) to each of the output: (B, Q, K), rows sum to 1.

    maps: one per block in their order, averaged over heads, (B, Q, K). Abnar & Zuidema 2020, "Quantifying Attention
    Flow in Transformers", arXiv 2005.00928, section 3: half of each block is the residual path.
    """
    flow = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype, device=maps[0].device).expand_as(maps[0])
    for weights in maps:
        flow = (weights @ flow + flow) / 2
    return flow / flow.sum(dim=-1, keepdim=True)


def mean_distance(weights: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """How far heads look, in pixels: (B, heads), of a map (B, heads, R + N, R + N) over a grid (h, w) of patches.

    The distance between the centres of a patch and of those that it attends to, weighted by the attention, averaged
    over the patches (Dosovitskiy et al. 2021, arXiv 2010.11929, figure 7 right and appendix D.7). Prefix tokens have
    no place and are left out on both sides.
    """
    h, w = grid
    prefix = weights.shape[-1] - h * w
    rows, columns = torch.meshgrid(*(torch.arange(n, device=weights.device) for n in grid), indexing="ij")
    places = torch.stack([rows, columns], dim=-1).reshape(h * w, 2).to(weights.dtype) * patch_size  # (N, 2)
    among = weights[..., prefix:, prefix:]  # (B, heads, N, N)
    apart = torch.cdist(places, places, compute_mode=EXACT)  # (N, N)
    far = (among * apart).sum(dim=-1) / among.sum(dim=-1).clamp_min(1e-12)  # (B, heads, N)
    return far.mean(dim=-1)


def kept_mass(weights: Tensor, share: float) -> Tensor:
    """The fewest patches that hold `share` of the attention: bool (..., N) of weights (..., N).

    Caron et al. 2021 (DINO), arXiv 2104.14294, figure 3 and its published code: from the smallest on, patches are left
    out until 1 - share of the mass is gone. The patch in which the limit falls stays.
    """
    ordered, order = (weights / weights.sum(dim=-1, keepdim=True)).sort(dim=-1)
    kept = ordered.cumsum(dim=-1) > 1 - share
    return torch.zeros_like(kept).scatter(-1, order, kept)
