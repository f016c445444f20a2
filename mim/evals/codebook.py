"""What a tokenizer's codes look like on held-out images, and how well a run predicts the masked ones.

Accuracy alone says little: a code that fills half of all patches is easy to guess. So the unigram baseline (always the
most frequent code of the training split) stands beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mim import build
from mim.config import ConfigError
from mim.contracts import LoadedRun, NamedValues
from mim.data import stream
from tokenizer.quantize import code_counts, perplexity, usage


@dataclass
class Config:
    train_limit: int = 2000  # images of the training split from which the unigram baseline is counted
    val_limit: int | None = None  # held-out images; null: all
    batch_size: int = 128


def run(loaded: LoadedRun, cfg: Config) -> NamedValues:
    """Yield usage and perplexity of the codes; for a run that predicts them also accuracy and its unigram baseline."""
    tokenizer = loaded.frozen.get("tokenizer") or getattr(loaded.objective, "tokenizer", None)
    if tokenizer is None:
        raise ConfigError(f"{loaded.path} has no tokenizer; this evaluation needs a tokenizer run or a BEiT run")
    train, val = build.open_data(loaded.config)
    predicts = loaded.encoder is not None
    counts = torch.zeros(tokenizer.num_codes, dtype=torch.int64)
    masked_counts = torch.zeros_like(counts)
    right = total = 0.0
    for batch in _batches(loaded, val if val is not None else train, tokenizer, cfg, cfg.val_limit):
        counts += code_counts(batch["codes"], tokenizer.num_codes).cpu()
        if predicts:
            out = loaded.objective(batch, batch["weight"].new_ones(()))
            right, total = right + float(out["accuracy"].sum()), total + len(out["accuracy"])
            masked_counts += code_counts(batch["codes"][batch["mask"]], tokenizer.num_codes).cpu()
    yield "usage", float(usage(counts))
    yield "perplexity", float(perplexity(counts))
    if predicts:
        train_counts = torch.zeros_like(counts)
        for batch in _batches(loaded, train, tokenizer, cfg, cfg.train_limit):
            train_counts += code_counts(batch["codes"], tokenizer.num_codes).cpu()
        yield "accuracy", right / total
        yield "unigram_accuracy", float(masked_counts[train_counts.argmax()] / masked_counts.sum())


def _batches(loaded: LoadedRun, dataset, tokenizer, cfg: Config, limit: int | None):
    """Held-out views with their codes and, if the run masks, the same masks each time."""
    device = next(tokenizer.parameters()).device
    views = loaded.views
    for batch in stream.evaluate(
        dataset,
        view=views.evaluation,
        sizes=views.sizes,
        mask=views.mask,
        channels=views.data.channels,
        batch_size=cfg.batch_size,
        limit=limit,
    ):
        batch = stream.to_device(batch, device)
        build.write_targets({"tokenizer": tokenizer}, batch)
        yield batch
