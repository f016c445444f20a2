"""Features of a labelled split, for the evaluations that compare them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mim import build
from mim.config import ConfigError
from mim.contracts import LoadedRun
from mim.data import stream
from mim.data.mixture import AnyDataset

Embed = Callable[[Tensor], Tensor]  # images (B, C, H, W) in [0, 1] -> (B, D)


@dataclass
class Split:
    """Features (n, D) float32 and labels (n,) int64 of the labelled samples of a dataset, on the CPU."""

    features: Tensor
    labels: Tensor


def pooled(loaded: LoadedRun, pool: str) -> Embed:
    """The encoder's features of an image: the mean over patches ("mean") or the class token ("class")."""
    encoder = loaded.encoder
    if encoder is None:
        raise ConfigError(f"{loaded.path} trains a tokenizer and has no encoder; this evaluation needs one")
    if pool not in ("mean", "class"):
        raise ConfigError(f"pool={pool!r} is unknown; choose mean or class")
    device = next(encoder.parameters()).device

    def embed(images: Tensor) -> Tensor:
        features = encoder(images.to(device))
        if pool == "class" and not features.prefix.shape[1]:
            raise ConfigError("pool=class, but the encoder has no class token; use pool=mean")
        return (features.patches.mean(dim=1) if pool == "mean" else features.prefix[:, 0]).float().cpu()

    return embed


@torch.no_grad()
def extract(dataset: AnyDataset, views: build.Views, embed: Embed, *, batch_size: int, limit: int | None) -> Split:
    """Embed every labelled sample of a dataset, or a fixed random subset of `limit`."""
    if dataset.classes is None:
        raise ConfigError(
            f"{dataset.path} has no labels; make its shards with `mim shards make --labels-from-folders`, "
            f"or set data.labels_from_folders=true for an image folder"
        )
    features, labels = [], []
    for batch in stream.evaluate(
        dataset,
        view=views.evaluation,
        sizes=views.sizes[:1],
        channels=views.data.channels,
        batch_size=batch_size,
        limit=limit,
    ):
        features.append(embed(stream.to_device(batch, torch.device("cpu"))["images"]))
        labels.append(batch["labels"])
    x, y = torch.cat(features), torch.cat(labels)
    return Split(x[y >= 0], y[y >= 0])


def labelled_splits(
    loaded: LoadedRun, embed: Embed, *, batch_size: int, train_limit: int | None, val_limit: int | None
) -> tuple[Split, Split]:
    """Embed the training split (the bank) and the held-out split (the queries) of a run's data."""
    train, val = build.open_data(loaded.config)
    if val is None:
        raise ConfigError(
            "there is no held-out split; give data.val_path, or make shards with `mim shards make --val-ratio 0.1`"
        )
    return (
        extract(train, loaded.views, embed, batch_size=batch_size, limit=train_limit),
        extract(val, loaded.views, embed, batch_size=batch_size, limit=val_limit),
    )
