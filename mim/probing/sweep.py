"""A sweep of rates as heads that train side by side in one pass over the batches.

Heads of one column of features are one module whose parameters are stacked along their first dimension S: one matrix
product serves all. Losses are added up, so no head feels another, and the optimizers below give every head the rate,
the decay and (LARS) the trust ratio of its own; the tests hold a stacked sweep to the same heads trained one by one.
Batches and first weights are drawn by name, so the numbers are the same on every run and on any number of processes.

DINOv2 trains its linear classifiers side by side (Oquab et al. 2023, arXiv 2304.07193, their eval/linear.py), and CAPI
does linear and attentive ones (Darcet et al. 2025, arXiv 2502.08769), each as a module of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim import schedules
from mim.config import ConfigError
from mim.contracts import NamedValues
from mim.data import order
from mim.log import Pace, say
from mim.probing.probes import Samples, accuracies, choosing_part

NUMBERS_AT_ONCE = 2**27  # of what a block of rows makes in all heads: 512 MiB


class Rate(NamedTuple):
    """What one head of a sweep is trained with."""

    base_lr: float  # per 256 samples of a batch
    weight_decay: float


@dataclass
class Plan:
    """How heads are trained."""

    optimizer: str  # adamw | lars
    batch_size: int  # samples; the whole part if it has fewer
    epochs: int
    min_updates: int  # a small dataset is gone through more often, until it has had so many
    warmup_ratio: float  # share of the updates in which rates rise linearly; then half a cosine to 0
    seed: int

    def __post_init__(self) -> None:
        for key, value in (("probe_batch_size", self.batch_size), ("epochs", self.epochs)):
            if value < 1:
                raise ConfigError(f"{key}={value} must be at least 1")
        if not 0 <= self.warmup_ratio <= 1:
            raise ConfigError(f"warmup_ratio={self.warmup_ratio} must lie between 0 and 1: a share of the updates")


class Normalise(nn.Module):
    """BatchNorm without scale and shift, over all but the last dimension (MAE's main_linprobe.py, eps 1e-6).

    In training by the batch; afterwards by the statistics of all samples that it was trained on, which `measure` takes
    once, instead of running averages of them, which short trainings never reach.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return (x - self.mean) / self.std
        dims = list(range(x.ndim - 1))
        variance, mean = torch.var_mean(x, dim=dims, correction=0)
        return (x - mean) * (variance + 1e-6).rsqrt()

    def measure(self, found: Samples, column: str, batch_size: int) -> None:
        """Take the statistics of a column over all samples, in float64."""
        device = self.mean.device
        count = sums = squares = torch.zeros((), dtype=torch.float64, device=device)
        shift = found.features(column, device, slice(0, 1)).double().flatten(0, -2).mean(dim=0)  # against cancellation
        for rows in torch.arange(len(found)).split(batch_size):
            x = found.features(column, device, rows).double().flatten(0, -2) - shift  # (b or b * N, D)
            count, sums, squares = count + len(x), sums + x.sum(dim=0), squares + x.square().sum(dim=0)
        mean = sums / count
        self.mean.copy_(mean + shift)
        self.std.copy_(((squares / count - mean.square()).clamp(min=0) + 1e-6).sqrt())


class Heads(nn.Module):
    """S heads on one column. Subclasses give `scores` (b, ...) -> (S, classes, b) and `numbers_per_row`.

    Parameters are (S, ...): a matrix of a head has three dimensions here, a bias two. Samples come last in the scores
    because a softmax over few classes is slow along the last dimension.
    """

    numbers_per_row: int  # floats that `scores` holds at once for a row, in all heads

    def __init__(self, width: int, rates: Sequence[Rate]) -> None:
        super().__init__()
        self.normalise = Normalise(width)
        self.rates = list(rates)

    def scores(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def blocks(self, num_rows: int) -> list[slice]:
        """Blocks of rows that are small enough to pass through all heads at once."""
        size = max(1, NUMBERS_AT_ONCE // self.numbers_per_row)
        return [slice(start, start + size) for start in range(0, num_rows, size)]

    def learn(self, x: Tensor, labels: Tensor) -> Tensor:
        """Put the gradient of the sum over heads of the mean cross-entropy into `.grad`; return the losses (S,)."""
        x = self.normalise(x)
        losses = x.new_zeros(len(self.rates))
        for rows in self.blocks(len(x)):
            scores, y = self.scores(x[rows]), labels[rows].expand(len(self.rates), -1)  # (S, classes, b), (S, b)
            loss = F.cross_entropy(scores, y, reduction="none").sum(dim=1) / len(x)  # (S,)
            loss.sum().backward()
            losses += loss.detach()
        return losses


def keyed_normal(shape: Sequence[int], num_heads: int, *name: object, std: float) -> nn.Parameter:
    """A parameter (S, ...) whose heads all start with the same draw of this name, cut at two std."""
    generator = torch.Generator().manual_seed(order.key64(*name))
    first = torch.empty(*shape)
    nn.init.trunc_normal_(first, std=std, a=-2 * std, b=2 * std, generator=generator)
    return nn.Parameter(first.expand(num_heads, *shape).clone())


# ---- optimizers ----------------------------------------------------------------------------------


class AdamW:
    """Adam with decoupled decay of matrices (Loshchilov and Hutter 2019); beta 0.9 and 0.95 as CAPI's probes have."""

    def __init__(self, heads: Heads, lr: Tensor, weight_decay: Tensor) -> None:
        self.lr, self.weight_decay, self.num_steps = lr, weight_decay, 0  # (S,), (S,)
        self.moments = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in heads.parameters()]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Update every head by `factor` times its rate."""
        self.num_steps += 1
        lr = factor * self.lr
        for p, first, second in self.moments:
            assert p.grad is not None
            if p.ndim > 2:
                p.mul_(per_head(1 - lr * self.weight_decay, p))
            first.lerp_(p.grad, 0.1)
            second.mul_(0.95).addcmul_(p.grad, p.grad, value=0.05)
            scale = (second / (1 - 0.95**self.num_steps)).sqrt_().add_(1e-8)
            p.sub_(per_head(lr / (1 - 0.9**self.num_steps), p) * first / scale)
            p.grad = None


class Lars:
    """Momentum whose step is scaled by |w| / |gradient| of each head's matrix (You et al. 2017, arXiv 1708.03888).

    As MAE's util/lars.py: momentum 0.9, trust 0.001, decay added before the ratio, biases neither decayed nor scaled.
    """

    def __init__(self, heads: Heads, lr: Tensor, weight_decay: Tensor) -> None:
        self.lr, self.weight_decay = lr, weight_decay  # (S,), (S,)
        self.moments = [(p, torch.zeros_like(p)) for p in heads.parameters()]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Update every head by `factor` times its rate."""
        for p, momentum in self.moments:
            assert p.grad is not None
            update = p.grad
            if p.ndim > 2:
                update = update + per_head(self.weight_decay, p) * p
                weight_norm, update_norm = (t.flatten(1).norm(dim=1) for t in (p, update))  # (S,)
                ratio = torch.where((weight_norm > 0) & (update_norm > 0), 0.001 * weight_norm / update_norm, 1.0)
                update = per_head(ratio, p) * update
            momentum.mul_(0.9).add_(update)
            p.sub_(per_head(factor * self.lr, p) * momentum)
            p.grad = None


OPTIMIZERS: dict[str, type[AdamW | Lars]] = {"adamw": AdamW, "lars": Lars}


def per_head(values: Tensor, like: Tensor) -> Tensor:
    """Values (S,) in the shape that multiplies a stacked parameter (S, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))


# ---- training ------------------------------------------------------------------------------------


def train(heads: dict[str, Heads], found: Samples, plan: Plan, *, title: str) -> None:
    """Train the heads of every column on all samples; afterwards they are in evaluation mode."""
    device = next(next(iter(heads.values())).parameters()).device
    n, batch_size = len(found), min(plan.batch_size, len(found))
    per_epoch = n // batch_size  # what is left over of an epoch's shuffle is not seen in it
    epochs = max(plan.epochs, math.ceil(plan.min_updates / per_epoch))
    steps, warmup = epochs * per_epoch, round(plan.warmup_ratio * epochs * per_epoch)
    optimizers: dict[str, AdamW | Lars] = {}
    for column, module in heads.items():
        lr, weight_decay = torch.tensor(module.rates, device=device).unbind(dim=1)
        optimizers[column] = OPTIMIZERS[plan.optimizer](module, lr * batch_size / 256, weight_decay)
        module.train()
    pace = Pace(title, steps, unit="updates")
    for epoch in range(epochs):
        shuffled = torch.from_numpy(order.permutation(n, "probe", plan.seed, epoch))
        for i, numbers in enumerate(shuffled[: per_epoch * batch_size].split(batch_size)):
            step = epoch * per_epoch + i
            factor = schedules.warmup_then("cosine", step, peak=1.0, end=0.0, warmup_steps=warmup, steps=steps)
            labels = found.labels[numbers].to(device)
            with torch.enable_grad():
                for column, module in heads.items():
                    module.learn(found.features(column, device, numbers), labels)
                    optimizers[column].step(factor)
            pace.advance(1)
    for column, module in heads.items():
        module.eval().normalise.measure(found, column, batch_size)


@torch.no_grad()
def score(module: Heads, found: Samples, column: str, batch_size: int) -> Tensor:
    """Accuracy, accuracy among the five best, and mean cross-entropy of each head: (3, S) float64, on the CPU.

    Samples of a class that the training split lacks are wrong, and without an entropy.
    """
    device = next(module.parameters()).device
    sums = torch.zeros(3, len(module.rates), dtype=torch.float64)
    for rows in torch.arange(len(found)).split(batch_size):
        x, labels = module.normalise(found.features(column, device, rows)), found.labels[rows].to(device)
        for block in module.blocks(len(x)):
            scores, y = module.scores(x[block]).double(), labels[block]  # (S, classes, b), (b,)
            entropy = F.cross_entropy(scores, y.expand(len(scores), -1), ignore_index=-1, reduction="none")  # (S, b)
            right = [accuracies(scores.mT, y, k=k) * len(y) for k in (1, 5)]
            sums += torch.stack([*right, entropy.sum(dim=1)]).cpu()
    return sums / len(found)


# ---- choice --------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A line of the table of a sweep: what a head reached on the part that chooses."""

    column: str
    rate: Rate
    accuracy: float
    entropy: float

    @property
    def merit(self) -> tuple[float, float]:
        """Larger is better: by accuracy, and among equals by cross-entropy; a head that blew up is last."""
        return (self.accuracy, -self.entropy) if math.isfinite(self.entropy) else (-1.0, 0.0)


def grid(base_lrs: Sequence[float], weight_decays: Sequence[float]) -> list[Rate]:
    """Every pair of a rate and a decay."""
    for key, values in (("base_lrs", base_lrs), ("weight_decays", weight_decays)):
        if not values or min(values) < 0:
            raise ConfigError(f"{key}={list(values)} must be a list of one or more numbers that are not negative")
    return [Rate(*pair) for pair in itertools.product(base_lrs, weight_decays)]


def best_of(entries: Sequence[Entry]) -> Entry:
    """The entry of most merit; the first among equals."""
    return max(entries, key=lambda entry: entry.merit)


def report(entries: Sequence[Entry], title: str) -> None:
    """Say the table of a sweep, a line for each column and decay, and whether its best lies at an end of the rates."""
    for (column, decay), group in itertools.groupby(
        sorted(entries, key=lambda e: (e.column, e.rate.weight_decay, e.rate.base_lr)),
        key=lambda e: (e.column, e.rate.weight_decay),
    ):
        found = "  ".join(f"{e.rate.base_lr:g}: {100 * max(e.merit[0], 0):.1f}" for e in group)
        say(f"{title}: {column}, weight_decay {decay:g}; % by base_lr  {found}")
    best, lrs = best_of(entries), sorted({e.rate.base_lr for e in entries})
    if len(lrs) > 2 and best.rate.base_lr in (lrs[0], lrs[-1]):
        end = "smallest" if best.rate.base_lr == lrs[0] else "largest"
        say(f"{title}: the best base_lr={best.rate.base_lr:g} is the {end} of the sweep; widen base_lrs")


def judge(
    make: Callable[[str, list[Rate]], Heads],
    train_samples: Samples,
    val: Samples,
    plan: Plan,
    *,
    rates: list[Rate],
    choice_ratio: float,
    title: str,
) -> NamedValues:
    """Choose a rate for every column and a column by a part of the training split, fit them anew, judge on `val`.

    `make(column, rates)` makes the heads of a column. Yields `TITLE` and `TITLE_top5` (accuracy in [0, 1]) of the
    chosen column, `TITLE_lr` and `TITLE_weight_decay` that it was trained with, and `TITLE_COLUMN` of each where there
    are several.
    """
    columns = list(train_samples.columns)
    chosen = dict.fromkeys(columns, rates[0])
    first = columns[0]
    if len(columns) * len(rates) > 1:
        which = choosing_part(train_samples, ratio=choice_ratio, seed=plan.seed)
        learning, choosing = train_samples.part(~which), train_samples.part(which)
        heads = {column: make(column, rates) for column in columns}
        num = sum(len(module.rates) for module in heads.values())
        train(heads, learning, plan, title=f"{title}: {num} heads")
        entries = []
        for column, module in heads.items():
            accuracy, _, entropy = score(module, choosing, column, plan.batch_size).tolist()
            entries += [Entry(column, *entry) for entry in zip(rates, accuracy, entropy, strict=True)]
        report(entries, title)
        chosen = {column: best_of([e for e in entries if e.column == column]).rate for column in columns}
        first = best_of(entries).column
    heads = {column: make(column, [rate]) for column, rate in chosen.items()}
    train(heads, train_samples, plan, title=f"{title}: the chosen")
    found = {column: score(module, val, column, plan.batch_size)[:2, 0].tolist() for column, module in heads.items()}
    yield title, found[first][0]
    if train_samples.num_classes > 5:
        yield f"{title}_top5", found[first][1]
    yield f"{title}_lr", chosen[first].base_lr
    yield f"{title}_weight_decay", chosen[first].weight_decay
    for column in columns if len(columns) > 1 else ():
        yield f"{title}_{column}", found[column][0]
