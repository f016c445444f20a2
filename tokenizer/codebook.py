"""A learned codebook: nearest code, moving averages of what each code stands for, k-means start, revival of dead codes.

VQ-VAE: van den Oord, Vinyals and Kavukcuoglu 2017 (arXiv 1711.00937), section 3 and appendix A.1. Codes of unit length:
Yu et al. 2021 (ViT-VQGAN, arXiv 2110.04627), section 3.2, as BEiT v2 takes them (Peng et al. 2022, arXiv 2208.06366).

Deliberately different from BEiT v2's code: k-means runs on vectors gathered from all ranks; sums and counts are both
averaged and added over all ranks and micro-batches, and applied once per step; a code that falls out of use is revived
with its averages; nothing is one-hot, and only a chunk of the distances exists at a time. What is drawn is drawn by the
noise of the sample, so any split of a batch over ranks and micro-batches gives the same codebook.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.quantize import counted, uniform_noise

CHUNK = 1 << 22  # distances that exist at a time
NEVER = 2.0  # a key above all of [0, 1): of vectors that must not be drawn


@torch.no_grad()
def nearest(vectors: Tensor, codes: Tensor) -> Tensor:
    """Index of the code nearest to each vector: (M, d), (K, d) -> (M,) int64. Ties go to the first.

    |z - c|^2 = |z|^2 - 2 (z c - |c|^2 / 2), so the largest z c - |c|^2 / 2 decides.
    """
    offset = codes.square().sum(dim=1).div_(-2)  # (K,)
    ids = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    rows = max(1, CHUNK // len(codes))
    with torch.autocast(vectors.device.type, enabled=False):  # near codes differ by less than bfloat16 tells
        for some, out in zip(vectors.split(rows), ids.split(rows), strict=True):
            torch.argmax(torch.addmm(offset, some, codes.T), dim=1, out=out)
    return ids


class Codebook(nn.Module):
    """K codes of d values, of unit length if `unit`. They are moved by averages, never by an optimizer.

    Training collects sums and counts in `forward`; `update` adds them over all ranks and applies them once per step.
    """

    codes: Tensor  # (K, d)
    sizes: Tensor  # (K,) moving average of the vectors of a global batch that each code takes
    sums: Tensor  # (K, d) moving average of the sum of those vectors

    def __init__(
        self,
        num_codes: int,
        width: int,
        *,
        unit: bool = True,
        decay: float = 0.99,  # of both averages (BEiT v2)
        dead_below: float = 0.1,  # of the mean size: a code that takes less is dead
        num_revived: int = 64,  # dead codes that may be revived per step; 0 leaves them dead
        iterations: int = 10,  # of k-means at the start; 0 leaves the codes random
    ):
        super().__init__()
        self.unit, self.decay, self.dead_below, self.num_revived = unit, decay, dead_below, num_revived
        self.iterations = iterations
        start = torch.randn(num_codes, width)
        self.register_buffer("codes", F.normalize(start) if unit else start)
        self.register_buffer("sizes", torch.ones(num_codes))
        self.register_buffer("sums", self.codes.clone())
        # Of the micro-batches since the last update: sums and counts of codes, and vectors that may revive dead ones.
        self._sums: Tensor | None = None
        self._counts: Tensor | None = None
        self._spare: tuple[Tensor, Tensor] | None = None  # keys (R,) ascending, vectors (R, d)

    def place(self, vectors: Tensor) -> Tensor:
        """Vectors (..., d) where codes live: in float32, and of unit length if codes are."""
        return F.normalize(vectors.float(), dim=-1) if self.unit else vectors.float()

    def ids(self, vectors: Tensor) -> Tensor:
        """The nearest codes (B, N) int64 of placed vectors (B, N, d)."""
        return nearest(vectors.flatten(0, 1), self.codes).view(vectors.shape[:2])  # (B, N)

    def vectors(self, ids: Tensor) -> Tensor:
        """Codes (B, N) -> their vectors (B, N, d)."""
        return F.embedding(ids, self.codes)

    def forward(self, vectors: Tensor, noise: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize vectors (B, N, d): codes' vectors (B, N, d) with the gradient passed straight through, ids (B, N),
        and the squared distance (B, N), a mean over d, that draws vectors to their codes (the commitment).

        `noise` (B,) int64 names the draws for revival; rows of `weight` (B,) 0 are left out of all statistics.
        """
        with torch.autocast(vectors.device.type, enabled=False):
            placed = self.place(vectors)  # (B, N, d)
            ids = self.ids(placed.detach())  # (B, N)
            found = self.vectors(ids)  # (B, N, d)
            if self.training:
                self._collect(placed.detach(), ids, noise, weight)
            commitment = (placed - found).square().mean(dim=-1)  # (B, N)
            return placed + (found - placed).detach(), ids, commitment

    @torch.no_grad()
    def _collect(self, vectors: Tensor, ids: Tensor, noise: Tensor, weight: Tensor | None) -> None:
        rows = counted(weight, vectors)  # (B,)
        if self._sums is None or self._counts is None:
            self._sums, self._counts = torch.zeros_like(self.sums), torch.zeros_like(self.sizes)
        self._sums.index_add_(0, ids.flatten(), (vectors * rows[:, None, None]).flatten(0, 1))
        self._counts.index_add_(0, ids.flatten(), rows[:, None].expand_as(ids).flatten())
        if self.num_revived:
            drawn = draw(vectors, noise, weight, self.num_revived)
            self._spare = drawn if self._spare is None else merge([self._spare, drawn], self.num_revived)

    @torch.no_grad()
    def update(self) -> None:
        """Move the codes by what the micro-batches of all ranks collected since the last call; no host sync."""
        if self._sums is None or self._counts is None:
            return
        for share in (self._sums, self._counts):
            if dist.is_initialized():
                dist.all_reduce(share)
        self.sums.lerp_(self._sums, 1 - self.decay)
        self.sizes.lerp_(self._counts, 1 - self.decay)
        means = self.sums / self.sizes.clamp(min=1e-12)[:, None]  # (K, d)
        used = (self.sizes > 1e-6 * self.sizes.mean())[:, None]  # of the others the mean is rounding noise
        self.codes.copy_(torch.where(used, self.place(means), self.codes))
        if self._spare is not None:
            self._revive(*gather_drawn(*self._spare, self.num_revived))
        self._sums = self._counts = self._spare = None

    def _revive(self, keys: Tensor, vectors: Tensor) -> None:
        """Give the smallest codes, if they are dead, vectors of this batch, with the averages of a code of mean size.

        Without its averages a revived code would be moved back to where it died by the next update.
        """
        mean = self.sizes.mean()
        num = min(len(vectors), len(self.sizes))
        smallest = torch.topk(self.sizes, num, largest=False, sorted=True).indices  # (R,)
        keys, vectors = keys[:num], vectors[:num]
        dead = (self.sizes[smallest] < self.dead_below * mean) & (keys < NEVER)  # (R,)
        self.codes[smallest] = torch.where(dead[:, None], vectors, self.codes[smallest])
        self.sizes[smallest] = torch.where(dead, mean, self.sizes[smallest])
        self.sums[smallest] = torch.where(dead[:, None], vectors * mean, self.sums[smallest])

    @torch.no_grad()
    def start(self, vectors: Tensor, num_vectors: int) -> None:
        """Start from k-means on vectors (M, d), alike on every rank; a step has `num_vectors` of them.

        Every code starts with the averages of mean size, so that what is dead is known only after some steps.
        """
        if self.iterations:
            self.codes.copy_(k_means(self.place(vectors), len(self.codes), iterations=self.iterations, unit=self.unit))
            if dist.is_initialized():
                dist.broadcast(self.codes, 0)  # ranks of different hardware may round differently
        self.sizes.fill_(num_vectors / len(self.codes))
        self.sums.copy_(self.codes * self.sizes[:, None])


def draw(vectors: Tensor, noise: Tensor, weight: Tensor | None, num: int) -> tuple[Tensor, Tensor]:
    """`num` of the vectors (B, N, d), or all if they are fewer, drawn by the noise (B,) of their samples.

    Returns keys (R,) ascending and vectors (R, d). The smallest keys win, so the draws of parts of a batch, merged, are
    those of the whole. A row of weight 0 has keys NEVER.
    """
    b, n, _ = vectors.shape
    keys = uniform_noise(noise, (n,))  # (B, N)
    if weight is not None:
        keys = keys.masked_fill(weight[:, None] == 0, NEVER)
    kept, ids = torch.topk(keys.flatten(), min(num, b * n), largest=False, sorted=True)
    return kept, vectors.float().flatten(0, 1)[ids]


def merge(draws: list[tuple[Tensor, Tensor]], num: int) -> tuple[Tensor, Tensor]:
    """The `num` smallest of several draws."""
    keys = torch.cat([keys for keys, _ in draws])
    kept, ids = torch.topk(keys, min(num, len(keys)), largest=False, sorted=True)
    return kept, torch.cat([vectors for _, vectors in draws])[ids]


def gather_drawn(keys: Tensor, vectors: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The draw of `num` over all ranks, of what each of them drew: as many on every rank."""
    if dist.is_initialized():
        both = torch.cat([keys[:, None], vectors], dim=1).contiguous()  # (R, 1 + d): one message
        parts = [torch.empty_like(both) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, both)
        keys, vectors = merge([(part[:, 0], part[:, 1:]) for part in parts], num)
    return keys, vectors


@torch.no_grad()
def k_means(vectors: Tensor, num_codes: int, *, iterations: int = 10, unit: bool = True) -> Tensor:
    """Lloyd's algorithm on vectors (M, d) in random order: (K, d). It starts from the first K.

    A code that takes none of them moves to one of those that lie farthest from their codes.
    """
    if len(vectors) < num_codes:
        raise ValueError(f"k-means of {num_codes} codes needs as many vectors, but there are {len(vectors)}")
    codes = vectors[:num_codes].clone()
    for _ in range(iterations):
        ids = nearest(vectors, codes)  # (M,)
        counts = torch.zeros_like(codes[:, 0]).index_add_(0, ids, torch.ones_like(vectors[:, 0]))  # (K,)
        means = torch.zeros_like(codes).index_add_(0, ids, vectors) / counts.clamp(min=1)[:, None]  # (K, d)
        far = (vectors - codes[ids]).square().sum(dim=1).topk(num_codes).indices  # (K,)
        empty = counts == 0
        rank = empty.cumsum(0) - 1  # the j-th empty code takes the j-th farthest vector
        means = torch.where(empty[:, None], vectors[far[rank.clamp(min=0)]], means)
        codes = F.normalize(means, dim=1) if unit else means
    return codes
