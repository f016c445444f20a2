"""Released tensors in the shapes that an encoder wants, all by timm's functions.

Positions are resampled bicubically, so that the patch size stays and there are more patches (Dosovitskiy et al. 2021,
arXiv 2010.11929, section 3.2), tables of relative positions on a geometric grid with the three extra rows kept, patch
embeddings by the pseudo-inverse of the resize (FlexiViT: Beyer et al. 2023, arXiv 2212.08013, section 3.4), and input
channels by timm's rule: the sum over colours for one channel, else colours repeated and scaled by 3 / C.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from timm.layers import (
    resample_abs_pos_embed,
    resample_abs_pos_embed_nhwc,
    resample_patch_embed,
    resize_rel_pos_bias_table,
)
from timm.models import adapt_input_conv
from torch import Tensor, nn

from mim.config import ConfigError

Tensors = dict[str, Tensor]
TABLE = "relative_position_bias_table"
POSITIONS = re.compile(r"^pos_embed(_\d+)?$")  # also of CrossViT's two branches, of Hiera and VOLO


def shape_of(tensor: Tensor) -> str:
    """A shape for people: 1x197x768."""
    return "x".join(map(str, tensor.shape)) or "scalar"


def fit(name: str, tensor: Tensor, like: Tensor, backbone: nn.Module) -> tuple[Tensor, list[str]] | None:
    """Bring a tensor to the shape of the module's; returns it and how, or None where no rule leads there."""
    if tensor.shape == like.shape:
        return tensor, []
    if name == "patch_embed.proj.weight" and tensor.ndim == like.ndim == 4 and len(tensor) == len(like):
        return patch_embedding(tensor, like)
    if name.endswith(TABLE) and tensor.shape[1] == like.shape[1]:
        owner = backbone.get_submodule(name.rpartition(".")[0])
        window: Any = owner.window_size
        return resize_rel_pos_bias_table(tensor.float(), window, tuple(like.shape)), ["table of relative positions"]
    if POSITIONS.search(name) and tensor.ndim == like.ndim and tensor.shape[-1] == like.shape[-1]:
        return position_map(tensor.float(), like)
    return None


def position_map(table: Tensor, like: Tensor) -> tuple[Tensor, list[str]] | None:
    """Positions that a family keeps in a way of its own: (1, h, w, D), or (1, R + N, D) of a square grid."""
    if table.ndim == 4:
        sizes = tuple(table.shape[1:3]), tuple(like.shape[1:3])
        resized = resample_abs_pos_embed_nhwc(table, new_size=list(sizes[1]))
        return resized, [told(*sizes)]
    for prefix in (0, 1):
        counts = [shape[1] - prefix for shape in (table.shape, like.shape)]
        sides = [round(max(count, 0) ** 0.5) for count in counts]
        if [side * side for side in sides] == counts:
            sizes = (sides[0], sides[0]), (sides[1], sides[1])
            options: Any = {"new_size": list(sizes[1]), "old_size": list(sizes[0]), "num_prefix_tokens": prefix}
            return resample_abs_pos_embed(table, **options), [told(*sizes)]
    return None


def told(before: tuple[int, ...], after: tuple[int, ...]) -> str:
    """What became of a grid of positions."""
    return f"positions {before[0]}x{before[1]} -> {after[0]}x{after[1]}, bicubic"


def patch_embedding(tensor: Tensor, like: Tensor) -> tuple[Tensor, list[str]] | None:
    """(D, C, p, p) -> (D, C', p', p')."""
    steps, channels = [], like.shape[1]
    if tensor.shape[1] != channels:
        if tensor.shape[1] != 3:
            return None
        tensor = adapt_input_conv(channels, tensor)
        steps.append("channels summed" if channels == 1 else f"channels repeated and scaled by 3/{channels}")
    if tensor.shape[-2:] != like.shape[-2:]:
        tensor = resample_patch_embed(tensor.float(), list(like.shape[-2:]))
        steps.append("patch embedding by pseudo-inverse")
    return tensor, steps


def fit_positions(tensors: Tensors, backbone: Any, source_grid: tuple[int, int] | None) -> tuple[Tensors, list[str]]:
    """Bring `pos_embed` to the module's grid and prefix. Positions of prefix tokens that the module keeps elsewhere are
    added to these tokens, which changes no value that it computes.
    """
    like: Tensor = backbone.pos_embed
    table, steps, changed = tensors["pos_embed"].float(), [], dict(tensors)
    if table.shape[-1] != like.shape[-1]:
        return tensors, []
    grid = tuple(backbone.patch_embed.grid_size)
    prefix, source_grid = split_grid(table.shape[1], source_grid, num_registers(tensors))
    wanted = like.shape[1] - grid[0] * grid[1]
    if prefix != wanted:
        steps.append("positions of prefix tokens added to them")
        tokens = [name for name in ("cls_token", "reg_token") if name in tensors]
        own, table = table[:, :prefix], table[:, prefix:]  # (1, R, D), (1, N, D)
        for name in tokens:
            count = min(tensors[name].shape[1], own.shape[1])
            if count:
                token = tensors[name].float().clone()
                token[:, :count] += own[:, :count]
                changed[name], own = token, own[:, count:]
        table = torch.cat([table.new_zeros(1, wanted, table.shape[-1]), table], dim=1)
    if source_grid != grid:
        table = resample_abs_pos_embed(table, new_size=list(grid), old_size=list(source_grid), num_prefix_tokens=wanted)
        steps.append(told(source_grid, grid))
    changed["pos_embed"] = table
    return changed, steps


def num_registers(tensors: Tensors) -> int:
    return tensors["reg_token"].shape[1] if "reg_token" in tensors else 0


def split_grid(count: int, grid: tuple[int, int] | None, registers: int) -> tuple[int, tuple[int, int]]:
    """How many positions of a table belong to prefix tokens, and the grid (h, w) of the others; square if unknown."""
    for prefix in (1, 0, 1 + registers, 2):  # class token, none, with registers, with a distillation token
        side = round(max(count - prefix, 0) ** 0.5)
        h, w = grid or (side, side)
        if h * w + prefix == count:
            return prefix, (h, w)
    raise ConfigError(f"the file's table of {count} positions is no square grid, with or without a class token")
