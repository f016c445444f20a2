"""`mim bench data`: images per second of each stage of a recipe's loader, what bounds it, and what to change.

The stages are timed in this process, on one thread, as a worker runs them; then a loader with its workers delivers
batches. What shards with pre-resized images would bring is measured too: some images are resized, encoded again as
JPEG of quality 90 and rendered. Files are in the page cache if they were read before, so reading may be slower in a
training that is larger than memory.
"""

from __future__ import annotations

import io
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from mim.contracts import Batch
from mim.data import stream
from mim.data.augment import Sizes
from mim.data.decode import BadImage, decode, open_image
from mim.data.mixture import AnyDataset, AnyOrder
from mim.data.order import Plan, rng
from mim.data.stages import REMEDIES, STAGES, advise_workers, allowed_cpus, bound_by

PROBES = 24  # images that are resized to see what it brings
MARGIN = 256 / 224  # short side of pre-resized images / side of the crop, as is usual for ImageNet
WORTH = 1.2  # a remedy that brings less is not named
SMALL_SHARD, LARGE_SHARD = 32e6, 256e6  # bytes


@dataclass(frozen=True)
class Resized:
    """What pre-resized images bring."""

    short: int  # pixels of the short side
    speedup: float  # of decoding and augmenting


@dataclass(frozen=True)
class Diagnosis:
    """What was measured. Seconds are per image."""

    dataset: str
    num_images: int
    num_shards: int
    image_bytes: float  # mean of an encoded image
    seconds: dict[str, float]  # of each stage in a worker
    to_device: float  # seconds
    device: str
    workers: int
    cpus: int  # that this rank may use
    delivered: float  # images per second of the loader
    resized: Resized | None  # None: the images are small already

    @property
    def one_worker(self) -> float:
        """Images per second."""
        return 1 / sum(self.seconds.values())

    @property
    def expected(self) -> float:
        """Images per second that the workers would make if they never waited."""
        return self.one_worker * min(max(self.workers, 1), self.cpus)

    @property
    def bound(self) -> str:
        """The stage that bounds a worker, or `to device` when the main process is slower than the workers."""
        return "to device" if 1 / self.to_device < self.expected else bound_by(self.seconds)

    def advice(self) -> list[str]:
        """What to change, with numbers."""
        lines = [advise_workers(self.workers, self.cpus)]
        if self.workers < self.cpus:
            lines[0] += f", for up to {self.one_worker * self.cpus:.0f} images/s"
        if self.bound == "to device":
            lines.append(f"the copy to {self.device} bounds the loop: smaller images or fewer views")
        elif self.bound == "read":
            lines += self._advise_shards()
        elif self.resized is None or self.resized.speedup < WORTH:
            lines.append(REMEDIES[self.bound])
        if self.resized is not None and self.resized.speedup >= WORTH:
            rendering = self.seconds["decode"] + self.seconds["augment"]
            left = sum(self.seconds.values()) - rendering * (1 - 1 / self.resized.speedup)
            lines.append(
                f"images of {self.resized.short} pixels on their short side render {self.resized.speedup:.1f}x as "
                f"fast: shards made with them would let a worker make {1 / left:.0f} images/s"
            )
        return lines

    def _advise_shards(self) -> list[str]:
        size = self.image_bytes * self.num_images / self.num_shards
        if size >= SMALL_SHARD:
            return [REMEDIES["read"]]
        fewer = max(1, math.ceil(self.image_bytes * self.num_images / LARGE_SHARD))
        return [f"a shard holds {size / 1e6:.1f} MB: {fewer} instead of {self.num_shards} would be read in longer runs"]

    def json(self) -> dict[str, Any]:
        """All figures as plain data."""
        rates = {stage: 1 / seconds for stage, seconds in self.seconds.items()}
        rates |= {"one worker": self.one_worker, "to device": 1 / self.to_device, "loader": self.delivered}
        return asdict(self) | {
            "images_per_s": {name: round(rate, 1) for name, rate in rates.items()},
            "bound": self.bound,
            "advice": self.advice(),
        }

    def text(self) -> str:
        """The report for people."""
        total = sum(self.seconds.values())
        size = self.image_bytes / 1e3
        lines = [
            f"{self.dataset}: {self.num_images} images of {size:.1f} kB in {self.num_shards} shards",
            f"{'stage':12} {'images/s':>10}  share of a worker",
            *(f"{s:12} {1 / self.seconds[s]:>10.0f}  {100 * self.seconds[s] / total:.0f} %" for s in STAGES),
            f"{'one worker':12} {self.one_worker:>10.0f}",
            f"{'to device':12} {1 / self.to_device:>10.0f}  {self.device}, in the main process",
            f"{'loader':12} {self.delivered:>10.0f}  measured, train.workers={self.workers}, {self.cpus} CPUs allowed",
            f"bound: {self.bound}",
        ]
        return "\n".join([*lines, *(f"- {line}" for line in self.advice())])


def measure(
    dataset: AnyDataset,
    *,
    order: AnyOrder,
    view: stream.View,
    sizes: Sizes,
    mask: stream.Mask | None,
    channels: int,
    batch_size: int,
    workers: int,
    device: torch.device,
    label_maps: bool = False,
    seconds: float = 3.0,  # per measurement; there are three
) -> Diagnosis:
    """Time the stages of a loader and the loader itself. Raises what reading the data raises."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        renderer = stream.Renderer(dataset, view, sizes, mask, channels, order.seed, label_maps=label_maps)
        stages, num_images, image_bytes, batch = _time_stages(stream.Stream(order, renderer), batch_size, seconds)
        resized = _time_resized(renderer, order, seconds)
    finally:
        torch.set_num_threads(threads)
    return Diagnosis(
        dataset=str(dataset.path),
        num_images=len(dataset),
        num_shards=len(dataset.counts),
        image_bytes=image_bytes,
        seconds={stage: stages[stage] / num_images for stage in STAGES},
        to_device=_time_copy(batch, device, seconds) / batch_size,
        device=str(device),
        workers=workers,
        cpus=allowed_cpus(),
        delivered=_time_loader(renderer, order, batch_size, workers, device, seconds),
        resized=resized,
    )


def _time_stages(source: stream.Stream, batch_size: int, seconds: float) -> tuple[dict[str, float], int, float, Batch]:
    """Seconds per stage and the number of images of batches rendered here; mean bytes of an image; the last batch."""
    totals, num_images = dict.fromkeys(STAGES, 0.0), 0
    began = time.perf_counter()
    for micro in Plan(source.order.repeats, batch_size, num_steps=10**9):
        batch = source[micro]
        if num_images or time.perf_counter() - began > seconds:  # the first batch opens files and fills caches
            for stage in STAGES:
                totals[stage] += batch["seconds"][stage]
        num_images += batch_size
        if time.perf_counter() - began > seconds:
            break
    counted = max(num_images - batch_size, batch_size)
    slots = source.order.locate(np.arange(min(PROBES, len(source.renderer.dataset))) * source.order.repeats)
    pairs = zip(slots.shard.tolist(), slots.row.tolist(), strict=True)
    sizes = [len(source.renderer.dataset.read(shard, row).image) for shard, row in pairs]
    return totals, counted, float(np.mean(sizes)), batch


def _time_copy(batch: Batch, device: torch.device, seconds: float) -> float:
    """Seconds to bring one batch to the device as floats."""
    began, count = time.perf_counter(), 0
    while not count or time.perf_counter() - began < seconds / 10:
        stream.to_device(batch, device)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        count += 1
    return (time.perf_counter() - began) / count


def _time_loader(
    renderer: stream.Renderer, order: AnyOrder, batch_size: int, workers: int, device: torch.device, seconds: float
) -> float:
    """Images per second that a loader delivers to a consumer that only takes them, after its workers have started."""
    batches = iter(
        stream.loader(
            renderer.dataset,
            order=order,
            view=renderer.view,
            sizes=renderer.sizes,
            mask=renderer.mask,
            channels=renderer.channels,
            batch_size=batch_size,
            num_steps=10**6,
            label_maps=renderer.label_maps,
            workers=workers,
            pin_memory=device.type == "cuda",
        )
    )
    for _ in range(1 + workers * stream.PREFETCH):  # what was made while the workers started
        next(batches)
    began, count = time.perf_counter(), 0
    while not count or time.perf_counter() - began < seconds:
        next(batches)
        count += 1
    return count * batch_size / (time.perf_counter() - began)


def _time_resized(renderer: stream.Renderer, order: AnyOrder, seconds: float) -> Resized | None:
    """How much faster images render that were resized to a little more than the crop's side; None if few are larger."""
    if renderer.dataset.dtype != "uint8" or renderer.channels not in (1, 3):
        return None  # JPEG cannot hold them
    short = round(max(side for size in renderer.sizes for side in size) * MARGIN)
    slots = order.locate(np.arange(min(PROBES, order.num_samples)) * order.repeats)
    images = [
        bytes(renderer.dataset.read(shard, row).image)
        for shard, row in zip(slots.shard.tolist(), slots.row.tolist(), strict=True)
    ]
    pairs = [(data, smaller) for data in images if (smaller := _shrink(data, short, renderer.channels)) is not None]
    if len(pairs) <= len(images) / 2:
        return None
    totals, began = [0.0, 0.0], time.perf_counter()
    while not totals[0] or time.perf_counter() - began < seconds / 2:
        for pair in pairs:
            for which, data in enumerate(pair):
                since = time.perf_counter()
                renderer.view(open_image(data, renderer.channels), rng("bench", 0, 0, 0), renderer.sizes)
                totals[which] += time.perf_counter() - since
    return Resized(short, totals[0] / totals[1])


def _shrink(data: bytes, short: int, channels: int) -> bytes | None:
    """Encode an image again with that short side; None when it is not larger or cannot be decoded."""
    try:
        pixels = decode(data, channels).permute(1, 2, 0).numpy()  # (H, W, C)
    except BadImage:
        return None
    h, w = pixels.shape[:2]
    if min(h, w) <= short:
        return None
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    scale = short / min(h, w)
    smaller = image.resize((round(w * scale), round(h * scale)), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    smaller.save(file, "JPEG", quality=90)
    return file.getvalue()
