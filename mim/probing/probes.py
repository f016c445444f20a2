"""What the probes share: labelled features, the part of the training split that chooses, and accuracies.

No probe looks at the held-out split before its settings stand: they are chosen on a tenth of the training split, drawn
by the keys of its samples, and fitted once more to all of it (the protocol of DINOv2's logistic regression, Oquab et
al. 2023, arXiv 2304.07193).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mim.config import ConfigError
from mim.contracts import LoadedRun
from mim.data.order import key64
from mim.probing.bank import Bank
from mim.probing.features import Wanted, banks


@dataclass
class Samples:
    """Labelled samples of a bank; the features stay where they are, possibly on disk."""

    columns: dict[str, Tensor]  # of the whole bank, "LAYER/POOLING" -> (rows, D) or (rows, N, D)
    rows: Tensor  # (n,) int64, which rows of the columns
    labels: Tensor  # (n,) int64, 0 to num_classes - 1; -1: a class that the training split lacks, never right
    keys: list[str]
    num_classes: int

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, which: Tensor) -> Samples:
        """The samples where `which` (n,) is True, or those with these numbers, in their order."""
        numbers = which.nonzero().flatten() if which.dtype == torch.bool else which
        keys = [self.keys[i] for i in numbers.tolist()]
        return replace(self, rows=self.rows[numbers], labels=self.labels[numbers], keys=keys)

    def features(self, column: str, device: torch.device, which: Tensor | slice = slice(None)) -> Tensor:
        """Float32 features of these samples, or of those numbered `which`, on a device: (n, D) or (n, N, D)."""
        return self.columns[column][self.rows[which]].to(device).float()


def embedded(loaded: LoadedRun, wanted: Wanted, cfg: Any) -> tuple[Bank, Bank]:
    """A run's training and held-out split, embedded as a probe's Config says."""
    return banks(
        loaded,
        wanted,
        batch_size=cfg.batch_size,
        train_limit=cfg.train_limit,
        val_limit=cfg.val_limit,
        cache=cfg.cache,
    )


def labelled_samples(loaded: LoadedRun, wanted: Wanted, cfg: Any, *, where: str) -> tuple[Samples, Samples]:
    """The labelled samples of both splits."""
    return samples(*embedded(loaded, wanted, cfg), where=where)


def samples(train: Bank, val: Bank, *, where: str) -> tuple[Samples, Samples]:
    """The labelled samples of both splits, with the classes of the training split numbered from 0."""
    classes = train.labels[train.labels >= 0].unique()
    if len(classes) < 2:
        found = "no labels" if not len(classes) else "one class alone"
        raise ConfigError(
            f"the training split has {found}, which {where} cannot learn to tell apart; use a labelled dataset "
            f"(mim shards make --labels-from-folders), and a train_limit that leaves several classes"
        )
    if not (val.labels >= 0).any():
        raise ConfigError(f"the held-out split has no labels, so {where} has nothing to judge by; label data.val_path")
    return _labelled(train, classes), _labelled(val, classes)


def _labelled(bank: Bank, classes: Tensor) -> Samples:
    rows = (bank.labels >= 0).nonzero().flatten()
    labels = bank.labels[rows]
    numbers = torch.searchsorted(classes, labels).clamp(max=len(classes) - 1)
    numbers = torch.where(classes[numbers] == labels, numbers, -1)
    keys = [bank.keys[i] for i in rows.tolist()]
    return Samples(bank.columns, rows, numbers, keys, len(classes))


def ranks_in_class(found: Samples, *name: object) -> Tensor:
    """The place (n,) of each sample in a shuffle of its class; the shuffle is a function of the name and the keys."""
    hashes = np.array([key64(*name, key) for key in found.keys], dtype=np.int64)
    labels = found.labels.numpy()
    order = np.lexsort((hashes, labels))  # by class, then by hash
    starts = np.searchsorted(labels[order], labels[order])  # where the class begins
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order)) - starts
    return torch.from_numpy(places)


def choosing_part(train: Samples, *, ratio: float, seed: int) -> Tensor:
    """Which samples (n,) bool choose the settings: this share of every class, none of a class that has one sample.

    Raises ConfigError where nothing is left to choose by.
    """
    if not 0 < ratio < 1:
        raise ConfigError(
            f"choice_ratio={ratio} must lie between 0 and 1: the share of the training split that chooses"
        )
    counts = torch.bincount(train.labels, minlength=train.num_classes)
    taken = torch.minimum((counts * ratio).ceil().long(), counts - 1)
    which = ranks_in_class(train, "choice", seed) < taken[train.labels]
    if not which.any():
        raise ConfigError(
            "every class of the training split has a single sample, so none can be set aside to choose the settings "
            "by; use more samples (train_limit), or a sweep of one setting"
        )
    return which


def accuracies(logits: Tensor, labels: Tensor, *, k: int = 1) -> Tensor:
    """Shares of the labels (n,) among the k largest of logits (..., n, classes): (...,) float64."""
    best = logits.topk(min(k, logits.shape[-1]), dim=-1).indices  # (..., n, k)
    return (best == labels.unsqueeze(-1)).any(dim=-1).double().mean(dim=-1)
