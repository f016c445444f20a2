"""BEiT v2: BEiT with a second prediction that has to pass through the class token.

Peng et al. 2022, "BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers", arXiv 2208.06366. Patch
tokens as they leave an early block are joined with the class token of the last one; two extra blocks predict the same
codes from them, through the same final norm and head. What they know of the later blocks has come through the class
token alone, which so learns to hold the whole image. The extra blocks are dropped after pretraining.

The codes are those of any tokenizer (the paper's is VQ-KD), written into the batch by the frozen network. Differences:
with registers, they join the early patches beside the class token; and the extra blocks start as the encoder's own
blocks do, where the published code leaves them at torch's defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mim.code_loss import code_loss
from mim.contracts import Batch, Encoder, Features
from mim.patches import gather, mask_to_ids


@dataclass
class Config:
    num_codes: int = 8192  # of the tokenizer
    early_layer: int = 9  # block, counted from 1, after which patch tokens branch off: 9 of 12 (base), 21 of 24 (large)
    head_layers: int = 2  # extra blocks


def build(encoder: Encoder, cfg: Config) -> BEiT2:
    """Wrap an encoder that has a class token and can replace patches."""
    if cfg.num_codes < 1:
        raise ValueError(f"objective.num_codes={cfg.num_codes} must be the tokenizer's number, at least 1")
    if not 0 < cfg.early_layer < encoder.depth:
        raise ValueError(
            f"objective.early_layer={cfg.early_layer} must lie from 1 to {encoder.depth - 1}: the encoder has "
            f"{encoder.depth} blocks"
        )
    if cfg.head_layers < 1:
        raise ValueError(
            f"objective.head_layers={cfg.head_layers} must be at least 1; without, use objective.name=beit"
        )
    return BEiT2(encoder, cfg)


class BEiT2(nn.Module):
    """Reads `images`, `mask` and `codes`; the loss is the sum of both cross-entropies, per sample."""

    per_micro_batch = False
    reads = ("images", "mask", "codes")
    num_predictions = 2  # of each masked code, whose losses are added

    def __init__(self, encoder: Any, cfg: Config) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_codes = cfg.num_codes
        self.early_layer = cfg.early_layer
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.width))
        self.extra_blocks = encoder.more_blocks(cfg.head_layers, cfg.early_layer)
        self.head = nn.Linear(encoder.width, cfg.num_codes)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)  # as in BEiT
        nn.init.trunc_normal_(self.head.weight, std=0.02, a=-0.02, b=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return loss (B,), and accuracies (B,) on masked positions: of the encoder, and through the class token."""
        images, mask = batch["images"], batch["mask"]
        _, ids_mask, _ = mask_to_ids(mask, batch["num_masked"])
        codes = batch["codes"].gather(1, ids_mask)  # (B, M)
        early, last = self.encoder.layers(
            images, [self.early_layer - 1, -1], mask=mask, mask_token=self.mask_token, ids_read=ids_mask
        )  # of the last block, masked patches alone
        if not last.prefix.shape[1]:
            raise ValueError(
                "objective.name=beit2 predicts through the class token, but this encoder has none; use beit"
            )
        extra = self.extra_blocks(Features(last.prefix, early.patches), self.encoder.grid(images.shape[-2:]))
        loss, accuracy = code_loss(self.predict(last.patches), codes)
        class_loss, class_accuracy = code_loss(self.predict(gather(extra.patches, ids_mask)), codes)
        return {"loss": loss + class_loss, "accuracy": accuracy, "class_accuracy": class_accuracy}

    def predict(self, tokens: Tensor) -> Tensor:
        """Raw block outputs (B, M, D) -> logits (B, M, num_codes)."""
        return self.head(self.encoder.final_norm(tokens))

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
