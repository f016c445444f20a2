"""Order + shards + decode + view + mask -> batches. The stream receives the view and the mask as functions.

A map-style dataset indexed by micro-batches, in a DataLoader that keeps their order: the number of workers cannot
change a batch. Every draw of a row is named by (purpose, seed, epoch, sample, draw), so neither can ranks,
micro-batches or the position from which a run resumes. A sample that cannot be decoded is replaced by one that the
order names, and told in the batch. Images leave as uint8 and are normalised on the device: a
quarter of the transport.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Union

import numpy as np
import torch
from torch import Tensor
from torch.utils import data as torch_data

from mim.config import ConfigError
from mim.contracts import IGNORE, Batch, DataError
from mim.data.augment import Image, Sizes
from mim.data.decode import BadImage, Encoded, open_image
from mim.data.formats import DTYPES
from mim.data.jitter import jitter_, jitter_crops_
from mim.data.label_map import Pair, decode_label_map
from mim.data.mixture import AnyDataset, AnyOrder, bad_samples
from mim.data.order import FULL_SHUFFLE_BELOW, MicroBatch, Place, Plan, Slots, key64, permutation, rng
from mim.data.picks import keyed_picks
from mim.data.prefetch import Prefetcher
from mim.data.quarantine import Bad
from mim.data.shards import Sample, locate
from mim.data.signals import stay_until_told
from mim.data.stages import Clock
from mim.interruption import between_batches
from mim.log import say

Shows = list[Tensor] | dict[str, Tensor]  # a view of each size, or crops (V, C, h, w) by their field in the batch
View = Callable[[Any, np.random.Generator, Sizes], Shows]  # of an Image, or of a Pair with its label map
Mask = Callable[[np.random.Generator], "np.ndarray | Tensor"]  # -> (N,) bool
Codes = Callable[[int, int, int], np.ndarray]  # (sample, view, draw) -> (N,) what a tokenizer made of it before
Substitute = Callable[[int, int], Place]  # (row of the batch, attempt) -> the sample that takes its place

EVALUATION = -1  # the epoch in the names of evaluation's draws: no epoch of training
PREFETCH = 4  # micro-batches per worker
TIMEOUT = 300.0  # seconds to wait for a worker before giving up
ATTEMPTS = 8  # substitutes tried for a bad sample
VIEWS = ("images", "tokenizer_images")
CROPS = ("images", "local_images")
FINGERPRINT_MODULUS = 2**63


@dataclass
class Source:
    """One of several datasets."""

    path: str  # as `data.path`
    weight: float  # relative to the others


@dataclass
class Config:
    """Section `data` of a recipe. Exactly one of `path` and `sources` is given."""

    path: str | None = None  # dataset folder, or a folder of images (made into shards in the cache)
    sources: list[Source] | None = None  # several of them, drawn by weight
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
    views: int | None = None  # K: crop, flip and jitter come again every K epochs, masks do not; null: never
    lanes: int | None = None  # L of mim/data/order.py, of each source; default 1 below 10^7 samples, else 64
    window: int | None = None  # W, samples, of each source; default all below 10^7 samples, else 2048
    repeats: int = 1  # draws of a sample in a row, decoded once (repeated augmentation, arXiv 1901.09335)
    bad_budget: float = 1e-4  # share of the samples that may be undecodable (at least 10) before the run stops

    def __post_init__(self) -> None:
        if self.path is None and not self.sources:
            raise ConfigError("data.path is missing; set it in the recipe or as data.path=...")
        if self.path is not None and self.sources:
            raise ConfigError("data.path and data.sources are both given; give one, and set the other to null")
        if self.sources and self.val_ratio:
            raise ConfigError("data.val_ratio holds out images of data.path; beside data.sources give data.val_path")
        if self.views is not None and self.views < 1:
            raise ConfigError(f"data.views={self.views} must be at least 1: every image has so many views; or null")
        if not 0 <= self.bad_budget <= 1:
            raise ConfigError(f"data.bad_budget={self.bad_budget:g} must lie between 0 and 1: a share of the samples")


@dataclass(frozen=True)
class Renderer:
    """Turns located rows into a batch."""

    dataset: AnyDataset
    view: View
    sizes: Sizes  # of `images`, and of `tokenizer_images` if there are two
    mask: Mask | None
    channels: int
    seed: int
    jitter: float = 0.0  # strength; 0 leaves colours alone
    known: Mapping[int, Bad] = field(default_factory=dict)  # bad samples by their index: not decoded again
    views: int | None = None  # of every sample; None: each epoch has its own
    codes: Codes | None = None  # of these views
    label_maps: bool = False  # read them too; then the view takes a Pair

    def __post_init__(self) -> None:
        if not 1 <= len(self.sizes) <= len(VIEWS):
            raise ValueError(f"{len(self.sizes)} sizes; give one, or two with the tokenizer's")
        if self.label_maps and self.dataset.pixel_classes is None:
            raise ConfigError(
                f"{self.dataset.path} has no label maps, or its sources have other classes of pixels; make shards that "
                f"have them: mim shards make IMAGES OUT --masks DIR"
            )

    def render(self, slots: Slots, num_real: int, size: int, substitute: Substitute | None = None) -> Batch:
        """Render the rows of `slots` into a batch of `size` rows, of which the first `num_real` count.

        Rows beyond those of `slots` copy the first row with weight 0. Without `substitute`, a bad sample is DataError.
        """
        batch: Batch = {"keys": [], "samples": [], "bad": []}
        batch["range"] = value_range(self.dataset, self.channels)
        batch["weight"] = (torch.arange(size) < num_real).float()
        batch["noise"] = torch.empty(size, dtype=torch.int64)
        if self.jitter:
            batch["jitter"] = self.jitter
            batch["view_noise"] = torch.empty(size, dtype=torch.int64)
        if self.dataset.classes is not None:
            batch["labels"] = torch.full((size,), -1, dtype=torch.int64)
        self._fill(batch, slots, substitute)
        filled = len(slots.sample)
        for value in batch.values():
            if isinstance(value, Tensor) and value is not batch["weight"]:
                value[filled:] = value[0]
        if "label_maps" in batch:
            batch["label_maps"][num_real:] = IGNORE
        batch["keys"] += batch["keys"][:1] * (size - filled)
        return batch

    def _fill(self, batch: Batch, slots: Slots, substitute: Substitute | None) -> None:
        """Write each row of `slots` into the batch; masks are added to it.

        Draws are named by the slot's own sample, whether it or a substitute is shown; with `views`, those of the view
        by the sample that is shown.
        """
        clock, masks, codes = Clock(), list[Tensor](), list[Tensor]()
        shown, loaded = None, (None, None)  # draws, or views, of a sample follow each other: decode once
        following = [*slots.sample[1:].tolist(), None]
        for row, (epoch, shard, index, number, draw) in enumerate(zip(*(a.tolist() for a in slots), strict=True)):
            name = (self.seed, epoch, number, draw)
            # Its own image serves all views; a substitute only the epoch that named it.
            another_view = self.views is not None and shown is not None and loaded[1] == shown.number == number
            if loaded != (epoch, number) and not another_view:
                attempts = functools.partial(substitute, row) if substitute is not None else None
                place, several = Place(shard, index, number), following[row] == number
                shown, views = self._load(place, name, attempts, batch["bad"], clock, several=several)
            else:
                assert shown is not None
                views = self.view(shown.image, rng("view", *self.view_name(name, shown.number)), self.sizes)
            loaded = epoch, number
            if self.codes is not None:
                assert self.views is not None
                codes.append(torch.from_numpy(self.codes(shown.number, epoch % self.views, draw).astype(np.int64)))
            if self.mask is not None:
                masks.append(torch.as_tensor(self.mask(rng("mask", *name)), dtype=torch.bool))
            clock.done("augment")
            named = views if isinstance(views, dict) else dict(zip(VIEWS, views))  # noqa: B905  one view or two
            for field_, view in named.items():
                if field_ == "label_maps":
                    if field_ not in batch:
                        batch[field_] = torch.empty((len(batch["weight"]), *view.shape), dtype=torch.uint8)
                elif field_ not in batch:
                    # Rows are (h, w, C) in memory, as the decoder leaves them: transposing costs more than copying.
                    rows = _fresh((len(batch["weight"]), *view.movedim(-3, -1).shape), self.dataset.dtype)
                    batch[field_] = rows.movedim(-1, -3)  # (B, C, h, w) or (B, V, C, h, w)
                if batch[field_].shape[1:] != view.shape:
                    raise ValueError(f"rows of a batch show {field_} of several sizes; use batches of one row")
                batch[field_][row] = view
            batch["noise"][row] = key64("noise", *name)
            if self.jitter:
                batch["view_noise"][row] = key64("noise", *self.view_name(name, shown.number))
            if shown.label is not None:
                batch["labels"][row] = shown.label
            batch["keys"].append(shown.key)
            batch["samples"].append(shown.number)
            clock.done("collate")
        batch["seconds"] = clock.seconds
        if codes:
            batch["codes"] = torch.empty((len(batch["weight"]), len(codes[0])), dtype=torch.int64)  # (B, N)
            batch["codes"][: len(codes)] = torch.stack(codes)
        if masks:
            counts = {int(mask.sum()) for mask in masks}
            if len(counts) > 1:
                raise ValueError(f"the mask function masks {min(counts)} to {max(counts)} patches; one count is needed")
            batch["num_masked"] = counts.pop()
            batch["mask"] = torch.empty((len(batch["weight"]), len(masks[0])), dtype=torch.bool)  # (B, N)
            batch["mask"][: len(masks)] = torch.stack(masks)

    def view_name(self, name: tuple[int, ...], shown: int) -> tuple[int, ...]:
        """What names crop, flip and colours of a row that is `name`d (seed, epoch, sample, draw) and shows a sample."""
        seed, epoch, _, draw = name
        return name if self.views is None else (seed, epoch % self.views, shown, draw)

    def _load(
        self,
        place: Place,
        name: tuple[int, ...],
        substitute: Callable[[int], Place] | None,
        met: list[dict[str, Any]],
        clock: Clock,
        *,
        several: bool,  # further draws of it follow
    ) -> tuple[Shown, Shows]:
        """Read, decode and view the sample of a slot or, when it is bad, the first of its substitutes that is not.

        The bad ones are added to `met`: sample, key, reason, substitute. Raises DataError when none can be decoded.
        """
        refused: dict[int, Bad] = {}
        for attempt in range(ATTEMPTS + 1):
            if attempt:
                if substitute is None:
                    break
                place = substitute(attempt)
            if place.sample in refused:
                continue
            if place.sample in self.known:
                refused[place.sample] = self.known[place.sample]
                continue
            sample = self.dataset.read(place.shard, place.row, label_map=self.label_maps)
            clock.done("read")
            try:
                image = self._open(sample, clock, several=several)
                clock.done("decode")
                views = self.view(image, rng("view", *self.view_name(name, place.sample)), self.sizes)
            except BadImage as error:
                clock.done("decode")
                refused[place.sample] = Bad(sample.key, str(error))
                continue
            met += [{"sample": number, **bad._asdict(), "substitute": sample.key} for number, bad in refused.items()]
            return Shown(image, sample.label, sample.key, place.sample), views
        first = next(iter(refused.values()))
        others = f", and neither can {ATTEMPTS} substitutes of its window" if substitute is not None else ""
        raise DataError(
            f"{first.key} cannot be decoded ({first.reason}){others}; run `mim shards verify --decode` on its "
            f"dataset, which names all such images, or make the shards again without them"
        )

    def _open(self, sample: Sample, clock: Clock, *, several: bool) -> Image | Pair:
        """The image of a sample, decoded whole when several draws of it follow, else perhaps when a box is cut.

        With label maps, the image and its own.
        """
        image: Image = open_image(sample.image, self.channels, self.dataset.dtype)
        if isinstance(image, Encoded):
            image = image.whole() if several else replace(image, when_cut=functools.partial(clock.done, "decode"))
        if not self.label_maps:
            return image
        assert sample.label_map is not None
        assert self.dataset.pixel_classes is not None
        height, width = image.shape[1:]
        return Pair(image, decode_label_map(sample.label_map, (height, width), len(self.dataset.pixel_classes)))


class Shown(NamedTuple):
    """What a row shows."""

    image: Image | Pair
    label: int | None
    key: str
    number: int  # index over the whole dataset


class Stream(torch_data.Dataset[Batch]):
    """The endless training stream, indexed by micro-batches."""

    def __init__(self, order: AnyOrder, renderer: Renderer):
        self.order = order
        self.renderer = renderer

    def __getitem__(self, micro: MicroBatch) -> Batch:
        num_real = len(micro.positions)
        positions = micro.positions.tolist() if num_real else [micro.filler]
        slots = self.order.locate(positions)
        batch = self.renderer.render(
            slots, num_real, micro.size, lambda row, attempt: self.order.substitute(positions[row], attempt)
        )
        if not num_real:
            batch["bad"] = []  # whose slot it is names it
        shown = batch.pop("samples")
        rows = zip(micro.positions, shown, slots.epoch, slots.draw, strict=False)  # a filler has no position
        batch["position"] = micro.position
        batch["epoch"] = self.order.epoch(positions[0])
        batch["fingerprint"] = sum(key64("row", *row) for row in rows) % FINGERPRINT_MODULUS
        return batch


class Evaluation(torch_data.Dataset[Batch]):
    """Samples by their index in the order of the lock."""

    def __init__(self, renderer: Renderer):
        self.renderer = renderer
        self._ends = np.cumsum(renderer.dataset.counts)

    def __getitem__(self, samples: np.ndarray) -> Batch:
        shard, row = locate(self._ends, samples)
        epoch = np.full_like(samples, EVALUATION)
        slots = Slots(epoch, shard, row, samples, np.zeros_like(samples))
        batch = self.renderer.render(slots, len(samples), len(samples))
        del batch["samples"], batch["bad"], batch["seconds"]
        return batch


def loader(
    dataset: AnyDataset,
    *,
    order: AnyOrder,
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
    known: Mapping[int, Bad] | None = None,  # bad samples by their index over the dataset
    views: int | None = None,  # of every sample, as `data.views`
    codes: Codes | None = None,  # of these views, if they are known
    label_maps: bool = False,  # with those of the images
    workers: int = 0,
    pin_memory: bool = False,
    timeout: float = TIMEOUT,  # seconds to wait for a worker before giving up; 0 waits for ever
) -> torch_data.DataLoader[Batch]:
    """Return the micro-batches of one rank: `num_steps * micro_batches` of them, in order."""
    plan = Plan(order.repeats, batch_size, rank, world, micro_batches, position, num_steps)
    renderer = Renderer(dataset, view, sizes, mask, channels, order.seed, jitter, known or {}, views, codes, label_maps)
    stream = Stream(order, renderer)
    indices: Iterable[MicroBatch] = plan
    if remote := dataset.remote_shards:
        indices = Prefetcher(plan, order, shards=remote, cache=dataset.cache)
    return in_order(stream, indices, workers, pin_memory, timeout and max(timeout, dataset.longest_read()))


def evaluate(
    dataset: AnyDataset,
    *,
    view: View,
    sizes: Sizes,
    batch_size: int,
    mask: Mask | None = None,
    channels: int = 3,
    seed: int = 0,
    limit: int | None = None,
    label_maps: bool = False,  # with those of the images
    only: Sequence[int] | None = None,
    workers: int = 0,
    pin_memory: bool = False,
    timeout: float = TIMEOUT,
) -> torch_data.DataLoader[Batch]:
    """Return every sample of `evaluated` once, in its order; with `only` the batches of these numbers alone.

    The last batch may be shorter. Draws are named by the sample alone, so two evaluations see the same pixels. Samples
    in the quarantine are left out, and said so; one that is found bad here is DataError.
    """
    samples = evaluated(dataset, limit=limit, seed=seed)
    if left_out := min(len(dataset), len(dataset) if limit is None else limit) - len(samples):
        say(f"{dataset.path}: {left_out} of {left_out + len(samples)} samples stand in the quarantine and are left out")
    chunks = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
    if only is not None:
        chunks = [chunks[number] for number in only]
    evaluation = Evaluation(Renderer(dataset, view, sizes, mask, channels, seed, label_maps=label_maps))
    return in_order(evaluation, chunks, workers, pin_memory, timeout and max(timeout, dataset.longest_read()))


def evaluated(dataset: AnyDataset, *, limit: int | None = None, seed: int = 0) -> np.ndarray:
    """Samples that an evaluation looks at, ascending: all, or a random subset of `limit`, the same each time.

    Those that stand in the quarantine are not among them.
    """
    total = len(dataset)
    if limit is None or limit >= total:
        samples = np.arange(total)
    elif total < FULL_SHUFFLE_BELOW:
        samples = np.sort(permutation(total, "evaluate", seed)[:limit])
    else:  # a permutation would take gigabytes
        samples = np.array(keyed_picks(total, limit, f"evaluate/{seed}"), dtype=np.int64)
    return samples[~np.isin(samples, list(bad_samples(dataset)))]


def value_range(dataset: AnyDataset, channels: int) -> list[list[float]]:
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

    `range` maps them, `jitter` changes their colours by the seeds `view_noise`; all three are used up. Label maps
    become int64.
    """
    between_batches()
    moved: Batch = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
    limits, strength, noise = moved.pop("range"), moved.pop("jitter", 0.0), moved.pop("view_noise", None)
    views = {name: _unit(moved[name], limits) for name in {*VIEWS, *CROPS} if name in moved}
    if strength and views["images"].ndim == 4:  # two sizes of one crop: their colours change alike
        jitter_([views[name] for name in VIEWS if name in views], noise, strength)
    elif strength:
        jitter_crops_([views[name] for name in CROPS if name in views], noise, strength)
    if "label_maps" in moved:
        moved["label_maps"] = moved["label_maps"].long()
    return moved | views


def _unit(raw: Tensor, limits: list[list[float]]) -> Tensor:
    """Raw pixels (B, C, H, W) -> float32 in [0, 1]; what lies outside the limits is clamped."""
    on_cpu = raw.device.type == "cpu"
    pixels = _fresh(raw.shape, "float32") if on_cpu else torch.empty(raw.shape, device=raw.device)
    pixels.copy_(raw)
    white = DTYPES[str(raw.dtype).removeprefix("torch.")]
    if not raw.is_floating_point() and all(list(pair) == [0, white] for pair in limits):
        return pixels.div_(white)
    low, high = _limits(tuple(map(tuple, limits)), raw.device)
    return pixels.sub_(low).div_(high - low).clamp_(0, 1)


@functools.cache
def _limits(limits: tuple[tuple[float, ...], ...], device: torch.device) -> Tensor:
    """Lower and upper limits of the channels, (2, C, 1, 1); sent to a device once, for each copy would wait for it."""
    return torch.tensor(limits, device=device).T[:, :, None, None]


def _fresh(shape: tuple[int, ...], dtype: str) -> Tensor:
    """Memory for a batch on the CPU, not initialised. NumPy asks for huge pages; to get as many small ones as torch
    would costs more than what is then written into them."""
    return torch.from_numpy(np.empty(shape, dtype))


def _begin_worker(number: int) -> None:
    """Leave what came from the main process to it: a collection would write to all of it, and copy 30 MB a worker."""
    gc.freeze()
    stay_until_told(number)


def in_order(
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
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),  # its own: starting an epoch must not advance the model's random state
    )
