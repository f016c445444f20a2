"""BEiT: replace masked patches by a learned token and predict the visual codes there.

Bao et al. 2022, "BEiT: BERT Pre-Training of Image Transformers", arXiv 2106.08254, section 2. The codes are written
into the batch by a frozen tokenizer before the objective runs, so a cache of codes needs no other objective.

Mask token and head start as in the published code: a normal of std 0.02 cut at +-0.02, which leaves a std of 0.0108.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mim.code_loss import code_loss
from mim.contracts import Batch, Encoder
from mim.patches import mask_to_ids


@dataclass
class Config:
    num_codes: int = 8192  # of the tokenizer


def build(encoder: Encoder, cfg: Config) -> BEiT:
    """Wrap any encoder that can replace patches."""
    if cfg.num_codes < 1:
        raise ValueError(f"objective.num_codes={cfg.num_codes} must be the tokenizer's number, at least 1")
    return BEiT(encoder, cfg)


class BEiT(nn.Module):
    """Reads `images`, `mask` and `codes`; the loss is the cross-entropy over masked positions, per sample."""

    per_micro_batch = False
    reads = ("images", "mask", "codes")

    def __init__(self, encoder: Any, cfg: Config) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_codes = cfg.num_codes
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.width))
        self.head = nn.Linear(encoder.width, cfg.num_codes)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02, a=-0.02, b=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return loss (B,) and accuracy (B,) of the predicted codes on masked positions."""
        _, ids_mask, _ = mask_to_ids(batch["mask"], batch["num_masked"])
        features = self.encoder(
            batch["images"], mask=batch["mask"], mask_token=self.mask_token, ids_read=ids_mask
        )  # of masked patches
        logits = self.head(features.patches)  # (B, M, num_codes)
        loss, accuracy = code_loss(logits, batch["codes"].gather(1, ids_mask))
        return {"loss": loss, "accuracy": accuracy}

    def truth(self, batch: Batch) -> Tensor:
        """The code of every patch (B, N)."""
        return batch["codes"]

    @torch.no_grad()
    def reconstruct(self, batch: Batch, frozen: dict[str, Any]) -> Tensor:
        """Decode the predicted codes at masked positions, with the true codes elsewhere: (B, C, H', W') in [0, 1].

        The codes that were predicted and how probable they are go into the batch.
        """
        features = self.encoder(batch["images"], mask=batch["mask"], mask_token=self.mask_token)
        batch["confidence"], pred = self.head(features.patches).float().softmax(dim=-1).max(dim=-1)  # (B, N) each
        batch["predicted_codes"] = pred
        codes = torch.where(batch["mask"], pred, batch["codes"])
        return frozen["tokenizer"].decode(codes, self.encoder.grid(batch["images"].shape[-2:]))
