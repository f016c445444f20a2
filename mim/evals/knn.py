"""Weighted k-nearest-neighbour accuracy on frozen features.

The protocol of Wu et al. 2018 (arXiv 1805.01978, section 3.4) as DINO uses it (Caron et al. 2021, arXiv 2104.14294,
appendix F): cosine similarity, votes weighted by exp(similarity / temperature). Features are standardised by the bank
first, because those of masked autoencoders share a large mean that would drown every angle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mim.contracts import LoadedRun, NamedValues
from mim.features import Split, Wanted, banks


@dataclass
class Config:
    k: int = 20  # neighbours
    temperature: float = 0.07
    pool: str = "mean"  # mean over patches, or class (token)
    train_limit: int | None = None  # images of the bank; null: all
    val_limit: int | None = None
    batch_size: int = 256


def run(loaded: LoadedRun, cfg: Config) -> NamedValues:
    """Yield the held-out accuracy in [0, 1]."""
    wanted = Wanted([-1], [cfg.pool])
    bank, queries = banks(
        loaded, wanted, batch_size=cfg.batch_size, train_limit=cfg.train_limit, val_limit=cfg.val_limit
    )
    (column,) = wanted.columns
    yield "knn", knn_accuracy(bank.split(column), queries.split(column), k=cfg.k, temperature=cfg.temperature)


def knn_accuracy(bank: Split, queries: Split, *, k: int, temperature: float) -> float:
    """Share of queries whose weighted vote over the k nearest of the bank is right."""
    mean, std = bank.features.mean(dim=0), bank.features.std(dim=0) + 1e-6
    keys = F.normalize((bank.features - mean) / std, dim=1)
    num_classes = int(bank.labels.max()) + 1
    k = min(k, len(keys))
    right = 0
    for x, y in zip(queries.features.split(512), queries.labels.split(512), strict=True):
        similarity, neighbours = (F.normalize((x - mean) / std, dim=1) @ keys.T).topk(k, dim=1)  # (b, k)
        votes = _vote(bank.labels[neighbours], (similarity / temperature).exp(), num_classes)  # (b, classes)
        right += int((votes.argmax(dim=1) == y).sum())
    return right / len(queries.labels)


def _vote(labels: Tensor, weights: Tensor, num_classes: int) -> Tensor:
    return torch.zeros(len(labels), num_classes).scatter_add_(1, labels, weights)
