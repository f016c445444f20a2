"""Attentive probe: one learned query attends to the patches, a linear classifier reads what it gathers.

For encoders whose training never asked for one vector of an image: masked autoencoders, CAPI, V-JEPA. The head is that
of AIM (El-Nouby et al. 2024, arXiv 2401.08541, section 4 and their AttentionPoolingClassifier: BatchNorm without affine
over the patches, keys and values without bias, one query) with heads 64 wide; the sweep is that of CAPI (Darcet et al.
2025, arXiv 2502.08769: AdamW, rates 1e-5 to 1e-2 per 256 samples, decays 5e-4 to 5e-2). The probe of CAE (Chen et al.
2022, arXiv 2202.03026), which gave it its name, and that of V-JEPA (Bardes et al. 2024, arXiv 2404.08471) add a block
with a perceptron. All heads of a sweep train side by side, on cached patches: n * N * D numbers.

With one query, keys need not be made: q.(K x) = (K'q).x, and values of a weighted mean are the weighted mean of values;
this is the same function at a D-th of the products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mim import build
from mim.config import ConfigError
from mim.contracts import LoadedRun, NamedValues
from mim.probing import sweep
from mim.probing.features import Wanted
from mim.probing.probes import labelled_samples


@dataclass
class Config:
    layers: list[int] = field(default_factory=lambda: [-1])  # blocks, from 1; negative: from the end
    base_lrs: list[float] = field(default_factory=lambda: [1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3])  # per 256 samples
    weight_decays: list[float] = field(default_factory=lambda: [5e-4, 5e-2])
    num_heads: int | None = None  # of the attention; null: width / 64
    epochs: int = 20
    min_updates: int = 1000  # a small dataset is gone through more often, until it has had so many
    warmup_ratio: float = 0.1  # of the updates
    probe_batch_size: int = 256  # samples of an update
    choice_ratio: float = 0.1  # of the training split: what chooses
    seed: int = 0  # of the first weights, the batches and the part that chooses
    max_gib: float = 8.0  # of patches kept at once; more is refused before anything is embedded
    train_limit: int | None = None  # images; null: all
    val_limit: int | None = None
    batch_size: int = 256  # images through the encoder at once
    cache: str | None = None  # folder that keeps the features for the next evaluation; null: none


def run(loaded: LoadedRun, cfg: Config) -> NamedValues:
    """Yield `attentive`, the held-out accuracy in [0, 1], `attentive_top5`, what was chosen, and each layer's."""
    encoder = loaded.encoder
    if encoder is None:
        raise ConfigError(f"{loaded.path} trains a tokenizer and has no encoder; this evaluation needs one")
    num_heads = max(1, encoder.width // 64) if cfg.num_heads is None else cfg.num_heads
    if num_heads < 1 or encoder.width % num_heads:
        raise ConfigError(f"num_heads={num_heads} must divide the width of the encoder, {encoder.width}")
    refuse_too_much(loaded, cfg)
    train, val = labelled_samples(loaded, Wanted(cfg.layers, ["tokens"]), cfg, where="attentive")
    device = next(encoder.parameters()).device

    def make(column: str, rates: Sequence[sweep.Rate]) -> sweep.Heads:
        width = train.columns[column].shape[-1]
        return AttentiveHeads(width, train.num_classes, rates, num_heads=num_heads, name=(column, cfg.seed)).to(device)

    plan = sweep.Plan("adamw", cfg.probe_batch_size, cfg.epochs, cfg.min_updates, cfg.warmup_ratio, cfg.seed)
    rates = sweep.grid(cfg.base_lrs, cfg.weight_decays)
    yield from sweep.judge(make, train, val, plan, rates=rates, choice_ratio=cfg.choice_ratio, title="attentive")


def refuse_too_much(loaded: LoadedRun, cfg: Config) -> None:
    """Raise ConfigError where the patches of both splits are more than `max_gib`."""
    sizes = [len(data) for data in build.open_data(loaded.config) if data is not None]
    limits = [cfg.train_limit, cfg.val_limit]
    num_images = sum(size if limit is None else min(size, limit) for size, limit in zip(sizes, limits, strict=False))
    h, w = loaded.encoder.grid(loaded.views.sizes[0])
    per_image = len(cfg.layers) * h * w * loaded.encoder.width * 4
    gib = num_images * per_image / 2**30
    if gib > cfg.max_gib:
        fitting = int(cfg.max_gib * 2**30 / per_image)
        raise ConfigError(
            f"the patches of {num_images} images in {len(cfg.layers)} layers take {gib:.1f} GiB, more than "
            f"max_gib={cfg.max_gib:g}; use train_limit and val_limit with {fitting} images in all, a larger max_gib, "
            f"or the linear probe, which keeps one vector of an image"
        )


class AttentiveHeads(sweep.Heads):
    """S attentive classifiers on patches (b, N, D): H attention heads of width d = D / H each."""

    def __init__(
        self,
        width: int,
        num_classes: int,
        rates: Sequence[sweep.Rate],
        *,
        num_heads: int,
        name: tuple[object, ...],
    ) -> None:
        super().__init__(width, rates)
        num, self.num_heads = len(self.rates), num_heads
        self.numbers_per_row = 2 * num * num_heads * width
        self.query = sweep.keyed_normal((width,), num, "query", *name, std=0.02)
        self.key = sweep.keyed_normal((width, width), num, "key", *name, std=width**-0.5)
        self.value = sweep.keyed_normal((width, width), num, "value", *name, std=width**-0.5)
        self.weight = sweep.keyed_normal((num_classes, width), num, "weight", *name, std=0.02)
        self.bias = nn.Parameter(torch.zeros(num, num_classes))

    def scores(self, x: Tensor) -> Tensor:
        num, heads = len(self.rates), self.num_heads
        query = self.query.unflatten(1, (heads, -1))  # (S, H, d)
        key, value = (w.unflatten(2, (heads, -1)) for w in (self.key, self.value))  # (S, D, H, d)
        looks_for = torch.einsum("sihd,shd->shi", key, query) * query.shape[-1] ** -0.5  # (S, H, D)
        attention = (x @ looks_for.flatten(0, 1).T).softmax(dim=1)  # (b, N, S * H)
        gathered = (attention.mT @ x).unflatten(1, (num, heads))  # (b, S, H, D)
        read = torch.einsum("bshi,sihd->sbhd", gathered, value).flatten(2)  # (S, b, D)
        return self.weight @ read.mT + self.bias.unsqueeze(2)  # (S, classes, b)
