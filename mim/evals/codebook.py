"""Score card of a tokenizer on held-out images, and how well a run predicts the masked codes.

A tokenizer is worth a pretraining when its codes are in use, decode to what they came from, stay when the picture
changes a little, cannot be guessed from a neighbour, and tell something about the image. Accuracy of prediction alone
says little: a code that fills half of all patches is easy to guess, so the unigram baseline (always the most frequent
code of the training split) stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mim import build
from mim.config import ConfigError
from mim.contracts import Batch, LoadedRun, NamedValues
from mim.data.mixture import AnyDataset
from mim.log import say
from mim.probing import codes
from mim.probing.features import Split, ridge_accuracy
from tokenizer.card import verdict
from tokenizer.quantize import code_counts, dead, images_of, perplexity, usage


@dataclass
class Config:
    train_limit: int = 2000  # images of the training split: for the unigram baseline, and for the probe
    val_limit: int | None = 2000  # held-out images; null: all
    batch_size: int = 128
    pictures: bool = True  # of a tokenizer's run: its codes over images, and the patches of the most used ones


def run(loaded: LoadedRun, cfg: Config) -> NamedValues:
    """Yield the score card of a tokenizer's run, or usage, accuracy and its unigram baseline of a run that predicts."""
    tokenizer = loaded.frozen.get("tokenizer") or getattr(loaded.objective, "tokenizer", None)
    if tokenizer is None:
        raise ConfigError(f"{loaded.path} has no tokenizer; this evaluation needs a tokenizer run or a BEiT run")
    train, val = build.open_data(loaded.config)
    held_out = val if val is not None else train

    device = next(tokenizer.parameters()).device

    def look_at(dataset: AnyDataset, limit: int | None, **others: Any) -> Iterator[Batch]:
        frozen = {**others, "tokenizer": tokenizer}
        return codes.batches(loaded, dataset, frozen, batch_size=cfg.batch_size, limit=limit, device=device)

    if loaded.encoder is not None:
        yield from _prediction(loaded, tokenizer, look_at(held_out, cfg.val_limit), look_at(train, cfg.train_limit))
        return
    card, bags = _card(tokenizer, look_at(held_out, cfg.val_limit, **loaded.frozen))
    if held_out.classes is not None and val is not None:
        seen = [_bag(tokenizer, batch) for batch in look_at(train, cfg.train_limit)]
        card["probe"] = ridge_accuracy(_split(seen), _split(bags), strengths=[1e-2, 1e-1, 1.0, 10.0])
    yield from card.items()
    colour, reason = verdict(card, tokenizer.num_codes)
    say(f"tokenizer is {colour}: {reason}")
    if cfg.pictures:
        yield from codes.pictures(tokenizer, look_at(held_out, min(cfg.val_limit or 512, 512)))


Bag = tuple[Tensor, Tensor | None]  # which codes the images of a batch have (B, V), wherever they are; labels (B,)


def _card(tokenizer: Any, batches: Iterator[Batch]) -> tuple[dict[str, float], list[Bag]]:
    """The numbers of the card but the probe's, and what that one looks at."""
    bags: list[Bag] = []
    counts = torch.zeros(tokenizer.num_codes, dtype=torch.int64)
    parts_of: dict[str, list[Tensor]] = {}
    for batch in batches:
        images = images_of(batch)
        grid = tokenizer.grid((images.shape[-2], images.shape[-1]))
        values = {
            **codes.misfit(tokenizer, batch, grid),
            "distinct": codes.neighbours_differ(batch["codes"], grid),
            "stable_shift": codes.under_shift(tokenizer, batch, grid),
        }
        if images.shape[1] == 3:
            values["stable_jitter"] = codes.under_jitter(tokenizer, batch)
        for name, value in values.items():
            parts_of.setdefault(name, []).append(value.double().cpu())
        counts += code_counts(batch["codes"], tokenizer.num_codes).cpu()
        bags.append(_bag(tokenizer, batch))
    card = {
        "usage": usage(counts),
        "perplexity": perplexity(counts),
        "dead": dead(counts),
        "surprise": 1 - counts.max() / counts.sum(),
        **{name: torch.cat(parts).mean() for name, parts in parts_of.items()},
    }
    return {name: float(value) for name, value in card.items()}, bags


def _bag(tokenizer: Any, batch: Batch) -> Bag:
    labels = batch.get("labels")
    return codes.histogram(batch["codes"], tokenizer.num_codes).cpu(), labels.cpu() if labels is not None else None


def _split(bags: list[Bag]) -> Split:
    x, y = torch.cat([counts for counts, _ in bags]), torch.cat([labels for _, labels in bags if labels is not None])
    return Split(x[y >= 0], y[y >= 0])


def _prediction(loaded: LoadedRun, tokenizer: Any, val: Iterator[Batch], train: Iterator[Batch]) -> NamedValues:
    counts, masked, seen = (torch.zeros(tokenizer.num_codes, dtype=torch.int64) for _ in range(3))
    right: list[Tensor] = []
    for batch in val:
        counts += code_counts(batch["codes"], tokenizer.num_codes).cpu()
        right.append(loaded.objective(batch, batch["weight"].new_ones(()))["accuracy"].cpu())
        masked += code_counts(batch["codes"][batch["mask"]], tokenizer.num_codes).cpu()
    for batch in train:
        seen += code_counts(batch["codes"], tokenizer.num_codes).cpu()
    yield "usage", float(usage(counts))
    yield "perplexity", float(perplexity(counts))
    yield "accuracy", float(torch.cat(right).mean())
    yield "unigram_accuracy", float(masked[seen.argmax()] / masked.sum())
