"""Codes of held-out images, and what they are like: in use, stable, guessable, telling.

What the evaluation of codebooks measures and shows, apart from what a run predicts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mim import frozen_networks
from mim.contracts import Batch, LoadedRun
from mim.data import stream
from mim.data.jitter import jitter_
from mim.data.mixture import AnyDataset
from mim.probing.features import in_colour, sheet
from tokenizer.quantize import images_of, uniform_noise

JITTER = 0.4  # strength of BEiT's colour jitter
MAP_ROWS, GALLERY_ROWS, GALLERY_COLUMNS = 8, 16, 12  # of the pictures


def batches(
    loaded: LoadedRun,
    dataset: AnyDataset,
    frozen: dict[str, Any],
    *,
    batch_size: int,
    limit: int | None,
    device: torch.device,
) -> Iterator[Batch]:
    """Evaluation's views, with what the frozen networks write; the same pixels, masks and draws every time."""
    views = loaded.views
    for batch in stream.evaluate(
        dataset,
        view=views.evaluation,
        sizes=views.sizes,
        mask=views.mask,
        channels=views.data.channels,
        batch_size=batch_size,
        limit=limit,
    ):
        batch = stream.to_device(batch, device)
        frozen_networks.write_targets(frozen, batch)
        yield batch


def under_jitter(tokenizer: Any, batch: Batch) -> Tensor:
    """Share (B,) of the codes that stay when brightness, contrast and saturation change by up to 40 %; 3 channels."""
    changed = images_of(batch).clone()
    jitter_([changed], batch["noise"], JITTER)
    return (tokenizer.encode(changed) == batch["codes"]).float().mean(dim=1)  # (B,)


def under_shift(tokenizer: Any, batch: Batch, grid: tuple[int, int]) -> Tensor:
    """Share (B,) of the codes that stay when the image is cropped by one code at its top and left."""
    step = tokenizer.stride
    cropped = tokenizer.encode(images_of(batch)[..., step:, step:])  # (B, (h - 1) (w - 1))
    before = batch["codes"].unflatten(1, grid)[:, 1:, 1:].flatten(1)
    return (cropped == before).float().mean(dim=1)  # (B,)


def neighbours_differ(codes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Share (B,) of the codes (B, N) that differ from the one at their left: 1 - what copying would guess."""
    square = codes.unflatten(1, grid)  # (B, h, w)
    return (square[:, :, 1:] != square[:, :, :-1]).float().mean(dim=(1, 2))  # (B,)


def misfit(tokenizer: Any, batch: Batch, grid: tuple[int, int]) -> dict[str, Tensor]:
    """What decoding the codes loses: mean absolute error of pixels (B,), or keeps: cosine to the features (B,).

    Empty where the codes are of features and no teacher wrote any.
    """
    decoded = tokenizer.decode(batch["codes"], grid)
    if decoded.ndim == 4:
        return {"recon_mae": (decoded - images_of(batch)).abs().flatten(1).mean(dim=1)}
    if "targets" not in batch:
        return {}
    return {"teacher_cosine": tokenizer.teacher_cosine(decoded, batch["targets"])}


def histogram(codes: Tensor, num_codes: int) -> Tensor:
    """How often each code occurs in each image, as roots of shares: (B, N) -> (B, V) float32."""
    counts = torch.zeros(len(codes), num_codes, device=codes.device)
    counts.scatter_add_(1, codes, torch.ones_like(codes, dtype=counts.dtype))
    return (counts / codes.shape[1]).sqrt()  # roots tame what occurs everywhere (Hellinger)


def pictures(tokenizer: Any, batches: Iterator[Batch]) -> Iterator[tuple[str, Image.Image]]:
    """Yield "codes", images beside their codes as colours, and "patches", a row of patches for each most used code."""
    cells, codes, grid = [], [], (1, 1)
    for batch in batches:
        images = images_of(batch)
        grid = tokenizer.grid((images.shape[-2], images.shape[-1]))
        cells.append(images.cpu())
        codes.append(batch["codes"].cpu())
    images, ids = torch.cat(cells), torch.cat(codes)  # (n, C, H, W), (n, N)
    yield "codes", _code_map(images[:MAP_ROWS], ids[:MAP_ROWS], grid, tokenizer.num_codes)
    yield "patches", _gallery(images, ids, grid, tokenizer.num_codes)


def _code_map(images: Tensor, ids: Tensor, grid: tuple[int, int], num_codes: int) -> Image.Image:
    palette = uniform_noise(torch.arange(num_codes), (3,))  # (V, 3): the colour of a code never changes
    colours = palette[ids].transpose(1, 2).unflatten(2, grid)  # (n, 3, h, w)
    colours = F.interpolate(colours, images.shape[-2:], mode="nearest")
    return sheet(torch.stack([in_colour(images), colours], dim=1), height=96)


def _gallery(images: Tensor, ids: Tensor, grid: tuple[int, int], num_codes: int) -> Image.Image:
    """A row for each of the most frequent codes, with patches of different images first."""
    h, w = images.shape[-2] // grid[0], images.shape[-1] // grid[1]
    patches = in_colour(images).unfold(2, h, h).unfold(3, w, w)  # (n, 3, rows, columns, h, w)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)  # (n, N, 3, h, w)
    counts = torch.bincount(ids.flatten(), minlength=num_codes)
    rows = []
    for code in counts.argsort(descending=True)[: min(GALLERY_ROWS, int((counts > 0).sum()))]:
        image, place = (ids == code).nonzero(as_tuple=True)
        again = torch.cat([torch.zeros(1, dtype=torch.bool), image[1:] == image[:-1]])
        order = torch.argsort(again.long(), stable=True)[:GALLERY_COLUMNS]
        shown = patches[image[order], place[order]]  # (up to GALLERY_COLUMNS, 3, h, w)
        rows.append(F.pad(shown, (0,) * 7 + (GALLERY_COLUMNS - len(shown),), value=1.0))
    return sheet(torch.stack(rows), height=32)
