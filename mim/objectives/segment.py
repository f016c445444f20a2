"""Semantic segmentation: a class for every pixel, by a head on an encoder; with `frozen: true` a probe of it.

Heads: `linear`, `setr_pup` (Zheng et al. 2021, arXiv 2012.15840) and `upernet` (Xiao et al. 2018, arXiv 1807.10221)
with an auxiliary head, as BEiT (Bao et al. 2022, arXiv 2106.08254, section 3.2) and MAE (He et al. 2022, arXiv
2111.06377, appendix A.4) were judged on ADE20K; what each is stands in `mim/segmentation_heads.py`.

The loss of an image is the sum of the cross-entropy over its labelled pixels, divided by all its pixels. With images of
one size, the mean of that over a batch is mmsegmentation's loss (whose default divides by ignored pixels too), and any
split into ranks and micro-batches gives its gradient. A mean over the labelled pixels of a batch would not be one of
images. An image without a labelled pixel has loss 0.

Differences from the published programs: LayerScale, positions and drop path are the encoder's; the pyramid's steps
count as head for layer-wise decay, as published, but have the norm that `norm` says.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim.batch_norm import counting
from mim.contracts import IGNORE, Batch, Encoder
from mim.segmentation_heads import FCN, NORMS, Level, Linear, ProgressiveUpsampling, Pyramid, UPerNet, resized

CLASSES = "label_maps"  # what `num_classes: null` counts the dataset's classes of
HEADS = ("linear", "setr_pup", "upernet")


@dataclass
class Config:
    num_classes: int | None = None  # null: as many as the dataset's label maps have
    head: str = "upernet"  # linear | setr_pup | upernet
    # group: GroupNorm, the same for any split; batch: BatchNorm over all ranks of a micro-batch, as published
    norm: str = "group"
    channels: int = 512  # of setr_pup (256 published) and upernet (512, BEiT and MAE: the encoder's width)
    layers: list[int] | None = None  # of upernet, blocks counted from 1; null: 4, 6, 8, 12 of 12 (BEiT), or all stages
    dropout: float = 0.1  # of whole channels before the scores (mmsegmentation: 0.1)
    auxiliary_weight: float = 0.4  # of the loss of upernet's auxiliary head; 0: there is none
    auxiliary_channels: int = 256
    frozen: bool = False  # the encoder is only read: a probe


def build(encoder: Encoder, cfg: Config) -> Segment:
    """Wrap any encoder; `objective.num_classes` must be known."""
    if cfg.num_classes is None:
        raise ValueError(
            "objective.num_classes is null and the dataset has no label maps that would tell it; set it, or make the "
            "shards with `mim shards make --masks`"
        )
    if not 2 <= cfg.num_classes <= IGNORE:
        raise ValueError(f"objective.num_classes={cfg.num_classes} must lie between 2 and {IGNORE}")
    for name, known in (("head", HEADS), ("norm", NORMS)):
        if getattr(cfg, name) not in known:
            raise ValueError(f"objective.{name}={getattr(cfg, name)!r} is unknown; choose {', '.join(known)}")
    for name in ("channels", "auxiliary_channels"):
        if getattr(cfg, name) < 8 or getattr(cfg, name) % 8:
            raise ValueError(f"objective.{name}={getattr(cfg, name)} must be a multiple of 8")
    if not 0 <= cfg.dropout < 1:
        raise ValueError(f"objective.dropout={cfg.dropout} must be at least 0 and below 1")
    if cfg.auxiliary_weight < 0:
        raise ValueError(f"objective.auxiliary_weight={cfg.auxiliary_weight} must be at least 0")
    if cfg.layers is not None and cfg.head != "upernet":
        raise ValueError(
            f"objective.layers={cfg.layers}, but objective.head={cfg.head} reads the last alone; leave it out"
        )
    return Segment(encoder, cfg, cfg.num_classes)


class Segment(nn.Module):
    """Reads `images` and `label_maps` (B, H, W), IGNORE where there is no label; the loss is per image."""

    per_micro_batch = False  # `build` sets it where there is a BatchNorm
    reads = ("images", "label_maps")

    def __init__(self, encoder: Any, cfg: Config, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.cfg = cfg
        self.num_classes = num_classes
        options: dict[str, Any] = {"norm": cfg.norm, "dropout": cfg.dropout}
        whole = Level(encoder.depth - 1, encoder.width, encoder.patch_size)
        self.levels, self.pyramid, self.auxiliary = [whole], None, None
        if cfg.head == "upernet":
            stages = stages_of(encoder)
            plain = len({level.stride for level in stages}) == 1
            self.levels = chosen(encoder, stages, cfg.layers)
            self.pyramid = Pyramid(self.levels, norm=cfg.norm) if plain else None
            widths = [level.width for level in self.levels]
            self.head: nn.Module = UPerNet(widths, num_classes, channels=cfg.channels, **options)
            if cfg.auxiliary_weight:
                self.auxiliary = FCN(widths[-2], num_classes, channels=cfg.auxiliary_channels, **options)
            encoder.final_norm.requires_grad_(False)  # nobody reads it: intermediate maps are raw, as published
        elif cfg.head == "setr_pup":
            self.head = ProgressiveUpsampling(whole, num_classes, channels=cfg.channels, **options)
        else:
            self.head = Linear(whole.width, num_classes, **options)
        if cfg.frozen:
            encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> Segment:
        """Set the mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.cfg.frozen:
            self.encoder.eval()
        return self

    def forward(self, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return loss (B,), pixel_accuracy (B,) over labelled pixels, and auxiliary_loss (B,) where there is one."""
        labels = batch["label_maps"]
        with counting(self, batch.get("weight")):
            scores, auxiliary = self.scores(batch["images"])
        scores = resized(scores.float(), labels.shape[1:])  # (B, classes, H, W)
        loss = pixel_loss(scores, labels)  # (B,)
        labelled = labels != IGNORE
        right = ((scores.detach().argmax(dim=1) == labels) & labelled).sum(dim=(1, 2))  # (B,)
        out = {"pixel_accuracy": right / labelled.sum(dim=(1, 2)).clamp(min=1)}
        if auxiliary is not None:
            extra = pixel_loss(resized(auxiliary.float(), labels.shape[1:]), labels)  # (B,)
            out["auxiliary_loss"] = extra.detach()
            loss = loss + self.cfg.auxiliary_weight * extra
        return {"loss": loss, **out}

    def score_pixels(self, images: Tensor) -> Tensor:
        """Class scores (B, classes, H, W) in float32 of images (B, C, H, W), at their size."""
        return resized(self.scores(images)[0].float(), images.shape[2:])

    def scores(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores (B, classes, h, w) of the head and, in training, of the auxiliary one, on grids of their own."""
        with torch.no_grad() if self.cfg.frozen else contextlib.nullcontext():
            maps = self.maps(images)
        if self.pyramid is not None:
            maps = self.pyramid(maps)
        auxiliary = self.auxiliary(maps[-2]) if self.auxiliary is not None and self.training else None
        return self.head(maps), auxiliary

    def maps(self, images: Tensor) -> list[Tensor]:
        """The encoder's maps (B, D, h, w) that the head reads: raw ones of several blocks, or the last, normed."""
        h, w = self.encoder.grid((images.shape[2], images.shape[3]))
        if self.cfg.head == "upernet":
            found = self.encoder.layers(images, [level.block for level in self.levels])
        else:
            found = [self.encoder(images)]
        maps = []
        for level, features in zip(self.levels, found, strict=True):
            cells = self.encoder.patch_size // level.stride  # per side of a cell of the last map
            maps.append(features.patches.transpose(1, 2).unflatten(2, (h * cells, w * cells)))  # (B, D, h, w)
        return maps


def stages_of(encoder: Any) -> list[Level]:
    """The maps that an encoder offers, in the order of its blocks; those of a plain transformer have one stride."""
    offered = getattr(encoder, "stages", None)
    if offered is None:
        return [Level(block, encoder.width, encoder.patch_size) for block in range(encoder.depth)]
    return [Level(block, *offered[block]) for block in sorted(offered)]


def chosen(encoder: Any, stages: list[Level], layers: list[int] | None) -> list[Level]:
    """The maps that UPerNet reads, finest first: four of a plain transformer, or the last map of each stride."""
    if len({level.stride for level in stages}) > 1:
        if layers is not None:
            raise ValueError(
                f"objective.layers={layers} are for encoders of one grid; this one has stages of strides "
                f"{sorted({level.stride for level in stages})}, which are all read; remove objective.layers"
            )
        return list({level.stride: level for level in stages}.values())[-4:]
    if layers is None:
        layers = [max(round(encoder.depth * share), 1) for share in (1 / 3, 1 / 2, 2 / 3, 1)]
    known = {level.block + 1: level for level in stages}
    if len(layers) != 4 or not set(layers) <= known.keys() or layers != sorted(layers):
        raise ValueError(
            f"objective.layers={layers} must be four blocks in ascending order; those of this encoder with a map of "
            f"their own: {', '.join(map(str, known))}"
        )
    if layers[-1] != encoder.depth:
        raise ValueError(
            f"objective.layers={layers} must end with {encoder.depth}, the last block; what lies behind would not be "
            f"trained (a smaller encoder.depth leaves it out)"
        )
    return [known[layer] for layer in layers]


def pixel_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (B,) of scores (B, classes, H, W): its sum over labelled pixels, divided by all pixels."""
    losses = F.cross_entropy(scores, labels, ignore_index=IGNORE, reduction="none")  # (B, H, W)
    return losses.mean(dim=(1, 2))
