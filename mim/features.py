"""What evaluations share: features of a labelled split, the ridge that judges them, and sheets of pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
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


def in_colour(images: Tensor) -> Tensor:
    """Images (B, C, H, W) as (B, 3, H, W): the first three channels, or the first as gray."""
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)


def sheet(cells: Tensor, height: int) -> Image.Image:
    """Cells (rows, columns, 3, H, W) in [0, 1] as one picture, each `height` pixels high."""
    width = round(height * cells.shape[-1] / cells.shape[-2])
    rows, columns = cells.shape[:2]
    resized = F.interpolate(cells.flatten(0, 1), (height, width), mode="nearest").unflatten(0, (rows, columns))
    padded = F.pad(resized, (2, 2, 2, 2), value=1.0)
    pixels = padded.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (rows * h, columns * w, 3)
    return Image.fromarray((pixels * 255).round().to(torch.uint8).numpy())
