"""Linear probe: a linear classifier on frozen features, the reading of a backbone that most papers print.

Two ways. By gradient, as MAE does (He et al. 2022, arXiv 2111.06377, appendix A.1: BatchNorm without affine before the
head, LARS, batch 16384, base rate 0.1, no decay, 10 of 90 epochs warm-up), or by AdamW over a grid of rates and decays
like CAPI's (Darcet et al. 2025, arXiv 2502.08769, their eval_classification.py): all heads at once in one pass over
cached features. Or by L-BFGS (`solver=lbfgs`), the logistic regression of DINOv2 and CLIP: no rates, only the C of
scikit-learn.

Layers and poolings are columns of one pass through the encoder. Rate, decay, C and column are chosen on `choice_ratio`
of the training split and then fitted to all of it; the held-out split is looked at once, at the end. Features are those
of the evaluation view: the published programs augment while they train the head, and gain from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mim.config import ConfigError
from mim.contracts import LoadedRun, NamedValues
from mim.log import Pace, say
from mim.probing import logistic, sweep
from mim.probing.features import Wanted
from mim.probing.probes import Samples, accuracies, choosing_part, labelled_samples


@dataclass
class Config:
    solver: str = "adamw"  # adamw | lars | lbfgs
    layers: list[int] = field(default_factory=lambda: [-1])  # blocks, from 1; negative: from the end
    pools: list[str] = field(default_factory=lambda: ["mean"])  # mean over patches, class (token), class_mean
    base_lrs: list[float] | None = None  # per 256 samples of a batch; null: see RECIPES
    weight_decays: list[float] | None = None  # null: see RECIPES
    epochs: int | None = None  # null: 30 of adamw, 90 of lars
    min_updates: int = 1000  # a small dataset is gone through more often, until it has had so many
    warmup_ratio: float = 0.1  # of the updates
    probe_batch_size: int | None = None  # samples of an update; null: 512 of adamw, 16384 of lars
    inverse_penalties: list[float] = field(default_factory=lambda: [1e-4, 1e-3, 1e-2, 1e-1, 1.0])  # lbfgs: sklearn's C
    choice_ratio: float = 0.1  # of the training split: what chooses
    seed: int = 0  # of the first weights, the batches and the part that chooses
    train_limit: int | None = None  # images; null: all
    val_limit: int | None = None
    batch_size: int = 256  # images through the encoder at once
    cache: str | None = None  # folder that keeps the features for the next evaluation; null: none


RECIPES: dict[str, dict[str, Any]] = {
    "adamw": {  # CAPI: 1e-5 to 1e-2, 5e-4 to 5e-2; normalised features take larger rates, DINOv2 goes to 0.1
        "base_lrs": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
        "weight_decays": [5e-4, 5e-2],
        "epochs": 30,
        "probe_batch_size": 512,
    },
    "lars": {  # MAE, whose one rate is 0.1
        "base_lrs": [0.05, 0.1, 0.2, 0.5, 1.0],
        "weight_decays": [0.0],
        "epochs": 90,
        "probe_batch_size": 16384,
    },
}


def run(loaded: LoadedRun, cfg: Config) -> NamedValues:
    """Yield `linear`, the held-out accuracy in [0, 1], `linear_top5`, what was chosen, and `linear_COLUMN` of each."""
    if cfg.solver not in ("lbfgs", *RECIPES):
        raise ConfigError(f"solver={cfg.solver!r} is unknown; choose adamw, lars or lbfgs")
    if "tokens" in cfg.pools:
        raise ConfigError(f"pools={cfg.pools}: tokens are many vectors of an image, linear reads one; use mean")
    train, val = labelled_samples(loaded, Wanted(cfg.layers, cfg.pools), cfg, where="linear")
    device = next(loaded.encoder.parameters()).device
    yield from regression(train, val, device, cfg) if cfg.solver == "lbfgs" else heads(train, val, device, cfg)


# ---- by gradient ---------------------------------------------------------------------------------


def heads(train: Samples, val: Samples, device: torch.device, cfg: Config) -> NamedValues:
    """Heads of every rate and decay on every column, side by side."""
    given = {key: getattr(cfg, key) for key in RECIPES[cfg.solver] if getattr(cfg, key) is not None}
    recipe = {**RECIPES[cfg.solver], **given}
    plan = sweep.Plan(
        cfg.solver,
        batch_size=recipe["probe_batch_size"],
        epochs=recipe["epochs"],
        min_updates=cfg.min_updates,
        warmup_ratio=cfg.warmup_ratio,
        seed=cfg.seed,
    )

    def make(column: str, rates: Sequence[sweep.Rate]) -> sweep.Heads:
        width = train.columns[column].shape[-1]
        return LinearHeads(width, train.num_classes, rates, name=(column, cfg.seed)).to(device)

    rates = sweep.grid(recipe["base_lrs"], recipe["weight_decays"])
    yield from sweep.judge(make, train, val, plan, rates=rates, choice_ratio=cfg.choice_ratio, title="linear")


class LinearHeads(sweep.Heads):
    """S linear classifiers on one column of width D: weights (S, classes, D), biases (S, classes)."""

    def __init__(self, width: int, num_classes: int, rates: Sequence[sweep.Rate], *, name: tuple[object, ...]) -> None:
        super().__init__(width, rates)
        self.numbers_per_row = 3 * len(self.rates) * num_classes
        self.weight = sweep.keyed_normal((num_classes, width), len(self.rates), "linear", *name, std=0.01)
        self.bias = nn.Parameter(torch.zeros(len(self.rates), num_classes))

    def scores(self, x: Tensor) -> Tensor:
        scores = self.weight.flatten(0, 1) @ x.T  # (S * classes, b)
        return scores.unflatten(0, self.bias.shape) + self.bias.unsqueeze(2)  # (S, classes, b)


# ---- by L-BFGS -----------------------------------------------------------------------------------


def regression(train: Samples, val: Samples, device: torch.device, cfg: Config) -> NamedValues:
    """Logistic regressions of every C on every column, chosen as heads are."""
    cs = sorted(set(cfg.inverse_penalties))
    if not cs or cs[0] <= 0:
        raise ConfigError(f"inverse_penalties={cfg.inverse_penalties} must be positive numbers, C of scikit-learn")
    columns = list(train.columns)
    chosen, first = dict.fromkeys(columns, cs[0]), columns[0]
    pace = Pace("linear: L-BFGS", (len(cs) + 1) * len(columns), unit="fits")
    if len(cs) * len(columns) > 1:
        which = choosing_part(train, ratio=cfg.choice_ratio, seed=cfg.seed)
        learning, choosing = train.part(~which), train.part(which)
        table = {column: dict(fits(learning, choosing, column, device, cs, pace=pace)) for column in columns}
        for column, found in table.items():
            say(
                f"linear: {column}, lbfgs; % by C  " + "  ".join(f"{c:g}: {100 * a:.1f}" for c, (a, _) in found.items())
            )
            chosen[column] = max(found, key=found.__getitem__)
        first = max(columns, key=lambda column: table[column][chosen[column]])
    results = {column: dict(fits(train, val, column, device, [c], pace=pace))[c] for column, c in chosen.items()}
    yield "linear", results[first][0]
    if train.num_classes > 5:
        yield "linear_top5", results[first][1]
    yield "linear_c", chosen[first]
    for column in columns if len(columns) > 1 else ():
        yield f"linear_{column}", results[column][0]


def fits(
    train: Samples, judged: Samples, column: str, device: torch.device, cs: list[float], *, pace: Pace
) -> Iterator[tuple[float, tuple[float, float]]]:
    """Fit `train` with every C, each from the solution of the one before; yield C and accuracies (of 1, of 5)."""
    x, labels = train.features(column, device), train.labels.to(device)
    scale = logistic.scale_of(x)
    x, queries, answers = scale(x), scale(judged.features(column, device)), judged.labels.to(device)
    found: logistic.Classifier | None = None
    for c in cs:
        found = logistic.fit(x, labels, c=c, num_classes=train.num_classes, start=found)
        pace.advance(1)
        if not found.converged:
            say(f"linear: {column}, C={c:g}: L-BFGS stopped before it converged")
        scores = found(queries)
        yield c, (float(accuracies(scores, answers)), float(accuracies(scores, answers, k=5)))
