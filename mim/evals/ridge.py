"""Linear probe in closed form: ridge regression of frozen features onto one-hot labels.

It needs no learning rate and no epochs, so it can run in the loop and compare runs without tuning. The strength of the
ridge is chosen on a tenth of the training split, never on the held-out one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mim.contracts import LoadedRun, NamedValues
from mim.probing.features import Wanted, banks, ridge_accuracy


@dataclass
class Config:
    strengths: list[float] = field(default_factory=lambda: [1e-3, 1e-2, 1e-1, 1.0])  # relative to the feature variance
    layer: int = -1  # block, from 1; negative: from the end
    pool: str = "mean"  # over patches; class (token); class_mean: both side by side
    train_limit: int | None = None  # images; null: all
    val_limit: int | None = None
    batch_size: int = 256  # images through the encoder at once
    cache: str | None = None  # folder that keeps the features for the next evaluation; null: none


def run(loaded: LoadedRun, cfg: Config) -> NamedValues:
    """Yield the held-out accuracy in [0, 1]."""
    wanted = Wanted([cfg.layer], [cfg.pool])
    train, val = banks(loaded, wanted, batch_size=cfg.batch_size, train_limit=cfg.train_limit, val_limit=cfg.val_limit)
    (column,) = wanted.columns
    yield "ridge", ridge_accuracy(train.split(column), val.split(column), strengths=cfg.strengths)
