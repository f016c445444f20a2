"""Linear probe in closed form: ridge regression of frozen features onto one-hot labels.

It needs no learning rate and no epochs, so it can run in the loop and compare runs without tuning. The strength of the
ridge is chosen on a tenth of the training split, never on the held-out one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mim.contracts import LoadedRun, NamedValues
from mim.features import labelled_splits, pooled, ridge_accuracy


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
