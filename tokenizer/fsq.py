"""Finite scalar quantization: a few values per patch, each rounded to a few levels; the grid of levels is the codebook.

Mentzer et al. 2023, "Finite Scalar Quantization: VQ-VAE Made Simple", arXiv 2309.15505, section 3. No code is learned,
so none can die; the target is pixels, or a teacher's features as in VQ-KD.

Deliberately different: the values are whitened by moving averages of their mean and covariance before they are bounded.
Each then spreads over its levels, and none repeats what another says; short trainings left three quarters of the grid
unused without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tokenizer import networks
from tokenizer.quantize import counted
from tokenizer.vectors import VectorTokenizer

DECAY = 0.99  # of the averages, per step


@dataclass
class Config(networks.Networks):
    levels: list[int] = field(default_factory=lambda: [8, 8, 8, 5, 5])  # their product is the number of codes (table 1)


class Grid(nn.Module):
    """The quantizer: value i of a vector is bounded to `levels[i]` levels and rounded; gradients pass the rounding.

    Training collects moments in `forward`; `update` adds them over all ranks and applies them once per step.
    """

    levels: Tensor  # (d,)
    offset: Tensor  # (d,) 1/2 for an even number of levels, which has no level at 0
    steps: Tensor  # (d,) what one level of each value adds to the index
    mean: Tensor  # (d,) moving average of the values
    second: Tensor  # (d, d) moving average of their products
    whitening: Tensor  # (d, d) that makes them uncorrelated, of unit variance

    def __init__(self, levels: list[int]):
        super().__init__()
        counts = torch.tensor(levels, dtype=torch.float32)
        self.register_buffer("levels", counts, persistent=False)
        self.register_buffer("offset", (counts + 1) % 2 / 2, persistent=False)
        steps = torch.tensor([math.prod(levels[:i]) for i in range(len(levels))])
        self.register_buffer("steps", steps, persistent=False)
        self.register_buffer("mean", torch.zeros(len(levels)))
        self.register_buffer("second", torch.eye(len(levels)))
        self.register_buffer("whitening", torch.eye(len(levels)))
        self._moments: Tensor | None = None  # (1 + d + d d,) of the micro-batches since the last update

    def place(self, vectors: Tensor) -> Tensor:
        """Whiten vectors (..., d), then bound them: rounding gives exactly `levels` values (equation 1, appendix A)."""
        half = (self.levels - 1) * (1 + 1e-3) / 2
        shift = torch.atanh(self.offset / half)
        with torch.autocast(vectors.device.type, enabled=False):
            white = (vectors.float() - self.mean) @ self.whitening.T
        return torch.tanh(white + shift) * half - self.offset

    def ids(self, vectors: Tensor) -> Tensor:
        """Codes (B, N) int64 of bounded vectors (B, N, d); of values that are not a number, as if they were 0."""
        digits = vectors.nan_to_num().round() + self.levels // 2  # 0 ... levels - 1
        return (digits.long() * self.steps).sum(dim=-1)  # (B, N)

    def vectors(self, ids: Tensor) -> Tensor:
        """Codes (B, N) -> vectors (B, N, d) in [-1, 1]."""
        digits = ids[..., None] // self.steps % self.levels.long()  # (B, N, d)
        return (digits - self.levels // 2) / (self.levels // 2)

    def forward(self, vectors: Tensor, noise: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors (B, N, d) -> rounded ones in [-1, 1], codes (B, N), and a commitment of 0 (B, N): none is needed."""
        if self.training:
            self._collect(vectors.detach().float(), weight)
        bounded = self.place(vectors)
        ids = self.ids(bounded.detach())
        rounded = bounded + (bounded.round() - bounded).detach()  # straight through
        return rounded / (self.levels // 2), ids, torch.zeros_like(bounded[..., 0])

    def _collect(self, vectors: Tensor, weight: Tensor | None) -> None:
        rows = counted(weight, vectors)  # (B,)
        kept = (vectors * rows[:, None, None]).flatten(0, 1)  # (B N, d)
        total = (rows.sum() * vectors.shape[1])[None]
        with torch.autocast(vectors.device.type, enabled=False):
            moments = torch.cat([total, kept.sum(dim=0), (kept.T @ kept).flatten()])
        self._moments = moments if self._moments is None else self._moments + moments

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages by what the micro-batches of all ranks collected since the last call; no host sync."""
        if self._moments is None:
            return
        if dist.is_initialized():
            dist.all_reduce(self._moments)
        self._apply_moments(self._moments, 1 - DECAY)
        self._moments = None

    @torch.no_grad()
    def start(self, vectors: Tensor, num_vectors: int) -> None:
        """Start from the moments of vectors (M, d), alike on every rank."""
        self._collect(vectors[None], None)
        assert self._moments is not None
        self._apply_moments(self._moments, 1.0)
        self._moments = None

    def _apply_moments(self, moments: Tensor, rate: float) -> None:
        count, first, products = moments.split([1, len(self.mean), self.second.numel()])
        self.mean.lerp_(first / count, rate)
        self.second.lerp_((products / count).view_as(self.second), rate)
        covariance = self.second - self.mean[:, None] * self.mean
        eye = torch.eye(len(self.mean), device=covariance.device)
        factor, _ = torch.linalg.cholesky_ex(covariance + 1e-6 * covariance.diagonal().mean() * eye)
        self.whitening.copy_(torch.linalg.solve_triangular(factor, eye, upper=False))


def build(cfg: Config) -> VectorTokenizer:
    """Build the tokenizer; `levels` must be three or more each, for the rounding of two lies far from 0."""
    if not cfg.levels or min(cfg.levels) < 3:
        raise ValueError(f"tokenizer.levels={cfg.levels} must hold numbers of 3 or more, e.g. [8, 8, 8]")
    return VectorTokenizer(cfg, Grid(cfg.levels), math.prod(cfg.levels), len(cfg.levels), commitment=0.0)
