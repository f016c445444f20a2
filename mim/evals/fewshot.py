"""Few-shot: what a handful of labelled images per class tells, the mean over several draws of them.

Three classifiers of frozen features. `ridge`: regularised least squares onto {-1, 1}, in closed form, as the ViT paper
reports few-shot accuracy (Dosovitskiy et al. 2021, arXiv 2010.11929, section 4.1; big_vision's fewshot_lsr.py: scaled
by the shots, a constant feature of 100 for the bias, l2 1024). `nearest_mean`: the class whose mean has the smallest
angle, features centred by the shots (SimpleShot, Wang et al. 2019, arXiv 1911.04623, "CL2N"; they centre by base
classes, which are not there). `logistic`: as MSN's low-shot protocol (Assran et al. 2022, arXiv 2204.07141, their
logistic_eval.py: each vector centred and of length 1, penalty 0.00025; here with a bias).

The shots of a draw are named by its number and the keys of the samples: the first n of a shuffle of each class, so the
one shot is among the five. Nothing is chosen, so the held-out split decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mim.config import ConfigError
from mim.contracts import LoadedRun, NamedValues
from mim.probing import logistic
from mim.probing.features import Wanted
from mim.probing.probes import Samples, accuracies, labelled_samples, ranks_in_class


@dataclass
class Config:
    shots: list[int] = field(default_factory=lambda: [1, 5, 10])  # labelled images of a class
    draws: int = 5  # of the shots; big_vision has 3
    method: str = "ridge"  # ridge | nearest_mean | logistic
    layer: int = -1  # block, from 1; negative: from the end, -1 the output
    pool: str = "mean"  # mean over patches, class, class_mean, ...
    l2: float = 1024.0  # of ridge
    inverse_penalty: float = 4000.0  # of logistic: scikit-learn's C, 1 / 0.00025
    seed: int = 0  # of the draws
    train_limit: int | None = None  # images that shots are drawn from; null: all
    val_limit: int | None = None
    batch_size: int = 256  # images through the encoder at once
    cache: str | None = None  # folder that keeps the features for the next evaluation; null: none


Method = Callable[[Tensor, Tensor, Tensor, int, Config], Tensor]


def run(loaded: LoadedRun, cfg: Config) -> NamedValues:
    """Yield `fewshot_N`, the mean held-out accuracy in [0, 1] over the draws, and `fewshot_N_std` over them."""
    if cfg.method not in METHODS:
        raise ConfigError(f"method={cfg.method!r} is unknown; choose {', '.join(METHODS)}")
    if not cfg.shots or min(cfg.shots) < 1 or cfg.draws < 1:
        raise ConfigError(f"shots={cfg.shots} and draws={cfg.draws} must be numbers of at least 1")
    if cfg.l2 <= 0 or cfg.inverse_penalty <= 0:
        raise ConfigError(f"l2={cfg.l2:g} and inverse_penalty={cfg.inverse_penalty:g} must be above 0")
    if cfg.pool == "tokens":
        raise ConfigError("pool=tokens: tokens are many vectors of an image, few-shot reads one; use mean")
    train, val = labelled_samples(loaded, Wanted([cfg.layer], [cfg.pool]), cfg, where="fewshot")
    device = next(loaded.encoder.parameters()).device
    for shots in sorted(set(cfg.shots)):
        reached = torch.tensor(few_shot(train, val, device, shots=shots, cfg=cfg), dtype=torch.float64)
        yield f"fewshot_{shots}", float(reached.mean())
        if cfg.draws > 1:
            yield f"fewshot_{shots}_std", float(reached.std())


def few_shot(train: Samples, val: Samples, device: torch.device, *, shots: int, cfg: Config) -> list[float]:
    """Held-out accuracies, one of each draw."""
    counts = torch.bincount(train.labels, minlength=train.num_classes)
    if int(counts.min()) < shots:
        raise ConfigError(
            f"shots={shots}, but a class of the training split has {int(counts.min())} labelled images; use fewer "
            f"shots, or a larger train_limit"
        )
    column = next(iter(train.columns))
    queries, answers = val.features(column, device).double(), val.labels.to(device)
    found = []
    for draw in range(cfg.draws):
        support = train.part(ranks_in_class(train, "shots", cfg.seed, draw) < shots)
        x, labels = support.features(column, device).double(), support.labels.to(device)
        scores = METHODS[cfg.method](x, labels, queries, train.num_classes, cfg)
        found.append(float(accuracies(scores, answers)))
    return found


def ridge(x: Tensor, labels: Tensor, queries: Tensor, num_classes: int, cfg: Config) -> Tensor:
    """Scores (m, classes) of least squares in the smaller of its two forms, over features or over shots."""
    std, mean = torch.std_mean(x, dim=0, correction=0)
    x, queries = (F.pad((rows - mean) / (std + 1e-5), (0, 1), value=100.0) for rows in (x, queries))  # (n, D + 1)
    targets = 2 * F.one_hot(labels, num_classes).double() - 1  # (n, classes)
    n, width = x.shape
    gram = x.T @ x if n >= width else x @ x.T
    gram.diagonal().add_(cfg.l2)
    weights = torch.linalg.solve(gram, x.T @ targets) if n >= width else x.T @ torch.linalg.solve(gram, targets)
    return queries @ weights


def nearest_mean(x: Tensor, labels: Tensor, queries: Tensor, num_classes: int, _: Config) -> Tensor:
    """Scores (m, classes): the cosine between a query and the mean of a class."""
    mean = x.mean(dim=0)
    x, queries = F.normalize(x - mean, dim=1), F.normalize(queries - mean, dim=1)
    of_class = F.one_hot(labels, num_classes).double()  # (n, classes)
    means = (of_class.T @ x) / of_class.sum(dim=0)[:, None]  # (classes, D)
    return queries @ F.normalize(means, dim=1).T


def logistic_regression(x: Tensor, labels: Tensor, queries: Tensor, num_classes: int, cfg: Config) -> Tensor:
    """Scores (m, classes) of a logistic regression on vectors that are centred and of length 1."""
    x, queries = (F.normalize(rows - rows.mean(dim=1, keepdim=True), dim=1) for rows in (x, queries))
    return logistic.fit(x, labels, c=cfg.inverse_penalty, num_classes=num_classes)(queries)


METHODS: dict[str, Method] = {"ridge": ridge, "nearest_mean": nearest_mean, "logistic": logistic_regression}
