"""RandAugment (Cubuk et al. 2020, arXiv 1909.13719), timm's, on 8-bit images as tensors; keyed by a generator.

timm's operations are Pillow's and draw from the global generators of python and numpy. Here both are seeded from the
sample's own generator around the call and then put back, so that neither order nor worker changes an image.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor

from mim.config import ConfigError

INTERPOLATION = Pillow.Resampling.BICUBIC


def rand_augment(view: Tensor, seed: int, *, policy: str, fill: tuple[int, ...]) -> Tensor:
    """An image (C, h, w), uint8 of 1 or 3 channels, changed by the operations that the seed draws.

    policy: timm's notation, rand-m9-mstd0.5-inc1 for instance. fill: levels per channel where an image is moved away.
    """
    channels, height, width = view.shape
    if view.dtype != torch.uint8 or channels not in (1, 3):
        depth = str(view.dtype).removeprefix("torch.")
        raise ValueError(f"RandAugment takes 8-bit images of 1 or 3 channels, not {channels} of {depth}; use view crop")
    pixels = view.permute(1, 2, 0).contiguous().numpy()  # (h, w, C)
    picture = Pillow.fromarray(pixels if channels == 3 else pixels[:, :, 0])
    levels = fill if channels == 3 else (round(sum(fill) / len(fill)),)
    transform = transform_of(policy, levels, min(height, width))
    with seeded(seed):
        changed = np.array(transform(picture))  # (h, w, 3) or (h, w)
    return torch.from_numpy(changed.reshape(height, width, channels)).permute(2, 0, 1)  # (C, h, w)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of python and numpy while the block runs; then they are as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@functools.lru_cache(maxsize=16)
def transform_of(policy: str, fill: tuple[int, ...], size: int) -> Any:
    """timm's transform with the arguments of its training script; `size` is the shorter side. Raises ConfigError."""
    options = {
        "translate_const": int(size * 0.45),
        "img_mean": fill if len(fill) > 1 else fill[0],
        "interpolation": INTERPOLATION,
    }
    try:
        return rand_augment_transform(policy, options)
    except (AssertionError, ValueError) as error:
        raise ConfigError(
            f"data.view.policy={policy!r} is not a RandAugment of timm's, such as rand-m9-mstd0.5-inc1"
        ) from error
