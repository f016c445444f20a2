"""Picture: what an encoder knows of the places of patches before it has seen an image.

A table of positions: for every patch the cosine similarity of its vector with those of all patches, each tile around
its own place (Dosovitskiy et al. 2021, arXiv 2010.11929, figure 7, centre). A bias of attention by relative position
(BEiT): what each head adds for every offset of the patch looked at, blue below and red above zero, its own place in the
middle. Rotary positions are fixed angles and no table: there is nothing to show.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mim.config import ConfigError
from mim.contracts import LoadedRun, NamedValues
from mim.pictures.drawing import SIGNED, heat, picture, table

SPECIAL = 3  # last entries of BEiT's table: class token to patches, patches to it, and to itself


@dataclass
class Config:
    tile: int = 32  # pixels of the similarities of one patch
    bias: int = 64  # pixels of the bias of one head


def run(loaded: LoadedRun, cfg: Config) -> NamedValues:
    """Yield the picture of the tables that the encoder has: `positions`, `position_bias`, or both."""
    if loaded.encoder is None:
        raise ConfigError(f"{loaded.path} trains a tokenizer, which has no positions; take a run of an encoder")
    if min(cfg.tile, cfg.bias) < 1:
        raise ConfigError(f"tile={cfg.tile} and bias={cfg.bias} must be at least 1 pixel")
    backbone = next((child for child in loaded.encoder.children() if hasattr(child, "patch_embed")), None)
    absolute, biases = _absolute(backbone), _biases(backbone)
    if absolute is None and not biases:
        rotary = getattr(backbone, "rope", None) is not None
        what = "rotary positions alone, which are angles and no table" if rotary else "no table of positions"
        raise ConfigError(f"{loaded.path} has {what}; there is no picture of them")
    if absolute is not None:
        yield "positions", _similarities(*absolute, cfg.tile)
    if biases:
        yield "position_bias", _bias_maps(biases, cfg.bias)


def similarities(vectors: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cosines (h, w, h, w) of the vectors (N, D) of a grid with each other."""
    directions = F.normalize(vectors.detach().float(), dim=-1)
    return (directions @ directions.T).unflatten(1, grid).unflatten(0, grid)


def _absolute(backbone: Any) -> tuple[Tensor, tuple[int, int]] | None:
    """The vectors (N, D) of the patches of a grid, without those of prefix tokens, which come first; None: no table."""
    values, grid = (
        getattr(backbone, "pos_embed", None),
        getattr(getattr(backbone, "patch_embed", None), "grid_size", None),
    )
    if not isinstance(values, Tensor) or values.ndim != 3 or grid is None or values.shape[1] < grid[0] * grid[1]:
        return None
    return values[0, -grid[0] * grid[1] :], (grid[0], grid[1])


def _similarities(vectors: Tensor, grid: tuple[int, int], tile: int) -> Image.Image:
    """The tiles of all patches."""
    h, w = grid
    maps = similarities(vectors, grid).cpu()
    low = float(maps.min())
    rows = [[picture(heat(maps[i, j] - low, top=1 - low), tile) for j in range(w)] for i in range(h)]
    return table(rows, title=f"cosine similarity of {h}x{w} positions, from {low:.2f} (dark) to 1")


def _biases(backbone: Any) -> dict[str, tuple[Tensor, tuple[int, int]]]:
    """Tables (offsets, heads) of relative positions with their grids, by who has them."""
    owners = {"all blocks": getattr(backbone, "rel_pos_bias", None)}
    owners |= {f"block {i}": getattr(block, "attn", None) for i, block in enumerate(getattr(backbone, "blocks", []), 1)}
    found = {}
    for name, owner in owners.items():
        values = getattr(owner, "relative_position_bias_table", None)
        grid = getattr(owner, "window_size", None)
        if not isinstance(values, Tensor) or grid is None:
            continue
        if len(values) == (2 * grid[0] - 1) * (2 * grid[1] - 1) + SPECIAL:  # Swin's has no class token
            found[name] = values, tuple(grid)
    return found


def _bias_maps(biases: dict[str, tuple[Tensor, tuple[int, int]]], height: int) -> Image.Image:
    """A row for each table, a column for each head, at one contrast."""
    top = max(float(values[:-SPECIAL].abs().max()) for values, _ in biases.values())
    rows = []
    for values, (h, w) in biases.values():
        # the table holds the place of the query minus that of the key: turned around, it is what lies around the query
        maps = values[:-SPECIAL].detach().T.unflatten(1, (2 * h - 1, 2 * w - 1)).flip(1, 2)  # (heads, 2h - 1, 2w - 1)
        rows.append([picture(heat(one, SIGNED, top=top), height) for one in maps])
    heads = [f"head {number}" for number in range(1, len(rows[0]) + 1)]
    return table(rows, heads=heads, title=f"bias by offset, {', '.join(biases)}; {top:.3g} red, {-top:.3g} blue")
