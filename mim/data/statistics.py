"""Pixel statistics of a dataset, gathered image by image: mean and deviation per channel, and the range of floats.

Sums over 8 and 16 bits are Python integers, so they are exact; products of channels are summed too, which gives the
deviation of gray made from colour. Floats are counted in 2^20 bins of the number line (12 bits of a significand): from
the counts come the percentiles that their range defaults to, and mean and deviation as they are after clamping to it.
Either way no order of the images or shards can change a digit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mim.contracts import DataError
from mim.data.decode import LUMA
from mim.data.formats import DTYPES

CHUNK = 1 << 20  # pixels: sums of squares of 16 bits stay exact in float64
BIN_BITS = 20  # of the ordered bit pattern of a float32
PERCENTILES = (0.1, 99.9)  # of float pixels, what `data.range` defaults to


@dataclass
class Moments:
    """Sums over the pixels of images with one number of channels and one type."""

    num_pixels: int = 0
    sums: Any = 0  # (C,) Python integers: of values
    products: Any = 0  # (C, C) Python integers: of values of two channels
    bins: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # of floats, per channel: numbers, counts

    def add(self, pixels: np.ndarray) -> None:
        """Add an image (C, H, W)."""
        flat = np.moveaxis(pixels, 0, -1).reshape(-1, len(pixels))  # (H * W, C), as it lies in memory
        self.num_pixels += len(flat)
        if pixels.dtype.kind == "f":
            self.bins = _merge(self.bins, [_count(_bin_of(channel)) for channel in flat.T])
            return
        for start in range(0, len(flat), CHUNK):
            part = torch.from_numpy(
                flat[start : start + CHUNK].astype(np.float64)
            )  # NumPy's product takes twice as long
            self.sums = self.sums + _integers(part.new_ones(len(part)) @ part)
            self.products = self.products + _integers(part.T @ part)

    def merge(self, other: Moments) -> None:
        """Add the sums of others."""
        self.num_pixels += other.num_pixels
        self.sums = self.sums + other.sums
        self.products = self.products + other.products
        self.bins = _merge(self.bins, other.bins)

    def scaled(self, factor: int) -> Moments:
        """The sums of the same integer pixels times a factor."""
        return Moments(self.num_pixels, self.sums * factor, self.products * factor**2)

    def repeated(self, channels: int) -> Moments:
        """The sums of gray pixels repeated in several channels."""
        if self.bins:
            return Moments(self.num_pixels, bins=self.bins * channels)
        products = np.full((channels, channels), self.products[0, 0])
        return Moments(self.num_pixels, np.repeat(self.sums, channels), products)


class Statistics:
    """What is known of all pixels so far. Cheap to send between processes."""

    def __init__(self) -> None:
        self.kinds: dict[tuple[str, int], Moments] = {}  # (type, channels)

    def add(self, pixels: np.ndarray) -> None:
        """Add an image (C, H, W) as it was decoded: uint8, uint16 or float32."""
        self.kinds.setdefault((pixels.dtype.name, len(pixels)), Moments()).add(pixels)

    @staticmethod
    def summary(parts: Iterable[Statistics]) -> dict[str, Any]:
        """What the lock says of the pixels of all parts.

        dtype: that of the deepest image. range: per channel, the raw values that become 0 and 1. mean, std: per
        channel, of pixels so mapped. gray: mean and std of integer colour read as gray, absent otherwise.
        Raises DataError when the images do not go together.
        """
        kinds: dict[tuple[str, int], Moments] = {}
        for part in parts:
            for kind, moments in part.kinds.items():
                kinds.setdefault(kind, Moments()).merge(moments)
        dtype, channels = _common(kinds)
        total = Moments()
        for (found, count), moments in sorted(kinds.items()):
            moments = moments.repeated(channels) if count != channels else moments
            total.merge(moments.scaled(257) if found != dtype else moments)
        measure = _measure_floats if dtype == "float32" else _measure_integers
        return {"dtype": dtype, **measure(total, DTYPES[dtype])}


def _measure_integers(total: Moments, white: int) -> dict[str, Any]:
    """Range, mean and deviation of pixels from 0 to `white`."""
    n, outer = total.num_pixels, np.outer(total.sums, total.sums)
    mean = np.array([float(value / (n * white)) for value in total.sums])
    scale = (n * white) ** 2
    pairs = zip((n * total.products).ravel(), outer.ravel(), strict=True)  # the difference of integers is exact
    covariance = np.array([(product - square) / scale for product, square in pairs]).reshape(outer.shape)
    found: dict[str, Any] = {
        "range": [[0, white]] * len(mean),
        "mean": mean.round(6).tolist(),
        "std": np.sqrt(covariance.diagonal()).round(6).tolist(),
    }
    if len(mean) == 3:
        weights = np.array(LUMA)
        deviation = float(np.sqrt(max(0.0, weights @ covariance @ weights)))
        found["gray"] = {"mean": round(float(weights @ mean), 6), "std": round(deviation, 6)}
    return found


def _measure_floats(total: Moments, _white: int) -> dict[str, Any]:
    """Range by percentiles, mean and deviation after clamping to it."""
    ranges, means, deviations = [], [], []
    for bins, counts in total.bins:
        low, high = _percentiles(bins, counts)
        middle = (_value_of(bins).astype(np.float64) + _value_of(bins + 1)) / 2
        unit = ((middle - low) / (high - low)).clip(0, 1)
        mean = float(unit @ counts / total.num_pixels)
        ranges.append([low, high])
        means.append(round(mean, 6))
        deviations.append(round(float(np.sqrt((unit - mean) ** 2 @ counts / total.num_pixels)), 6))
    return {"range": ranges, "mean": means, "std": deviations}


def _integers(values: Tensor) -> np.ndarray:
    """Whole float64 values as Python integers, which do not overflow."""
    return np.array([int(value) for value in values.flatten().tolist()], dtype=object).reshape(values.shape)


def _common(kinds: dict[tuple[str, int], Moments]) -> tuple[str, int]:
    """The type and number of channels that all images can be read in."""
    dtypes, counts = {kind[0] for kind in kinds}, {kind[1] for kind in kinds}
    if len(counts - {1}) > 1 or (1 in counts and counts - {1, 3}):
        numbers = ", ".join(map(str, sorted(counts)))
        raise DataError(f"the images have {numbers} channels; a dataset has one number of them, or 1 and 3")
    if "float32" in dtypes and len(dtypes) > 1:
        raise DataError(f"some images are float32 and others {min(dtypes - {'float32'})}; make a dataset of each")
    return max(dtypes, key=list(DTYPES).index), max(counts)


def _count(bins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different bins in order, and how often each occurs."""
    lowest = bins.min()
    counts = np.bincount(bins - lowest)
    found = np.flatnonzero(counts)
    return (found + lowest).astype(np.uint32), counts[found]


def _bin_of(values: np.ndarray) -> np.ndarray:
    """Number of the bin of float32 values, increasing with the value."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return (ordered >> np.uint32(32 - BIN_BITS)).astype(np.uint32)


def _value_of(bins: np.ndarray) -> np.ndarray:
    """The lowest value of a bin."""
    ordered = bins.astype(np.uint32) << np.uint32(32 - BIN_BITS)
    return np.where(ordered >> 31, ordered & np.uint32((1 << 31) - 1), ~ordered).astype(np.uint32).view(np.float32)


def _merge(
    left: list[tuple[np.ndarray, np.ndarray]], right: list[tuple[np.ndarray, np.ndarray]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Add the counts of bins, channel by channel."""
    if not left or not right:
        return left or right
    merged = []
    for (bins_a, counts_a), (bins_b, counts_b) in zip(left, right, strict=True):
        bins, place = np.unique(np.concatenate([bins_a, bins_b]), return_inverse=True)
        counts = np.zeros(len(bins), dtype=np.int64)
        np.add.at(counts, place, np.concatenate([counts_a, counts_b]))
        merged.append((bins, counts))
    return merged


def _percentiles(bins: np.ndarray, counts: np.ndarray) -> list[float]:
    """The values below which PERCENTILES of the pixels lie, to the width of a bin; never equal."""
    share = counts.cumsum() / counts.sum() * 100
    low, high = (float(_value_of(bins[np.searchsorted(share, p)][None])[0]) for p in PERCENTILES)
    return [low, high] if high > low else [low, low + max(abs(low), 1.0)]
