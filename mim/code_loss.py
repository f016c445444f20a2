"""Cross-entropy and accuracy of predicted codes, per sample: what the objectives that classify patches have in common.

BEiT: Bao et al. 2022, arXiv 2106.08254, equation 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def code_loss(logits: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Means over positions of logits (B, M, V) against codes (B, M): cross-entropy (B,) and detached accuracy (B,)."""
    log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)  # (B, M, V): no copy of the logits in float32
    loss = F.nll_loss(log_probs.flatten(0, 1), codes.flatten(), reduction="none").view_as(codes).mean(dim=1)  # (B,)
    accuracy = (logits.detach().argmax(dim=-1) == codes).float().mean(dim=1)  # (B,)
    return loss, accuracy
