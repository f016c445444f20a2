"""Finite scalar quantization: a few values per patch, each rounded to a few levels; the grid of levels is the codebook.

Mentzer et al. 2023, "Finite Scalar Quantization: VQ-VAE Made Simple", arXiv 2309.15505, section 3. Nothing is learned
in the quantizer, so nothing can collapse in it; the target is pixels, or a teacher's features as in VQ-KD.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tokenizer import networks
from tokenizer.vectors import VectorTokenizer


@dataclass
class Config(networks.Networks):
    levels: list[int] = field(default_factory=lambda: [8, 8, 8, 5, 5])  # their product is the number of codes (table 1)


class Grid(nn.Module):
    """The quantizer: value i of a vector is bounded to `levels[i]` levels and rounded; gradients pass the rounding."""

    levels: Tensor  # (d,) as all of these
    offset: Tensor  # 1/2 for an even number of levels, which has no level at 0
    steps: Tensor  # what one level of each value adds to the index

    def __init__(self, levels: list[int]):
        super().__init__()
        counts = torch.tensor(levels, dtype=torch.float32)
        self.register_buffer("levels", counts, persistent=False)
        self.register_buffer("offset", (counts + 1) % 2 / 2, persistent=False)
        steps = torch.tensor([math.prod(levels[:i]) for i in range(len(levels))])
        self.register_buffer("steps", steps, persistent=False)

    def place(self, vectors: Tensor) -> Tensor:
        """Bound vectors (..., d) so that rounding gives exactly `levels` values (equation 1 and appendix A)."""
        half = (self.levels - 1) * (1 + 1e-3) / 2
        shift = torch.atanh(self.offset / half)
        return torch.tanh(vectors.float() + shift) * half - self.offset

    def ids(self, vectors: Tensor) -> Tensor:
        """Codes (B, N) int64 of bounded vectors (B, N, d)."""
        digits = vectors.round() + self.levels // 2  # 0 ... levels - 1
        return (digits.long() * self.steps).sum(dim=-1)  # (B, N)

    def vectors(self, ids: Tensor) -> Tensor:
        """Codes (B, N) -> vectors (B, N, d) in [-1, 1]."""
        digits = ids[..., None] // self.steps % self.levels.long()  # (B, N, d)
        return (digits - self.levels // 2) / (self.levels // 2)

    def forward(self, vectors: Tensor, noise: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors (B, N, d) -> rounded ones in [-1, 1], codes (B, N), and a commitment of 0 (B, N): none is needed."""
        bounded = self.place(vectors)
        ids = self.ids(bounded.detach())
        rounded = bounded + (bounded.round() - bounded).detach()  # straight through
        return rounded / (self.levels // 2), ids, torch.zeros_like(bounded[..., 0])


def build(cfg: Config) -> VectorTokenizer:
    """Build the tokenizer; `levels` must be three or more each, for the rounding of two lies far from 0."""
    if not cfg.levels or min(cfg.levels) < 3:
        raise ValueError(f"tokenizer.levels={cfg.levels} must hold numbers of 3 or more, e.g. [8, 8, 8]")
    return VectorTokenizer(cfg, Grid(cfg.levels), math.prod(cfg.levels), len(cfg.levels), commitment=0.0)
