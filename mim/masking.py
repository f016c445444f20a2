"""Masks as pure functions of (grid, rng): which patches the network must predict.

Every function returns a bool array (N,), True = masked, row-major over the grid (h, w), with the same count for every
draw, so that shapes are static. `rng` is a numpy Generator keyed by the sample; keyword options are keys of a recipe.
"""

from __future__ import annotations

import math

import numpy as np

Mask = np.ndarray


def random(grid: tuple[int, int], rng: np.random.Generator, *, ratio: float = 0.75) -> Mask:
    """Mask a uniformly drawn set of patches (MAE, arXiv 2111.06377, section 3): int(N * (1 - ratio)) stay visible."""
    n = grid[0] * grid[1]
    num_masked = n - int(n * (1 - _checked(ratio)))
    mask = np.zeros(n, dtype=bool)
    mask[np.argsort(rng.random(n), kind="stable")[:num_masked]] = True
    return mask


def block(
    grid: tuple[int, int],
    rng: np.random.Generator,
    *,
    ratio: float = 0.4,
    count: int | None = None,
    min_patches: int = 16,
    min_aspect: float = 0.3,
) -> Mask:
    """Mask rectangles until exactly the asked count is reached (BEiT, arXiv 2106.08254, algorithm 1).

    `count` patches, or int(ratio * N). A block's area is uniform between `min_patches` and what remains, its aspect
    ratio log-uniform in [min_aspect, 1 / min_aspect]. BEiT v1 stops early when ten tries fail, so its count varies;
    here, as in BEiT v2, the remainder is drawn from the unmasked patches one by one.
    """
    h, w = grid
    target = int(_checked(ratio) * h * w) if count is None else count
    if not 0 < target < h * w:
        raise ValueError(
            f"mask: {target} of {h * w} patches cannot be masked; at least one must be masked and one visible"
        )
    if min_patches < 1:
        raise ValueError(f"mask.min_patches={min_patches} must be at least 1")
    if not 0 < min_aspect <= 1:
        raise ValueError(f"mask.min_aspect={min_aspect} must be above 0 and at most 1")
    mask = np.zeros((h, w), dtype=bool)
    masked = 0
    while masked < target:
        added = _add_block(mask, rng, target - masked, min_patches, min_aspect)
        if not added:
            break
        masked += added
    flat = mask.reshape(-1)
    if masked < target:
        visible = np.flatnonzero(~flat)
        flat[visible[np.argsort(rng.random(len(visible)), kind="stable")[: target - masked]]] = True
    return flat


def cells(grid: tuple[int, int], rng: np.random.Generator, *, ratio: float = 0.6, cell: int = 1) -> Mask:
    """Mask ceil(ratio * n) of the n squares of `cell` x `cell` patches (SimMIM, arXiv 2111.09886, section 3.2).

    SimMIM's unit of 32 pixels is cell=2 for patches of 16, and cell=1 for an encoder whose output has that stride.
    """
    h, w = grid
    if cell < 1 or h % cell or w % cell:
        raise ValueError(f"mask.cell={cell} does not divide the grid of {h}x{w} patches")
    coarse = h // cell, w // cell
    n = coarse[0] * coarse[1]
    num_masked = math.ceil(round(_checked(ratio) * n, 6))  # rounded: 0.55 * 100 is 55.00000000000001
    if num_masked == n:
        raise ValueError(f"mask.ratio={ratio} masks all {n} cells of {cell}x{cell} patches; one must stay visible")
    mask = np.zeros(n, dtype=bool)
    mask[np.argsort(rng.random(n), kind="stable")[:num_masked]] = True
    return mask.reshape(coarse).repeat(cell, axis=0).repeat(cell, axis=1).reshape(-1)


def _add_block(mask: Mask, rng: np.random.Generator, remaining: int, min_patches: int, min_aspect: float) -> int:
    """Mask one rectangle that adds between 1 and `remaining` patches; 0 when ten tries fail."""
    h, w = mask.shape
    bound = math.log(min_aspect)
    for _ in range(10):
        area = rng.uniform(*sorted((min_patches, remaining)))  # also where fewer remain, as published
        aspect = math.exp(rng.uniform(bound, -bound))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height < h and 0 < width < w):
            continue
        top, left = rng.integers(0, h - height + 1), rng.integers(0, w - width + 1)
        region = mask[top : top + height, left : left + width]
        added = region.size - int(np.count_nonzero(region))
        if 0 < added <= remaining:
            region[:] = True
            return added
    return 0


def _checked(ratio: float) -> float:
    if not 0 < ratio < 1:
        raise ValueError(f"mask.ratio={ratio} must lie between 0 and 1")
    return ratio
