"""A tokenizer's own loss as an objective, so that the one loop trains tokenizers too, with the use of its codebook.

Usage and perplexity of one batch are bounded by its size, so they are taken over whole epochs: the share of codes that
occurred at all, and exp(entropy) of their frequencies. A step counts towards the epoch of its first sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tokenizer.quantize import code_counts, perplexity, usage


@dataclass
class Config:
    """No fields: what there is to choose belongs to the tokenizer's section."""


class Tokenize(nn.Module):
    encoder = None
    per_micro_batch = False
    tokenizer: Any

    # Integers, so that they are the same for any split of the batch and after any resume.
    epoch: Tensor  # 0-d, epoch that is being counted
    counts: Tensor  # (V,) codes of that epoch so far
    last_counts: Tensor  # (V,) codes of the epoch before; zeros while there is none

    def __init__(self, tokenizer: nn.Module, num_codes: int):
        super().__init__()
        self.tokenizer = tokenizer
        self.reads = getattr(tokenizer, "reads", ("images", "noise"))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(num_codes, dtype=torch.int64))
        self.register_buffer("last_counts", torch.zeros(num_codes, dtype=torch.int64))
        # Of the micro-batches since the last step: (V,) counts, and the epoch of the first row of each.
        self.pending_counts: Tensor | None = None
        self.pending_epochs: list[int] = []

    def start(self, batches: Iterator[dict[str, Any]]) -> None:
        """Let the tokenizer start its codebook from the first batches, if it wants to (k-means)."""
        if hasattr(self.tokenizer, "start"):
            self.tokenizer.start(batches)

    def forward(self, batch: dict[str, Any], progress: Tensor) -> dict[str, Tensor]:
        """The tokenizer's loss, and usage and perplexity of the last full epoch, or since the start in the first."""
        out = self.tokenizer.loss(batch, progress)
        codes = out.pop("codes")  # (B, N)
        if self.training:
            self._collect(codes, batch)
        return out | self._codebook()

    @torch.no_grad()
    def reconstruct(self, batch: dict[str, Any], frozen: dict[str, Any]) -> Tensor:
        """Images decoded from their own codes, (B, C, H, W) in [0, 1]."""
        images = batch["images"]
        if getattr(self.tokenizer, "target", "pixels") != "pixels":
            raise ValueError("this tokenizer decodes to a teacher's features, of which there is no picture to show")
        return self.tokenizer.decode(self.tokenizer.encode(images), self.tokenizer.grid(images.shape[-2:]))

    def card(self) -> dict[str, float]:
        """What is written beside the saved tokenizer: how much of its codebook was in use in training."""
        return {name: value.item() for name, value in self._codebook().items()}

    def _codebook(self) -> dict[str, Tensor]:
        counts = torch.where(self.last_counts.any(), self.last_counts, self.counts)  # (V,)
        return {"usage": usage(counts), "perplexity": perplexity(counts)}

    def _collect(self, codes: Tensor, batch: dict[str, Any]) -> None:
        counts = code_counts(codes, len(self.counts), batch.get("weight"))  # (V,)
        self.pending_counts = counts if self.pending_counts is None else self.pending_counts + counts
        self.pending_epochs.append(batch["epoch"])

    @torch.no_grad()
    def after_step(self, step: int, progress: Tensor) -> None:
        """Moves the codebook and counts the codes of one step, of all micro-batches and ranks; no host sync."""
        if hasattr(self.tokenizer, "after_step"):
            self.tokenizer.after_step(step, progress)
        if self.pending_counts is None:
            return
        counts = self.pending_counts
        epoch = torch.full((), min(self.pending_epochs), dtype=torch.int64, device=counts.device)
        if dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(epoch, op=dist.ReduceOp.MIN)  # the epoch of the global batch's first row, on every rank
        # "!=", not ">": a run that starts from another run's weights begins again at epoch 0.
        begins = epoch != self.epoch
        self.last_counts.copy_(torch.where(begins, self.counts, self.last_counts))
        self.counts.mul_(~begins).add_(counts)
        self.epoch.copy_(epoch)
        self.pending_counts, self.pending_epochs = None, []


def build(tokenizer: Any, cfg: Config) -> Tokenize:
    return Tokenize(tokenizer, tokenizer.num_codes)
