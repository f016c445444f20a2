"""What evaluations share: an encoder's features of a dataset, the ridge that judges them, and sheets of pictures.

Several layers and poolings come from one pass over the encoder. Every layer is normed by the encoder's final norm, as
DINOv2 is evaluated (Oquab et al. 2023, arXiv 2304.07193, appendix B.3), where it fits the width of the layer.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mim import build, config, frozen_networks, ranks
from mim.config import ConfigError
from mim.contracts import Features, LoadedRun
from mim.data import stream
from mim.data.mixture import AnyDataset
from mim.probing.bank import Bank, Embed, Split, extract
from mim.probing.feature_cache import FeatureCache

__all__ = ["Bank", "Embed", "Split", "Wanted", "bank", "banks", "embed_splits", "embedder", "protocol"]

PROTOCOL = 1  # raised when the same settings would give other numbers
MACHINE = ("batch_size", "cache", "max_gib", "pictures")  # settings of an evaluation that change no number
POOLS = ("mean", "class", "class_mean", "tokens")


@dataclass
class Wanted:
    """Which features of the encoder."""

    layers: list[int] = field(default_factory=lambda: [-1])  # blocks from 1; negative: from the end, -1 the output
    pools: list[str] = field(default_factory=lambda: ["mean"])  # mean | class | class_mean (side by side) | tokens
    dtype: str = "float32"  # as they are kept: float32 | float16

    def __post_init__(self) -> None:
        if unknown := [pool for pool in self.pools if pool not in POOLS]:
            raise ConfigError(f"pool={unknown[0]!r} is unknown; choose {', '.join(POOLS[:-1])} or {POOLS[-1]}")
        if self.dtype not in ("float32", "float16"):
            raise ConfigError(f"dtype={self.dtype!r} is unknown; choose float32 or float16")
        if not self.layers or not self.pools:
            raise ConfigError("layers and pools must name at least one each, e.g. layers=[-1] pools=[mean]")

    @property
    def columns(self) -> list[str]:
        """Names of the columns, layer by layer."""
        return [f"{layer}/{pool}" for layer in self.layers for pool in self.pools]


def embedder(loaded: LoadedRun, wanted: Wanted) -> Embed:
    """The function that makes the columns of a batch of images."""
    encoder = loaded.encoder
    if encoder is None:
        raise ConfigError(f"{loaded.path} trains a tokenizer and has no encoder; this evaluation needs one")
    depth = encoder.depth
    if wrong := [layer for layer in wanted.layers if not 1 <= abs(layer) <= depth]:
        raise ConfigError(f"layer {wrong[0]} does not exist; the encoder has blocks 1 to {depth}, or -{depth} to -1")
    indices = [layer - 1 if layer > 0 else layer for layer in wanted.layers]
    dtype = getattr(torch, wanted.dtype)

    def embed(images: Tensor) -> dict[str, Tensor]:
        try:
            layers = encoder.layers(images, indices, norm=True)
        except ValueError as error:  # a block without an output, images of a size that it cannot take
            raise ConfigError(str(error)) from error
        return {
            f"{layer}/{pool}": _pool(features, pool).to(dtype)
            for layer, features in zip(wanted.layers, layers, strict=True)
            for pool in wanted.pools
        }

    return embed


def _pool(features: Features, pool: str) -> Tensor:
    """One vector of an image (B, D), (B, 2 D) of class_mean, or all its patches (B, N, D)."""
    if pool == "tokens":
        return features.patches.float()
    if pool != "mean" and not features.prefix.shape[1]:
        raise ConfigError(f"pool={pool}, but the encoder has no class token; use pool=mean")
    mean = features.patches.mean(dim=1).float()
    if pool == "mean":
        return mean
    token = features.prefix[:, 0].float()
    return token if pool == "class" else torch.cat([token, mean], dim=1)


def bank(
    loaded: LoadedRun,
    dataset: AnyDataset,
    wanted: Wanted,
    *,
    batch_size: int = 256,
    limit: int | None = None,  # a fixed random subset; None: all
    cache: str | Path | None = None,  # folder that keeps the features
) -> Bank:
    """The wanted features of every sample of a dataset; called by all ranks, each gets everything."""
    embed = embedder(loaded, wanted)
    device = next(loaded.encoder.parameters()).device
    store = None
    if cache is not None:
        found = binding(loaded, dataset, wanted, batch_size=batch_size, limit=limit)
        store = FeatureCache(Path(cache), found, device)
    return extract(dataset, loaded.views, embed, device=device, batch_size=batch_size, limit=limit, store=store)


def banks(
    loaded: LoadedRun,
    wanted: Wanted,
    *,
    batch_size: int = 256,
    train_limit: int | None = None,
    val_limit: int | None = None,
    cache: str | Path | None = None,
) -> tuple[Bank, Bank]:
    """The wanted features of the labelled training and held-out split of a run's data."""
    train, val = labelled_data(loaded)
    return (
        bank(loaded, train, wanted, batch_size=batch_size, limit=train_limit, cache=cache),
        bank(loaded, val, wanted, batch_size=batch_size, limit=val_limit, cache=cache),
    )


def binding(
    loaded: LoadedRun, dataset: AnyDataset, wanted: Wanted, *, batch_size: int, limit: int | None
) -> dict[str, Any]:
    """All that decides the features of a dataset, to the last bit on one machine, as plain data."""
    encoder = loaded.encoder
    architecture = {key: value for key, value in (loaded.config.get("encoder") or {}).items() if key != "init"}
    samples = stream.evaluated(dataset, limit=limit)
    return {
        "format": PROTOCOL,
        "weights": weights_of(loaded),
        "encoder": config.plain(architecture),
        "mean": encoder.mean.flatten().tolist(),
        "std": encoder.std.flatten().tolist(),
        "data": dataset.id,
        "samples": hashlib.sha256(samples.astype("<i8").tobytes()).hexdigest(),
        "pixels": pixels(loaded, dataset),
        "wanted": config.plain(wanted),
        "batch_size": batch_size,
        "made": {"torch": torch.__version__, "device": next(encoder.parameters()).device.type},
    }


def embed_splits(
    loaded: LoadedRun, embed: Embed, *, batch_size: int, train_limit: int | None, val_limit: int | None
) -> tuple[Bank, Bank]:
    """As `banks`, with columns of the caller's own making, on the CPU."""
    train, val = labelled_data(loaded)
    cpu = torch.device("cpu")
    return (
        extract(train, loaded.views, embed, device=cpu, batch_size=batch_size, limit=train_limit),
        extract(val, loaded.views, embed, device=cpu, batch_size=batch_size, limit=val_limit),
    )


def labelled_data(loaded: LoadedRun) -> tuple[AnyDataset, AnyDataset]:
    """The training and the held-out split of a run's data, both with labels. Raises ConfigError."""
    with ranks.main_first():  # an image folder is made into shards once
        train, val = build.open_data(loaded.config)
    if val is None:
        raise ConfigError(
            "there is no held-out split; give data.val_path, or make shards with `mim shards make --val-ratio 0.1`"
        )
    for dataset in (train, val):
        if dataset.classes is None:
            raise ConfigError(
                f"{dataset.path} has no labels; make its shards with `mim shards make --labels-from-folders`, "
                f"or set data.labels_from_folders=true for an image folder"
            )
    return train, val


def protocol(loaded: LoadedRun, cfg: Any) -> str:
    """A short hash of all that a number depends on but the weights: two results with the same one can be compared.

    cfg: the evaluation's own Config. Where the data lie, and how fast they are read, is no part of it.
    """
    train, val = build.open_data(loaded.config)
    settings = {key: value for key, value in config.plain(cfg).items() if key not in MACHINE}
    content = {
        "protocol": PROTOCOL,
        "eval": type(cfg).__module__,
        "settings": settings,
        "data": [None if dataset is None else dataset.id for dataset in (train, val)],
        "pixels": pixels(loaded, train),
    }
    return config.digest(content)[:12]


def weights_of(loaded: LoadedRun) -> str:
    """The hash of the encoder's weights."""
    return frozen_networks.weights_hash(loaded.encoder)


def pixels(loaded: LoadedRun, dataset: AnyDataset) -> dict[str, Any]:
    """What decides the pixels that the encoder sees of an image of a dataset, as plain data."""
    views = loaded.views
    parameters = inspect.signature(views.evaluation).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    return {
        "view": {"name": views.data.eval_view["name"], **options},
        "size": list(views.sizes[0]),
        "channels": views.data.channels,
        "range": stream.value_range(dataset, views.data.channels),
    }


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
