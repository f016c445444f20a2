"""Picture: principal components of patch features as colours, of several images together.

Oquab et al. 2023, "DINOv2", arXiv 2304.07193, figure 1 and section 7.4: the first component of all patches tells the
object from what is around it; the first three components of the patches that remain become red, green and blue, so
that parts which look alike to the encoder have one colour in all images.

A component has no sign of its own. The foreground is the side of the first one that holds fewer patches of the images'
borders; of every other component the entry with the largest magnitude is positive. So a picture comes again, and small
changes of the features do not turn its colours around.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mim.config import ConfigError
from mim.contracts import LoadedRun, NamedValues
from mim.health.attention_maps import named_layer
from mim.log import Pace
from mim.pictures.drawing import heat, picture, spread, table
from mim.pictures.subjects import Subject, at_size, subjects

ARGUMENTS = ("images...",)  # may be given by their place
FOREGROUNDS = ("inner", "positive", "negative")
EDGES = (0.01, 0.99)  # quantiles of a component that become dark and bright


@dataclass
class Config:
    images: list[str] = field(default_factory=list)  # files, folders, datasets; none: held-out images of the run
    num_images: int = 8  # held-out ones, and of each folder and dataset
    size: int | None = None  # pixels of the short side; null: the model's
    layer: int = -1  # block, from 1; negative: from the end
    foreground: str = "inner"  # the side of the first component that is away from the borders; or positive, negative
    threshold: float = 0.0  # of the first component on that side, in standard deviations
    height: int = 128  # pixels of an image


def run(loaded: LoadedRun, cfg: Config) -> NamedValues:
    """Yield one picture: a row for each image, with its first component, all patches and the foreground in colours."""
    encoder = loaded.encoder
    if encoder is None:
        raise ConfigError(f"{loaded.path} trains a tokenizer, which has no patch features; take a run of an encoder")
    if cfg.foreground not in FOREGROUNDS:
        raise ConfigError(f"foreground={cfg.foreground!r} is unknown; choose {', '.join(FOREGROUNDS)}")
    layer = named_layer(encoder, cfg.layer)
    found = subjects(loaded, cfg.images, num_images=cfg.num_images, size=cfg.size)
    features, grids, pace = [], [], Pace("pca", len(found))
    for subject in found:
        fitting = at_size(encoder, subject.size)
        (tokens,) = fitting.layers(subject.batch["images"], [layer], norm=layer == encoder.depth - 1)
        features.append(tokens.patches[0].cpu())  # (N, D)
        grids.append(_grid(fitting, subject, len(features[-1])))
        pace.advance(1)
    every = torch.cat(features)  # (M, D)
    if len(every) < 4:
        raise ConfigError(f"{len(every)} patches have no three components; name more images, or a larger size")
    scores = components(every)  # (M, 3)
    first = scores[:, 0]
    first = first * _side(first, torch.cat([_border(grid) for grid in grids]), cfg.foreground)
    kept = first / first.std().clamp_min(1e-12) > cfg.threshold  # (M,)
    whole, parts = colours(scores), torch.ones(len(every), 3)
    if kept.sum() >= 4:
        parts[kept] = colours(components(every[kept]))
    rows = []
    of_images = (values.split([h * w for h, w in grids]) for values in (first - first.min(), whole, parts))
    for subject, grid, strength, *coloured in zip(found, grids, *of_images, strict=True):
        maps = [heat(strength.unflatten(0, grid), top=float(first.max() - first.min()))]
        maps += [values.T.unflatten(1, grid) for values in coloured]  # (3, h, w) each
        rows.append([picture(m, cfg.height) for m in (subject.colours, *(spread(m, subject.size) for m in maps))])
    title = f"principal components of {len(every)} patches, block {layer + 1} of {encoder.depth}"
    yield "pca", table(rows, heads=["image", "first component", "three, of all patches", "of foreground"], title=title)


def components(features: Tensor, num: int = 3) -> Tensor:
    """The first principal components (M, num) of features (M, D), float64, by an exact SVD, with fixed signs.

    The entry of largest magnitude of each component's direction in the space of the features is positive.
    """
    centred = features.double() - features.double().mean(dim=0)
    u, s, v = torch.linalg.svd(centred, full_matrices=False)  # v: (K, D), directions in rows
    largest = v.gather(1, v.abs().argmax(dim=1, keepdim=True))[:, 0]  # (K,)
    scores = u * s * torch.where(largest < 0, -1.0, 1.0)  # (M, K)
    missing = max(num - scores.shape[1], 0)
    return F.pad(scores, (0, missing))[:, :num]


def colours(scores: Tensor) -> Tensor:
    """Three components (M, 3) as red, green and blue in [0, 1]."""
    low, high = torch.quantile(scores, torch.tensor(EDGES, dtype=scores.dtype), dim=0)  # (3,) each
    return ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).float()


def _side(first: Tensor, border: Tensor, foreground: str) -> float:
    """The sign that makes the foreground's side of the first component (M,) positive; border: (M,) bool."""
    if foreground != "inner":
        return 1.0 if foreground == "positive" else -1.0
    return -1.0 if (first[border] > 0).double().mean() > 0.5 else 1.0


def _border(grid: tuple[int, int]) -> Tensor:
    """The patches (N,) of a grid that touch the border of the image."""
    edge = torch.ones(grid, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    return edge.flatten()


def _grid(encoder: object, subject: Subject, num: int) -> tuple[int, int]:
    """The grid (h, w) of `num` features: in a pyramid, earlier blocks have a finer one than the output."""
    height, width = subject.size
    h = round((num * height / width) ** 0.5)
    return h, num // h
