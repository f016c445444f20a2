"""Attention in three steps, softmax(Q K^T) V, where the fused kernel is the slower one.

Fused kernels (Dao et al. 2022, "FlashAttention", arXiv 2205.14135) keep the scores out of memory, which on GPUs is
what costs. On CPUs torch's kernel for bfloat16 is the slower way (docs/results.md, "Speed of the step"), above all in
its backward; three products keep the probabilities for it instead, B * heads * tokens**2 values for each block. In
float32 the fused kernel stays the better one. A softmax of bfloat16 scores is computed in float32 and rounded once.

Every attention of timm has both ways and a switch, `fused_attn`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def unfuse(network: nn.Module, device: torch.device, precision: str) -> int:
    """Let a network's attentions take three steps where that is faster: on CPUs in bf16. Returns how many do."""
    if device.type != "cpu" or precision != "bf16":
        return 0
    found: list[Any] = [module for module in network.modules() if getattr(module, "fused_attn", False)]
    for module in found:
        module.fused_attn = False
    return len(found)
