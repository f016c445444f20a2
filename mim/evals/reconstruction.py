"""Picture: input, masked input, prediction, and prediction pasted into the visible patches, one row per image.

For MAE the predicted patches are un-normalised with the true mean and variance of each patch; for BEiT and tokenizers
the prediction is what the tokenizer decodes from the (predicted) codes. Of more than three channels the first three are
shown as red, green and blue; of two, the first as gray.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mim import build, frozen_networks
from mim.config import ConfigError
from mim.contracts import LoadedRun, NamedValues
from mim.data import stream
from mim.features import in_colour, sheet


@dataclass
class Config:
    num_images: int = 8  # rows of the picture
    height: int = 96  # pixels of a cell


def run(loaded: LoadedRun, cfg: Config) -> NamedValues:
    """Yield one picture of held-out images; the same images and masks at every call."""
    if not hasattr(loaded.objective, "reconstruct"):
        raise ConfigError(f"{loaded.path} trains {loaded.config['objective']['name']}, which reconstructs no images")
    train, val = build.open_data(loaded.config)
    views = loaded.views
    batches = stream.evaluate(
        val if val is not None else train,
        view=views.evaluation,
        sizes=views.sizes,
        mask=views.mask,
        channels=views.data.channels,
        batch_size=cfg.num_images,
        limit=cfg.num_images,
    )
    batch = stream.to_device(next(iter(batches)), next(loaded.objective.parameters()).device)
    frozen_networks.write_targets(loaded.frozen, batch)
    images = batch["images"]
    pred = loaded.objective.reconstruct(batch, loaded.frozen)
    if pred.shape != images.shape:  # the tokenizer's size
        pred = F.interpolate(pred, images.shape[-2:], mode="bicubic", antialias=True).clamp(0, 1)
    columns = [images, pred]
    if "mask" in batch:
        hidden = _pixels(batch["mask"], loaded.encoder.grid(images.shape[-2:]), images)
        columns = [images, torch.where(hidden, 0.5, images), pred, torch.where(hidden, pred, images)]
    yield "reconstruction", sheet(torch.stack([in_colour(c).cpu() for c in columns], dim=1), cfg.height)


def _pixels(mask: Tensor, grid: tuple[int, int], images: Tensor) -> Tensor:
    """Masks (B, N) as bool images (B, 1, H, W)."""
    square = mask.reshape(len(mask), 1, *grid).float()
    return F.interpolate(square, images.shape[-2:], mode="nearest").bool()
