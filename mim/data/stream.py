"""Order + shards + decode + view + mask -> batches. The stream receives the view and the mask as functions.

A map-style dataset indexed by micro-batches, in a DataLoader that keeps their order: the number of workers cannot
change a batch. Every draw of a row is named by (purpose, seed, epoch, sample, draw), so neither can ranks,
micro-batches or the position from which a run resumes. Images leave as uint8 and are normalised on the device: a
quarter of the transport.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Union

import numpy as np
import torch
from torch import Tensor
from torch.utils import data as torch_data

from mim.config import ConfigError
from mim.contracts import Batch, DataError
from mim.data.augment import Image, Sizes
from mim.data.decode import BadImage, Encoded, open_image
from mim.data.formats import DTYPES
from mim.data.jitter import jitter_
from mim.data.order import MicroBatch, Order, Plan, Slots, key64, permutation, rng
from mim.data.shards import Dataset, Sample

View = Callable[[Image, np.random.Generator, Sizes], list[Tensor]]
Mask = Callable[[np.random.Generator], "np.ndarray | Tensor"]  # -> (N,) bool

EVALUATION = -1  # the epoch in the names of evaluation's draws: no epoch of training
PREFETCH = 4  # micro-batches per worker
VIEWS = ("images", "tokenizer_images")
FINGERPRINT_MODULUS = 2**63


@dataclass
class Config:
    """Section `data` of a recipe."""

    path: str  # dataset folder, or a folder of images (made into shards in the cache)
    val_path: str | None = None  # the same, held out
    labels_from_folders: bool = False  # the first folder below `path` is the class
    val_ratio: float = 0.0  # share of the images held out when `path` is a folder of images
    image_size: Union[int, list[int]] = 224  # noqa: UP007  pixels, or [h, w]; OmegaConf reads Union, not |
    channels: int = 3  # any number; 1 and 3 are converted into each other
    range: list[Any] | None = None  # raw [low, high] that become 0 and 1, or one pair per channel; null: the dataset's
    jitter: float = 0.0  # of brightness, contrast and saturation in training, on the device (BEiT: 0.4)
    view: dict[str, Any] = field(default_factory=lambda: {"name": "crop"})  # function of mim/data/augment.py
    eval_view: dict[str, Any] = field(default_factory=lambda: {"name": "center"})  # the same, for evaluation
    seed: int = 0  # of order, crops and masks; also of the held-out split
    lanes: int | None = None  # L of mim/data/order.py; default 1 below 10^7 samples, else 64
    window: int | None = None  # W, samples; default all below 10^7 samples, else 2048
    repeats: int = 1  # draws of a sample in a row, decoded once (repeated augmentation, arXiv 1901.09335)


@dataclass(frozen=True)
class Renderer:
    """Turns located rows into a batch."""

    dataset: Dataset
    view: View
    sizes: Sizes  # of `images`, and of `tokenizer_images` if there are two
    mask: Mask | None
    channels: int
    seed: int
    jitter: float = 0.0  # strength; 0 leaves colours alone

    def __post_init__(self) -> None:
        if not 1 <= len(self.sizes) <= len(VIEWS):
            raise ValueError(f"{len(self.sizes)} sizes; give one, or two with the tokenizer's")

    def render(self, slots: Slots, num_real: int, size: int) -> Batch:
        """Render the rows of `slots` into a batch of `size` rows, of which the first `num_real` count.

        Rows beyond those of `slots` copy the first row with weight 0.
        """
        batch: Batch = {"keys": []}
        for name, (h, w) in zip(VIEWS, self.sizes):  # noqa: B905  the second size is optional
            # Rows are (H, W, C) in memory, as the decoder leaves them: transposing would cost more than copying.
            rows = torch.empty((size, h, w, self.channels), dtype=getattr(torch, self.dataset.dtype))
            batch[name] = rows.permute(0, 3, 1, 2)  # (B, C, H, W)
        batch["range"] = value_range(self.dataset, self.channels)
        if self.jitter:
            batch["jitter"] = self.jitter
        batch["weight"] = (torch.arange(size) < num_real).float()
        batch["noise"] = torch.empty(size, dtype=torch.int64)
        if self.dataset.classes is not None:
            batch["labels"] = torch.full((size,), -1, dtype=torch.int64)
        self._fill(batch, slots)
        filled = len(slots.sample)
        for value in batch.values():
            if isinstance(value, Tensor) and value is not batch["weight"]:
                value[filled:] = value[0]
        batch["keys"] += batch["keys"][:1] * (size - filled)
        return batch

    def _fill(self, batch: Batch, slots: Slots) -> None:
        """Write each row of `slots` into the batch; masks are added to it."""
        masks: list[Tensor] = []
        sample, image, loaded = None, None, None  # `repeats` draws of a sample follow each other: decode once
        following = [*slots.sample[1:].tolist(), None]
        for row, (epoch, shard, index, number, draw) in enumerate(zip(*(a.tolist() for a in slots), strict=True)):
            name = (self.seed, epoch, number, draw)
            if loaded != number:
                sample = self.dataset.read(shard, index)
            assert sample is not None
            try:
                if loaded != number:
                    image, loaded = self._open(sample, several=following[row] == number), number
                assert image is not None
                views = self.view(image, rng("view", *name), self.sizes)
            except BadImage as error:
                raise DataError(f"{sample.key}: {error}; make the shards again, which leaves it out") from error
            for field_, view in zip(VIEWS, views):  # noqa: B905  the second size is optional
                batch[field_][row] = view
            if self.mask is not None:
                masks.append(torch.as_tensor(self.mask(rng("mask", *name)), dtype=torch.bool))
            batch["noise"][row] = key64("noise", *name)
            if sample.label is not None:
                batch["labels"][row] = sample.label
            batch["keys"].append(sample.key)
        if masks:
            counts = {int(mask.sum()) for mask in masks}
            if len(counts) > 1:
                raise ValueError(f"the mask function masks {min(counts)} to {max(counts)} patches; one count is needed")
            batch["num_masked"] = counts.pop()
            batch["mask"] = torch.empty((len(batch["weight"]), len(masks[0])), dtype=torch.bool)  # (B, N)
            batch["mask"][: len(masks)] = torch.stack(masks)

    def _open(self, sample: Sample, *, several: bool) -> Image:
        """The image of a sample, decoded whole when several draws of it follow."""
        image = open_image(sample.image, self.channels, self.dataset.dtype)
        return image.whole() if several and isinstance(image, Encoded) else image


class Stream(torch_data.Dataset[Batch]):
    """The endless training stream, indexed by micro-batches."""

    def __init__(self, order: Order, renderer: Renderer):
        self.order = order
        self.renderer = renderer

    def __getitem__(self, micro: MicroBatch) -> Batch:
        num_real = len(micro.positions)
        slots = self.order.locate(micro.positions if num_real else [micro.filler])
        batch = self.renderer.render(slots, num_real, micro.size)
        rows = zip(micro.positions, slots.sample, slots.epoch, slots.draw, strict=False)  # a filler has no position
        batch["position"] = micro.position
        batch["epoch"] = int(slots.epoch[0])
        batch["fingerprint"] = sum(key64("row", *row) for row in rows) % FINGERPRINT_MODULUS
        return batch


class Evaluation(torch_data.Dataset[Batch]):
    """Samples by their index in the order of the lock."""

    def __init__(self, renderer: Renderer):
        self.renderer = renderer
        self._ends = np.cumsum(renderer.dataset.counts)

    def __getitem__(self, samples: np.ndarray) -> Batch:
        shard = np.searchsorted(self._ends, samples, side="right")
        row = samples - (self._ends[shard] - self.renderer.dataset.counts[shard])
        epoch = np.full_like(samples, EVALUATION)
        return self.renderer.render(
            Slots(epoch, shard, row, samples, np.zeros_like(samples)), len(samples), len(samples)
        )


def loader(
    dataset: Dataset,
    *,
    order: Order,
    view: View,
    sizes: Sizes,
    mask: Mask | None = None,
    channels: int = 3,
    jitter: float = 0.0,
    batch_size: int,  # global
    rank: int = 0,
    world: int = 1,
    micro_batches: int = 1,
    position: int = 0,  # global positions consumed before the first step
    num_steps: int,
    workers: int = 0,
    pin_memory: bool = False,
    timeout: float = 300,  # seconds to wait for a worker before giving up; 0 waits for ever
) -> torch_data.DataLoader[Batch]:
    """Return the micro-batches of one rank: `num_steps * micro_batches` of them, in order."""
    plan = Plan(order.repeats, batch_size, rank, world, micro_batches, position, num_steps)
    stream = Stream(order, Renderer(dataset, view, sizes, mask, channels, order.seed, jitter))
    return _in_order(stream, plan, workers, pin_memory, timeout)


def evaluate(
    dataset: Dataset,
    *,
    view: View,
    sizes: Sizes,
    batch_size: int,
    mask: Mask | None = None,
    channels: int = 3,
    seed: int = 0,
    limit: int | None = None,
    workers: int = 0,
    pin_memory: bool = False,
    timeout: float = 300,
) -> torch_data.DataLoader[Batch]:
    """Return every sample once, in the order of the lock; with `limit` a random subset of it, the same each time.

    The last batch may be shorter. Draws are named by the sample alone, so two evaluations see the same pixels.
    """
    samples = np.arange(len(dataset))
    if limit is not None and limit < len(dataset):
        samples = np.sort(permutation(len(dataset), "evaluate", seed)[:limit])
    chunks = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
    evaluation = Evaluation(Renderer(dataset, view, sizes, mask, channels, seed))
    return _in_order(evaluation, chunks, workers, pin_memory, timeout)


def value_range(dataset: Dataset, channels: int) -> list[list[float]]:
    """Raw values (low, high) that become 0 and 1, per channel as it is read."""
    if channels == len(dataset.range):
        return dataset.range
    if any(pair != dataset.range[0] for pair in dataset.range):
        raise ConfigError(
            f"data.range differs by channel, but data.channels={channels} mixes them; give one [low, high]"
        )
    return [dataset.range[0]] * channels


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch to the device, where its images become float32 in [0, 1].

    `range` maps them and `jitter` changes their colours; both are used up.
    """
    moved: Batch = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
    limits, strength = moved.pop("range"), moved.pop("jitter", 0.0)
    names = [name for name in VIEWS if name in moved]
    views = [_unit(moved[name], limits) for name in names]
    if strength:
        jitter_(views, moved["noise"], strength)
    moved.update(zip(names, views, strict=True))
    return moved


def _unit(raw: Tensor, limits: list[list[float]]) -> Tensor:
    """Raw pixels (B, C, H, W) -> float32 in [0, 1]; what lies outside the limits is clamped."""
    pixels = raw.to(memory_format=torch.contiguous_format, dtype=torch.float32)
    white = DTYPES[str(raw.dtype).removeprefix("torch.")]
    if not raw.is_floating_point() and all(list(pair) == [0, white] for pair in limits):
        return pixels.div_(white)  # in place: a second batch of fresh pages costs more than the conversion
    low, high = torch.tensor(limits, device=raw.device).T[:, :, None, None]  # (C, 1, 1) each
    return (pixels - low).div_(high - low).clamp_(0, 1)


def _in_order(
    source: torch_data.Dataset[Batch], indices: Iterable[Any], workers: int, pin_memory: bool, timeout: float
) -> torch_data.DataLoader[Batch]:
    """A DataLoader over prepared indices. Its workers run torch on one thread each, as torch sets them up."""
    return torch_data.DataLoader(
        source,
        batch_size=None,  # a batch is one item of `source`
        sampler=indices,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=pin_memory,
        timeout=timeout if workers else 0,
        worker_init_fn=ignore_ctrl_c,
        generator=torch.Generator(),  # its own: starting an epoch must not advance the model's random state
    )


def ignore_ctrl_c(_worker: int) -> None:
    """Let a worker go on after Ctrl-C, which a terminal sends to it too: the main process needs it until it has saved.

    SIGTERM needs no care: torch gives workers a handler of their own, which ends them at once.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
