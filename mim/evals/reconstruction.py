"""Picture: input, masked input, prediction, and prediction pasted into the visible patches, one row per image.

Where MAE predicts patches up to their mean and variance, both are interpolated from visible patches, so that nothing in
the picture was hidden from the network; `true_statistics` takes those of the masked pixels, as the published notebook
does, and the title says so. For BEiT and tokenizers the prediction is what the tokenizer decodes from the (predicted)
codes. Of more than three channels the first three are shown as red, green and blue; of two, the first as gray.

With `rounds`, an animation follows: patch after patch is revealed, and the next prediction is made of it, too.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mim import config, frozen_networks
from mim.config import ConfigError
from mim.contracts import Batch, LoadedRun, NamedValues
from mim.data.order import rng
from mim.pictures.drawing import Animation, picture, table
from mim.pictures.subjects import subjects
from mim.pictures.unmasking import ORDERS, fitted, pixels_of, unmask
from mim.probing.features import in_colour

ARGUMENTS = ("images...",)  # may be given by their place
HIDDEN = 0.5  # gray of a masked patch
IN_ANIMATION = 4  # images at most


@dataclass
class Config:
    images: list[str] = field(default_factory=list)  # files, folders, datasets; none: held-out images of the run
    num_images: int = 8  # rows of the picture: held-out images, and of each folder and dataset
    height: int = 96  # pixels of a cell
    ratios: list[float] = field(default_factory=list)  # of the mask, side by side; none: the recipe's
    seeds: list[int] = field(default_factory=lambda: [0])  # of the masks, side by side
    true_statistics: bool = False  # mean and variance of the masked patches themselves
    rounds: int = 0  # of the animation; 0: none
    order: str = "confident"  # in which it reveals patches: confident (where the objective tells) | random


def run(loaded: LoadedRun, cfg: Config) -> NamedValues:
    """Yield one picture, and an animation if asked; the same images and masks at every call."""
    _check(loaded, cfg)
    found = subjects(loaded, cfg.images, num_images=cfg.num_images, whole=False)
    batch: Batch = {
        name: torch.cat([subject.batch[name] for subject in found])
        for name in ("images", "tokenizer_images")
        if name in found[0].batch
    }
    frozen_networks.write_targets(loaded.frozen, batch)
    yield "reconstruction", _table(loaded, cfg, batch)
    if cfg.rounds:
        few = {name: values[:IN_ANIMATION] for name, values in batch.items()}
        yield "unmasking", _animation(loaded, cfg, few)


def _table(loaded: LoadedRun, cfg: Config, batch: Batch) -> Image.Image:
    """A row for each image; for each mask the visible part, the prediction, and both together."""
    images, told = batch["images"], _normalises(loaded.objective)
    columns, heads = [images], ["image"]
    options = {"true_statistics": True} if cfg.true_statistics else {}
    reconstruct = functools.partial(_eager, loaded.objective.reconstruct)
    if loaded.views.mask is None:
        columns.append(fitted(reconstruct(batch, loaded.frozen, **options), images))
        heads.append("prediction")
    for label, masked in _masked(loaded, cfg, batch):
        pred = fitted(reconstruct(masked, loaded.frozen, **options), images)
        hidden = pixels_of(masked["mask"], loaded.encoder.grid(images.shape[-2:]), images)
        columns += [torch.where(hidden, HIDDEN, images), pred, torch.where(hidden, pred, images)]
        heads += [f"visible {label}", "prediction", "in place"]
    title = f"{loaded.config['objective']['name']}, step {loaded.step}"
    if told:
        whose = "TRUE mean and variance of masked patches" if cfg.true_statistics else "brightness from visible patches"
        title = f"{title}; {whose}"
    cells = [in_colour(column).cpu() for column in columns]
    return table([[picture(c[row], cfg.height) for c in cells] for row in range(len(images))], heads=heads, title=title)


def _animation(loaded: LoadedRun, cfg: Config, batch: Batch) -> Animation:
    """The images side by side, from what is visible to the last round."""
    _, masked = next(_masked(loaded, cfg, batch))
    grid, frames = loaded.encoder.grid(batch["images"].shape[-2:]), []
    options: dict[str, Any] = {"rounds": cfg.rounds, "order": cfg.order, "seed": cfg.seeds[0]}
    with torch.compiler.set_stance("force_eager"):  # the number of masked patches changes in every round
        for number, (images, mask) in enumerate(unmask(loaded.objective, masked, loaded.frozen, grid, **options)):
            shown = in_colour(torch.where(pixels_of(mask, grid, images), HIDDEN, images)).cpu()
            left = int(mask[0].sum()) / mask.shape[1]
            title = f"round {number}: {left:.0%} hidden"
            frames.append(table([[picture(image, cfg.height) for image in shown]], title=title))
    return Animation(frames)


def _eager(function: Any, *arguments: Any, **options: Any) -> Tensor:
    """Call without compiled code, which would be made anew for every number of masked patches."""
    with torch.compiler.set_stance("force_eager"):
        return function(*arguments, **options)


def _masked(loaded: LoadedRun, cfg: Config, batch: Batch) -> Iterator[tuple[str, Batch]]:
    """The batch under each mask, with what is visible of it; an image has its mask by seed and number."""
    if loaded.views.mask is None:
        return
    section, images = loaded.config["mask"], batch["images"]
    ratios: list[float | None] = [*cfg.ratios] or [None]
    for ratio in ratios:
        draw = loaded.views.mask
        if ratio is not None:
            others = {key: value for key, value in section.items() if key != "count"}  # which would win over a ratio
            other = config.bind("mim.masking", {**others, "ratio": ratio}, "mask")
            draw = functools.partial(other, loaded.encoder.grid(images.shape[-2:]))
        for seed in cfg.seeds:
            try:
                drawn = np.stack([draw(rng("mask", seed, 0, row)) for row in range(len(images))])  # (B, N)
            except ValueError as error:
                raise ConfigError(f"ratios={cfg.ratios}: {error}") from error
            mask = torch.from_numpy(drawn).to(images.device)
            num = int(drawn[0].sum())
            yield f"{1 - num / drawn.shape[1]:.0%}", {**batch, "mask": mask, "num_masked": num}


def _normalises(objective: Any) -> bool:
    """Whether mean and variance of the patches it predicts have to come from elsewhere."""
    takes = "true_statistics" in inspect.signature(objective.reconstruct).parameters
    return takes and getattr(getattr(objective, "cfg", None), "norm_pix_loss", True)


def _check(loaded: LoadedRun, cfg: Config) -> None:
    """Refuse what cannot be shown."""
    if not hasattr(loaded.objective, "reconstruct"):
        raise ConfigError(f"{loaded.path} trains {loaded.config['objective']['name']}, which reconstructs no images")
    if cfg.true_statistics and not _normalises(loaded.objective):
        name = loaded.config["objective"]["name"]
        raise ConfigError(
            f"true_statistics=true, but {name} of {loaded.path} predicts no normalised patches; leave it out"
        )
    if cfg.order not in ORDERS:
        raise ConfigError(f"order={cfg.order!r} is unknown; choose {' or '.join(ORDERS)}")
    if cfg.rounds < 0 or not cfg.seeds:
        raise ConfigError(f"rounds={cfg.rounds} must not be negative, and seeds={cfg.seeds} needs at least one")
    if loaded.views.mask is None and (cfg.rounds or cfg.ratios):
        raise ConfigError(f"{loaded.path} has no mask, so rounds and ratios mean nothing; leave them out")
