"""Linear probe in closed form: ridge regression of frozen features onto one-hot labels.

It needs no learning rate and no epochs, so it can run in the loop and compare runs without tuning. The strength of the
ridge is chosen on a tenth of the training split, never on the held-out one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mim.contracts import LoadedRun, NamedValues
from mim.features import Split, labelled_splits, pooled


@dataclass
class Config:
    strengths: list[float] = field(default_factory=lambda: [1e-3, 1e-2, 1e-1, 1.0])  # relative to the feature variance
    pool: str = "mean"  # mean over patches, or class (token)
    train_limit: int | None = None  # images; null: all
    val_limit: int | None = None
    batch_size: int = 256


def run(loaded: LoadedRun, cfg: Config) -> NamedValues:
    """Yield the held-out accuracy in [0, 1]."""
    embed = pooled(loaded, cfg.pool)
    train, val = labelled_splits(
        loaded, embed, batch_size=cfg.batch_size, train_limit=cfg.train_limit, val_limit=cfg.val_limit
    )
    yield "ridge", ridge_accuracy(train, val, strengths=cfg.strengths)


def ridge_accuracy(train: Split, val: Split, *, strengths: list[float]) -> float:
    """Held-out accuracy of the ridge whose strength does best on every tenth training sample."""
    held = torch.arange(len(train.labels)) % 10 == 9
    inner = Split(train.features[~held], train.labels[~held])
    choice = Split(train.features[held], train.labels[held])
    accuracies = _accuracies(inner, choice, strengths) if len(strengths) > 1 else [1.0]
    best = max(range(len(strengths)), key=accuracies.__getitem__)
    return _accuracies(train, val, [strengths[best]])[0]


def _accuracies(train: Split, val: Split, strengths: list[float]) -> list[float]:
    """Accuracy on `val` of the ridge of each strength."""
    mean, std = train.features.mean(dim=0), train.features.std(dim=0) + 1e-6
    queries = F.pad((val.features - mean) / std, (0, 1), value=1.0).double()
    fits = _fits((train.features - mean) / std, train.labels, strengths)
    return [float(((queries @ weights).argmax(dim=1) == val.labels).double().mean()) for weights in fits]


def _fits(x: Tensor, labels: Tensor, strengths: list[float]) -> Iterator[Tensor]:
    """Solve (X'X + s n I) W = X'Y for each strength s in float64, with an unpenalised bias last: (D + 1, classes)."""
    x = F.pad(x, (0, 1), value=1.0).double()  # (n, D + 1)
    gram, moments = x.T @ x, x.T @ F.one_hot(labels).double()  # (D + 1, D + 1), (D + 1, classes)
    penalised = torch.ones(len(gram), dtype=torch.float64)
    penalised[-1] = 0
    for strength in strengths:
        yield torch.linalg.solve(gram + torch.diag(strength * len(x) * penalised), moments)
