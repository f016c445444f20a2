"""Segmentation: mean intersection over union, accuracies and a table of classes on held-out images, and a picture.

The confusion matrix is counted in integers over all labelled pixels of the split, as the PASCAL VOC challenge does
(Everingham et al. 2010, section 4.2), and added up over the ranks, so that any number of them gives equal numbers. A
class that is neither in the truth nor predicted has no intersection over union and is left out of the mean.

`slide: false` looks at each image as `data.eval_view` shows it and scores at that size. `slide: true` is what ADE20K
numbers are published with (mmsegmentation): windows of the training size slide over the image, whose short side has
`short` pixels (as many as a window, if null); their scores are averaged, brought to the size of the stored label map,
and judged there.

Beside the result stands that of always predicting the class with the most pixels of this very split.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mim import build, ranks
from mim.config import ConfigError
from mim.contracts import IGNORE, Batch, LoadedRun, NamedValues
from mim.data import augment, stream
from mim.data.label_map import colours
from mim.data.mixture import AnyDataset
from mim.log import say
from mim.probing.features import in_colour, sheet
from mim.segmentation_heads import resized

TABLE = 20  # classes of the table for people; the numbers of all are yielded
WRONG, UNLABELLED = (1.0, 0.15, 0.15), (0.5, 0.5, 0.5)  # colours of the picture's last column


@dataclass
class Config:
    slide: bool = False  # windows over images of their own size, as published
    short: int | None = None  # of `slide`: pixels of the short side, at least a window's, as null is (ADE20K: 512)
    overlap: float = 1 / 3  # of `slide`: share of a window that the next one sees again (341 of 512 pixels: 1/3)
    batch_size: int = 16  # images, or windows
    limit: int | None = None  # held-out images; null: all
    num_images: int = 6  # rows of the picture; 0: none
    height: int = 128  # pixels of a cell of it


def run(loaded: LoadedRun, cfg: Config) -> NamedValues:
    """Yield miou, mean_accuracy, pixel_accuracy, miou_majority, iou/CLASS of every class, and the picture."""
    objective = loaded.objective
    if not hasattr(objective, "score_pixels"):
        name = loaded.config["objective"]["name"]
        raise ConfigError(f"{loaded.path} is a run of {name}, which predicts no label maps; miou needs one of segment")
    if not 0 <= cfg.overlap < 1:
        raise ConfigError(f"overlap={cfg.overlap} must be at least 0 and below 1")
    _, held_out = build.open_data(loaded.config)
    if held_out is None:
        raise ConfigError(
            "there is no held-out split; give data.val_path, or make shards with `mim shards make --val-ratio 0.1`"
        )
    counts = torch.zeros(objective.num_classes, objective.num_classes, dtype=torch.int64, device=_device(loaded))
    for batch in _batches(loaded, held_out, cfg):
        counts += confusion(_predict(objective, batch, cfg, loaded), batch["label_maps"], objective.num_classes)
    counts = ranks.add(counts).cpu()
    if not counts.any():
        raise ConfigError(f"{held_out.path} has no labelled pixel among the images that were looked at")
    names = held_out.pixel_classes
    assert names is not None
    yield from means(counts).items()
    majority = torch.zeros_like(counts)
    majority[:, counts.sum(dim=1).argmax()] = counts.sum(dim=1)
    yield "miou_majority", means(majority)["miou"]
    iou, seen = unions(counts)
    yield from ((f"iou/{names[i]}", float(iou[i])) for i in seen.nonzero().flatten().tolist())
    for line in table(counts, names):
        say(line)
    if cfg.num_images:
        yield "segmentation", picture(loaded, held_out, cfg)


def confusion(pred: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Count pixels (classes of the truth, predicted classes) int64 of two maps of one shape; IGNORE is left out."""
    labelled = truth != IGNORE
    pairs = truth[labelled] * num_classes + pred[labelled]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def unions(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union (classes,) float64 of a confusion matrix, and which classes occur on either side."""
    right, union = counts.diag(), counts.sum(dim=0) + counts.sum(dim=1) - counts.diag()
    return right / union.clamp(min=1).double(), union > 0


def means(counts: Tensor) -> dict[str, float]:
    """The numbers of a confusion matrix: accuracies are means over classes that occur in the truth, or over pixels."""
    iou, seen = unions(counts)
    truth = counts.sum(dim=1)
    accuracy = counts.diag()[truth > 0] / truth[truth > 0].double()
    return {
        "miou": float(iou[seen].mean()),
        "mean_accuracy": float(accuracy.mean()),
        "pixel_accuracy": float(counts.diag().sum() / counts.sum().double()),
    }


def table(counts: Tensor, names: list[str]) -> list[str]:
    """Lines for people: the classes with the most pixels, their share, intersection over union and accuracy."""
    truth, (iou, seen) = counts.sum(dim=1), unions(counts)
    shown = [i for i in truth.argsort(descending=True, stable=True).tolist() if seen[i]]
    width = max(len(names[i]) for i in shown[:TABLE])
    lines = [f"{'class':{width}}  pixels     IoU  accuracy"]
    for i in shown[:TABLE]:
        accuracy = f"{counts[i, i] / truth[i]:9.1%}" if truth[i] else "    -"
        lines.append(f"{names[i]:{width}} {truth[i] / truth.sum():7.1%} {iou[i]:7.1%} {accuracy}")
    absent, more = len(names) - int(seen.sum()), len(shown) - TABLE
    if more > 0:
        lines.append(f"and {more} rarer classes")
    return [*lines, f"{absent} classes are neither in the truth nor predicted"] if absent else lines


def slide(objective: Any, images: Tensor, *, window: tuple[int, int], overlap: float, batch_size: int) -> Tensor:
    """Scores (B, classes, H, W) averaged over windows that cover the images, the last ones flush with the border."""
    tops, lefts = (
        starts(whole, part, max(part - round(part * overlap), 1))
        for whole, part in zip(images.shape[2:], window, strict=True)
    )
    (h, w), corners = window, [(top, left) for top in tops for left in lefts]
    total = images.new_zeros(len(images), objective.num_classes, *images.shape[2:], dtype=torch.float32)
    times = images.new_zeros(images.shape[2:])
    for first in range(0, len(corners), batch_size):
        some = corners[first : first + batch_size]
        parts = torch.cat(
            [images[:, :, top : top + h, left : left + w] for top, left in some]
        )  # (windows * B, C, h, w)
        for (top, left), scores in zip(some, objective.score_pixels(parts).split(len(images)), strict=True):
            total[:, :, top : top + h, left : left + w] += scores
            times[top : top + h, left : left + w] += 1
    return total / times


def starts(whole: int, part: int, stride: int) -> list[int]:
    """Where windows of `part` pixels begin that cover `whole` pixels at a stride; the last one ends where they do."""
    return [min(start, whole - part) for start in range(0, max(whole - part + stride, 1), stride)]


def picture(loaded: LoadedRun, dataset: AnyDataset, cfg: Config) -> Any:
    """Image, truth, prediction and errors, one row each for the first images; the same ones at every call."""
    few = Config(batch_size=cfg.num_images, limit=cfg.num_images)
    batch = next(iter(_batches(loaded, dataset, few, dealt=False)))
    images, truth = batch["images"], batch["label_maps"]
    pred = _predict(loaded.objective, batch, few, loaded)
    palette = torch.from_numpy(colours()).to(truth.device).float() / 255  # (256, 3)
    shown = in_colour(images)
    errors = 0.35 * shown.mean(dim=1, keepdim=True).expand_as(shown)
    for where, colour in ((pred != truth, WRONG), (truth == IGNORE, UNLABELLED)):
        errors = torch.where(where[:, None], errors.new_tensor(colour).view(3, 1, 1), errors)
    columns = [shown, *(palette[labels].permute(0, 3, 1, 2) for labels in (truth, pred)), errors]  # (B, 3, H, W) each
    return sheet(torch.stack(columns, dim=1).cpu(), cfg.height)


def _batches(loaded: LoadedRun, dataset: AnyDataset, cfg: Config, *, dealt: bool = True) -> Iterator[Batch]:
    """Held-out images with their label maps on the device: this rank's share of them if they are dealt out."""
    views = loaded.views
    rank, world = ranks.place() if dealt else (0, 1)
    size = 1 if cfg.slide else cfg.batch_size  # images of their own size do not stack
    num_images = len(stream.evaluated(dataset, limit=cfg.limit))
    for batch in stream.evaluate(
        dataset,
        view=functools.partial(augment.segment_native, short=cfg.short) if cfg.slide else views.evaluation,
        sizes=views.sizes[:1],
        channels=views.data.channels,
        batch_size=size,
        limit=cfg.limit,
        label_maps=True,
        only=range(-(-num_images // size))[rank::world],
    ):
        yield stream.to_device(batch, _device(loaded))


@torch.no_grad()
def _predict(objective: Any, batch: Batch, cfg: Config, loaded: LoadedRun) -> Tensor:
    """The predicted classes (B, H, W), at the size of the label maps."""
    images, size = batch["images"], batch["label_maps"].shape[1:]
    if not cfg.slide:
        return resized(objective.score_pixels(images), size).argmax(dim=1)
    window = loaded.views.sizes[0]
    scores = slide(objective, images, window=window, overlap=cfg.overlap, batch_size=cfg.batch_size)
    return resized(scores, size).argmax(dim=1)


def _device(loaded: LoadedRun) -> torch.device:
    return next(loaded.objective.parameters()).device
