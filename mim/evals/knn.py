"""Weighted k-nearest-neighbour accuracy on frozen features.

The protocol of Wu et al. 2018 (arXiv 1805.01978, section 3.4) as DINO uses it (Caron et al. 2021, arXiv 2104.14294,
appendix F): cosine similarity, votes weighted by exp(similarity / temperature). Features are standardised by the bank
first, because those of masked autoencoders share a large mean that would drown every angle.

One search serves every k: the neighbours of the largest are sorted, and the others are their first. The bank passes
the device in pieces, so no matrix of all similarities exists; ties go to the row that comes first in the bank, so the
pieces cannot be told from the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mim import ranks
from mim.config import ConfigError
from mim.contracts import LoadedRun, NamedValues
from mim.probing.features import Split, Wanted
from mim.probing.probes import embedded

BANK_ROWS, QUERY_ROWS = 16384, 512  # of a piece on the device
ROWS = 2**32  # that a rank in the bank may have


@dataclass
class Config:
    k: int = 20  # neighbours behind the number "knn"
    ks: list[int] = field(default_factory=lambda: [1, 5, 10, 20, 50, 100, 200])  # further numbers, e.g. "knn_k5"
    temperature: float = 0.07
    layer: int = -1  # block, from 1; negative: from the end, -1 the output
    pool: str = "mean"  # over patches; class (token); class_mean: both side by side
    layers: list[int] = field(default_factory=list)  # further columns, each with each of pools: "knn_6/class"
    pools: list[str] = field(default_factory=list)
    train_limit: int | None = None  # images of the bank; null: all
    val_limit: int | None = None
    batch_size: int = 256  # images through the encoder at once
    cache: str | None = None  # folder that keeps the features for the next evaluation; null: none


def run(loaded: LoadedRun, cfg: Config) -> NamedValues:
    """Yield the held-out accuracy in [0, 1]: "knn", then other numbers of neighbours, then other columns."""
    if min(cfg.k, *cfg.ks, 1) < 1:
        raise ConfigError(f"k={cfg.k} and ks={cfg.ks} must be at least 1: numbers of neighbours")
    if cfg.temperature <= 0:
        raise ConfigError(f"temperature={cfg.temperature:g} must be above 0: similarities are divided by it")
    layers = [cfg.layer, *(layer for layer in cfg.layers if layer != cfg.layer)]
    pools = [cfg.pool, *(pool for pool in cfg.pools if pool != cfg.pool)]
    wanted = Wanted(layers, pools)
    bank, queries = embedded(loaded, wanted, cfg)
    device = next(loaded.encoder.parameters()).device
    rows = int((bank.labels >= 0).sum())
    ks = [k for k in sorted({*cfg.ks}) if k <= rows]  # more neighbours than there are say nothing new
    for number, column in enumerate(wanted.columns):
        found = knn_accuracies(
            bank.split(column), queries.split(column), ks=[cfg.k, *ks], temperature=cfg.temperature, device=device
        )
        name = "knn" if number == 0 else f"knn_{column}"
        yield name, found[0]
        yield from ((f"{name}_k{k}", value) for k, value in zip(ks, found[1:], strict=True))


def knn_accuracy(bank: Split, queries: Split, *, k: int, temperature: float) -> float:
    """Share of queries whose weighted vote over the k nearest of the bank is right."""
    return knn_accuracies(bank, queries, ks=[k], temperature=temperature, device=torch.device("cpu"))[0]


def knn_accuracies(
    bank: Split, queries: Split, *, ks: list[int], temperature: float, device: torch.device
) -> list[float]:
    """The accuracy for each number of neighbours; called by all ranks, which share the queries.

    A bank that has fewer rows votes as a whole.
    """
    if not len(bank.labels) or not len(queries.labels):
        raise ConfigError("the bank or the held-out split has no image with a label; raise train_limit and val_limit")
    num_classes = int(max(bank.labels.max(), queries.labels.max())) + 1
    rank, world = ranks.place()
    starts = range(0, len(queries.labels), QUERY_ROWS)[rank::world]
    right = torch.zeros(len(ks), dtype=torch.int64)
    for start, (similarity, ids) in zip(starts, neighbours(bank, queries, starts, max(ks), device), strict=True):
        labels = queries.labels[start : start + QUERY_ROWS]
        weights = (similarity.double() / temperature).exp()  # (b, k)
        for number, k in enumerate(ks):
            votes = _vote(bank.labels[ids[:, :k]], weights[:, :k], num_classes)  # (b, classes)
            right[number] += (votes.argmax(dim=1) == labels).sum()
    right = ranks.add(right.to(device)).cpu()
    return (right.double() / len(queries.labels)).tolist()


def neighbours(
    bank: Split, queries: Split, starts: range, k: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each piece of queries its cosines (b, k), largest first, and the rows of the bank (b, k), on the CPU."""
    mean, std = _moments(bank.features)
    k = min(k, len(bank.labels))

    def directions(rows: Tensor) -> Tensor:
        return F.normalize((rows.float() - mean) / std, dim=1).to(device)

    pieces = [directions(queries.features[start : start + QUERY_ROWS]) for start in starts]  # each (b, D)
    best = [torch.empty(len(piece), 0, dtype=torch.int64, device=device) for piece in pieces]
    for start in range(0, len(bank.labels), BANK_ROWS):
        keys = directions(bank.features[start : start + BANK_ROWS])  # (m, D)
        order = ROWS - 1 - torch.arange(start, start + len(keys), device=device)
        for number, piece in enumerate(pieces):
            joined = torch.cat([best[number], _nearest(piece @ keys.T, order, k)], dim=1)
            best[number] = joined.topk(min(k, joined.shape[1]), dim=1).values
    for found in best:
        similarity = _bits_in_order((found // ROWS).int()).view(torch.float32)
        yield similarity.cpu(), (ROWS - 1 - found % ROWS).cpu()


def _nearest(similarity: Tensor, order: Tensor, k: int) -> Tensor:
    """The k largest of each row of cosines (b, m) as `_ranked` has them: (b, k), or (b, m) where m is less."""
    values, ids = similarity.topk(min(k, similarity.shape[1]), dim=1)
    found = _ranked(values, order[ids])
    last = values[:, -1:]
    undecided = (similarity == last).sum(dim=1) > (values == last).sum(
        dim=1
    )  # topk took any of those equal to the last
    if undecided.any():
        found[undecided] = _ranked(similarity[undecided], order).topk(values.shape[1], dim=1).values
    return found


def _ranked(similarity: Tensor, order: Tensor) -> Tensor:
    """Cosines (b, m) and an order of the columns, below `ROWS`, as int64 (b, m) that compare like the pair of both."""
    bits = _bits_in_order(similarity.view(torch.int32))
    return bits.long() * ROWS + order


def _bits_in_order(bits: Tensor) -> Tensor:
    """The bits of float32 as int32 that compare as the numbers do, and back."""
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std of each feature (D,), in pieces: the rows may be mapped from a file larger than the memory."""
    count, shift = len(features), features[0].double()
    first, second = torch.zeros_like(shift), torch.zeros_like(shift)
    for rows in features.split(BANK_ROWS):
        centred = rows.double() - shift
        first += centred.sum(dim=0)
        second += centred.square().sum(dim=0)
    variance = (second - first.square() / count) / max(count - 1, 1)
    return (shift + first / count).float(), variance.clamp(min=0).sqrt().float() + 1e-6


def _vote(labels: Tensor, weights: Tensor, num_classes: int) -> Tensor:
    """Sums of the weights (b, k) by label (b, k): (b, classes). On the CPU, whose sums have one order."""
    return torch.zeros(len(labels), num_classes, dtype=weights.dtype).scatter_add_(1, labels, weights)
