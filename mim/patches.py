"""Images <-> patches, masks <-> token ids, and fixed 2-D positions.

A patch vector runs over (row, column, channel), as in MAE (He et al. 2022, arXiv 2111.06377), so that weights of
prediction heads can be exchanged with the published ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images (B, C, H, W) into row-major patches (B, N, P) with P = patch_size**2 * C."""
    b, c, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"image {height}x{width} does not divide into patches of {patch_size}x{patch_size} pixels")
    h, w = height // patch_size, width // patch_size
    x = images.reshape(b, c, h, patch_size, w, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, h * w, -1)  # (B, N, P)


def embed(patches: Tensor, convolution: nn.Conv2d) -> Tensor:
    """What a convolution whose kernel is its stride makes of patches (B, K, P), by one matrix product: (B, K, D).

    The values are the convolution's up to rounding; patches that are left out cost nothing.
    """
    weight = convolution.weight.permute(0, 2, 3, 1).flatten(1)  # (D, P) in the order of `patchify`
    return F.linear(patches, weight, convolution.bias)


def unpatchify(patches: Tensor, grid: tuple[int, int], channels: int) -> Tensor:
    """Inverse of `patchify`: (B, N, P) on a grid (h, w) -> (B, C, H, W)."""
    b, n, p = patches.shape
    h, w = grid
    if n != h * w:
        raise ValueError(f"{n} patches do not fill a grid of {h}x{w}")
    size = round((p // channels) ** 0.5)
    x = patches.reshape(b, h, w, size, size, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, channels, h * size, w * size)  # (B, C, H, W)


def grid_of(image_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Return the grid (h, w) of patches for an image size (H, W) in pixels, which must divide."""
    height, width = image_size
    if height % patch_size or width % patch_size:
        raise ValueError(f"image size {height}x{width} does not divide by the patch size {patch_size}")
    return height // patch_size, width // patch_size


def replace(tokens: Tensor, mask: Tensor, mask_token: Tensor | None) -> Tensor:
    """Put the mask token (1, 1, D) in place of tokens (B, N, D) or (B, h, w, D) where the mask (B, N) is True."""
    assert mask_token is not None, "mask needs mask_token"
    return torch.where(mask.view(tokens.shape[:-1]).unsqueeze(-1), mask_token.to(tokens.dtype), tokens)


def blank(images: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Zero the pixels of images (B, C, H, W) in patches of the grid (h, w) where the mask (B, N) is True."""
    b, _, height, width = images.shape
    h, w = grid
    hidden = mask.view(b, 1, h, 1, w, 1).expand(-1, -1, -1, height // h, -1, width // w)
    return images.masked_fill(hidden.reshape(b, 1, height, width), 0)


def mask_to_ids(mask: Tensor, num_masked: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split rows of a mask (B, N) into ids_keep (B, N-M) and ids_mask (B, M), both ascending, and ids_restore (B, N).

    `gather(cat([kept, masked]), ids_restore)` puts tokens back in grid order. The stable sort makes the ids a pure
    function of the mask on every device.
    """
    ids_shuffle = torch.argsort(mask.to(torch.uint8), dim=1, stable=True)  # (B, N) visible first
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    num_visible = mask.shape[1] - num_masked
    return ids_shuffle[:, :num_visible], ids_shuffle[:, num_visible:], ids_restore


def ids_to_mask(ids_keep: Tensor, num_patches: int) -> Tensor:
    """The mask (B, N) that hides all patches but those of ids_keep (B, K)."""
    hidden = torch.ones(len(ids_keep), num_patches, dtype=torch.bool, device=ids_keep.device)
    return hidden.scatter_(1, ids_keep, False)


def gather(tokens: Tensor, ids: Tensor) -> Tensor:
    """Pick tokens (B, N, D) by ids (B, K) -> (B, K, D)."""
    return torch.gather(tokens, 1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed 2-D sine-cosine positions (N, D) as in MAE: the first half of D encodes the column, the second the row."""
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width that divides by 4, got {width}")
    omega = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    parts = []
    for axis in (columns, rows):
        angle = axis.reshape(-1, 1) * omega  # (N, D/4)
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=1).float()
