"""Picture: where the class token of a block looks, head by head, and what flows to it through all blocks.

The upper row shows the attention over the patches, the lower one the image where the heads look most: the patches that
hold `mass` of the attention (Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", arXiv
2104.14294, figures 1 and 3). `mean` is over the heads; `rollout` follows the attention of all blocks down to the input
(Abnar & Zuidema 2020, arXiv 2005.00928). The maps are of one block, their brightness of each map alone.

Encoders without a class token are asked what all patches look at on average; `query=[row,column]` asks one patch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mim.config import ConfigError
from mim.contracts import LoadedRun, NamedValues
from mim.health.attention_maps import attention_maps, kept_mass, named_layer, rollout
from mim.log import Pace
from mim.pictures.drawing import heat, picture, spread, stack, table
from mim.pictures.subjects import Subject, at_size, subjects

ARGUMENTS = ("images...",)  # may be given by their place
COLUMNS = 8  # maps beside each other
DIMMED = 0.25  # brightness that is left where a head does not look


@dataclass
class Config:
    images: list[str] = field(default_factory=list)  # files, folders, datasets; none: held-out images of the run
    num_images: int = 4  # held-out ones, and of each folder and dataset
    size: int | None = None  # pixels of the short side; null: the model's
    layer: int = -1  # block, from 1; negative: from the end
    query: Any = None  # class | mean | [row, column] of a patch; null: class where there is one, else mean
    mass: float = 0.6  # share of the attention in the lower row
    rollout: bool = True  # through all blocks, too
    height: int = 112  # pixels of a map


def run(loaded: LoadedRun, cfg: Config) -> NamedValues:
    """Yield a picture of each image that is named; of held-out images, all in one."""
    encoder = loaded.encoder
    if encoder is None:
        raise ConfigError(f"{loaded.path} trains a tokenizer, which has no attention to show; take a run of an encoder")
    if not 0 < cfg.mass <= 1:
        raise ConfigError(f"mass={cfg.mass} must be above 0 and at most 1: a share of the attention")
    layer = named_layer(encoder, cfg.layer)
    found = subjects(loaded, cfg.images, num_images=cfg.num_images, size=cfg.size)
    pace, pictures = Pace("attention", len(found)), []
    for subject in found:
        drawn = _drawn(at_size(encoder, subject.size), subject, cfg, layer)
        pace.advance(1)
        if cfg.images:
            yield f"attention-{subject.name}", drawn
        else:
            pictures.append(drawn)
    if pictures:
        yield "attention", stack(pictures)


def _drawn(encoder: Any, subject: Subject, cfg: Config, layer: int) -> Image.Image:
    """The maps of one image as a picture."""
    grid = encoder.grid(subject.size)
    images, num = subject.batch["images"], grid[0] * grid[1]
    weights = attention_maps(encoder, images, [layer])[0][0]  # (heads, R + N, R + N)
    prefix = weights.shape[-1] - num
    query, asked = _query(cfg.query, prefix, grid)

    def of_query(rows: Tensor) -> Tensor:
        """(..., R + N, R + N) -> what the query gives to each patch, (..., N)."""
        return (rows[..., query, :] if query is not None else rows[..., prefix:, :].mean(dim=-2))[..., prefix:]

    heads = of_query(weights)  # (heads, N)
    maps = {"mean": heads.mean(dim=0)}
    if cfg.rollout:
        below = attention_maps(encoder, images, list(range(layer + 1)), reduce=lambda found: found.mean(dim=1))
        maps["rollout"] = of_query(rollout(below))[0]
    maps |= {f"head {number}": values for number, values in enumerate(heads, start=1)}
    names = list(maps)
    flows = torch.stack([maps[name] for name in names]).cpu()  # (maps, N)
    kept = kept_mass(flows, cfg.mass).float().unflatten(1, grid)  # (maps, h, w)
    height, width = subject.size
    title = f"{subject.name}: {asked} of block {layer + 1} of {encoder.depth}, {width}x{height} pixels"
    rows = [[picture(subject.colours, cfg.height)], [picture(subject.colours, cfg.height)]]
    for flow, shown in zip(flows.unflatten(1, grid), kept, strict=True):
        rows[0].append(picture(spread(heat(flow), subject.size), cfg.height))
        dimmed = subject.colours * (DIMMED + (1 - DIMMED) * spread(shown, subject.size))
        rows[1].append(picture(dimmed, cfg.height))
    return stack(list(_wrapped(rows, ["image", *names], f"{title}; below: the patches with {cfg.mass:.0%} of it")))


def _query(asked: Any, prefix: int, grid: tuple[int, int]) -> tuple[int | None, str]:
    """The token that is asked (None: all patches), and its name for people."""
    if asked is None:
        asked = "class" if prefix else "mean"
    if asked == "class" and prefix:
        return 0, "attention of the class token"
    if asked == "mean":
        return None, "attention of the mean patch"
    if isinstance(asked, list) and len(asked) == 2 and all(isinstance(n, int) for n in asked):
        row, column = asked
        if 0 <= row < grid[0] and 0 <= column < grid[1]:
            return prefix + row * grid[1] + column, f"attention of patch {row}, {column}"
    options = f"mean or [row, column] in a grid of {grid[0]}x{grid[1]} patches, counted from 0"
    raise ConfigError(f"query={asked} is none of {'class, ' if prefix else ''}{options}")


def _wrapped(rows: list[list[Image.Image]], heads: list[str], title: str) -> Iterator[Image.Image]:
    """Tables of at most `COLUMNS` maps; the title stands over the first."""
    for start in range(0, len(heads), COLUMNS):
        part = slice(start, start + COLUMNS)
        yield table([row[part] for row in rows], heads=heads[part], title="" if start else title)
