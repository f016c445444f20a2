"""How weights start, where the library's own start is not the one a recipe wants."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


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
