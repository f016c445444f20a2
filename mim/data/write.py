"""Shards from lists of images: parallel tar writing, the statistics of the pixels, and the lock at the end.

A shard is written under a temporary name and renamed when it is whole; then its facts are written beside it. A process
that was killed finds them and keeps what is finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from torch import Tensor
from webdataset import TarWriter

from mim import __version__
from mim.config import ConfigError
from mim.contracts import IGNORE, DataError, StorageError
from mim.data import facts
from mim.data.decode import BadImage, Header, decode, read_header
from mim.data.label_map import ENDING, decode_label_map, encode_label_map, resized, without_zero
from mim.data.members import build_index, save_index
from mim.data.pairs import Masks
from mim.data.shards import FORMAT, LABEL_MEMBER, Sample, dataset_id, write_lock
from mim.data.shrink import shrunk
from mim.data.sources import Reader
from mim.data.statistics import Moments, Statistics
from mim.data.workers import run_all

BUFFER = 8 << 20  # bytes written at once: the page cache keeps them in large pages, read back 2.5 times as fast


class Item(NamedTuple):
    """An image to write."""

    name: str  # for people
    key: str
    place: Any  # what the reader takes
    label: int | None
    mask: Any = None  # where its label map lies


@dataclass(frozen=True)
class Task:
    """One shard to write."""

    reader: Reader
    target: Path
    moved: Path  # where it lies when a killed process had begun to move finished shards out
    items: list[Item]
    short: int | None  # pixels: images are shrunk to this short side; None keeps them as they are
    quality: int  # of the JPEGs that this makes
    mask_reader: Reader | None = None  # of label maps; None: there are none
    masks: Masks | None = None  # how they are read


@dataclass
class Written:
    """What came of a task: facts of the shard, and sums for the statistics."""

    file: str
    size: int = 0
    sha256: str = ""
    count: int = 0
    endings: set[str] = field(default_factory=set)
    pixels: Statistics = field(default_factory=Statistics)
    heights_widths: list[tuple[int, int]] = field(default_factory=list)
    labels: Counter[int] = field(default_factory=Counter)
    left_out: list[dict[str, str]] = field(default_factory=list)
    pixel_counts: np.ndarray | None = None  # (256,) pixels of each class; None without label maps

    def add(self, header: Header, pixels: Tensor, label_map: Tensor | None, label: int | None) -> None:
        self.pixels.add(pixels.numpy())  # (C, H, W)
        self.endings.add(header.ending)
        self.heights_widths.append((pixels.shape[1], pixels.shape[2]))
        self.count += 1
        if label is not None:
            self.labels[label] += 1
        if label_map is not None:
            counts = np.bincount(label_map.numpy().ravel(), minlength=IGNORE + 1)
            self.pixel_counts = counts if self.pixel_counts is None else self.pixel_counts + counts

    def entry(self) -> dict[str, Any]:
        """What the lock holds of the shard."""
        return {"file": self.file, "size": self.size, "sha256": self.sha256, "count": self.count}


IN_FACTS = (Written, Statistics, Moments)  # every class that the facts of a shard hold


def read_pixels(data: bytes | memoryview) -> tuple[Header, Tensor]:
    """Header and all pixels of an encoded image. Raises BadImage."""
    header = read_header(data)
    return header, decode(data, header.channels, header.dtype)


def read_sample(sample: Sample, pixel_classes: list[str] | None) -> tuple[Header, Tensor, Tensor | None]:
    """Header and pixels of a stored image, and its label map (H, W) if it was read. Raises BadImage."""
    header, pixels = read_pixels(sample.image)
    if sample.label_map is None or pixel_classes is None:
        return header, pixels, None
    return header, pixels, decode_label_map(sample.label_map, pixels.shape[1:], len(pixel_classes))


def write_shards(tasks: list[Task], workers: int | None, budget: int) -> list[Written]:
    """Write all shards in parallel processes; stop as soon as more than `budget` images cannot be decoded."""
    left_out: list[dict[str, str]] = []

    def check(task: Task, written: Written) -> int:
        left_out.extend(written.left_out)
        if len(left_out) > budget:
            shown = "; ".join(f"{bad['file']}: {bad['reason']}" for bad in left_out[:3])
            raise DataError(f"more than {budget} images cannot be decoded ({shown}); remove them or raise max_left_out")
        return len(task.items)

    total = sum(len(task.items) for task in tasks)
    return run_all(_write_shard, tasks, workers=workers, description="shards", total=total, done=check)


def _write_shard(task: Task) -> Written:
    """Write one tar, its index and its facts, leaving out what cannot be decoded; keep them if they are there."""
    if (kept := finished(task.target, task.moved)) is not None:
        return kept
    written = Written(task.target.name)
    labelled = task.items[0].label is not None
    label_map = ENDING if task.mask_reader is not None else None
    samples = _samples(task, written)
    written.size, written.sha256 = store_shard(task.target, samples, labelled=labelled, label_map=label_map)
    facts.save(facts_file(task.target), written)
    return written


def store_shard(
    target: Path, samples: Iterator[dict[str, Any]], *, labelled: bool, label_map: str | None = None
) -> tuple[int, str]:
    """Write a tar and its index aside, then rename them; return size and sha256, or (0, "") when there is no sample.

    label_map: the ending of that member, if there are any.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    count = 0
    with temporary.open("wb", buffering=BUFFER) as file:
        with TarWriter(file, encoder=False, mtime=0) as writer:
            for sample in samples:
                writer.write(sample)
                count += 1
        file.flush()
        os.fsync(file.fileno())
    if count == 0:
        temporary.unlink()
        return 0, ""
    save_index(target.with_suffix(".npy"), build_index(str(temporary), labelled=labelled, label_map=label_map))
    with temporary.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    size = temporary.stat().st_size
    temporary.rename(target)
    return size, sha256


def _samples(task: Task, written: Written) -> Iterator[dict[str, Any]]:
    """The samples of a shard, as TarWriter takes them; what cannot be decoded is left out by name."""
    for item in task.items:
        try:
            data = task.reader.read(item.place)
            header, pixels = read_pixels(data)
            mask, label_map = _mask(task, item, pixels)
        except (BadImage, FileNotFoundError) as error:
            reason = str(error) if isinstance(error, BadImage) else "there is no such file (a link that leads nowhere?)"
            written.left_out.append({"file": item.name, "reason": reason})
            continue
        if task.short is not None:
            try:
                small = shrunk(pixels, short=task.short, quality=task.quality)
            except DataError as error:
                raise DataError(f"{item.name}: {error}") from error
            if small is not None:
                data = small
                header, pixels = read_pixels(data)
                if label_map is not None:
                    label_map = resized(label_map, pixels.shape[1:])
                    mask = encode_label_map(label_map)
        written.add(header, pixels, label_map, item.label)
        yield sample_of(item.key, {header.ending: data, ENDING: mask}, item.label)


def _mask(task: Task, item: Item, pixels: Tensor) -> tuple[bytes | None, Tensor | None]:
    """The label map of an item as it is stored and as it is read, or nothing. Raises BadImage."""
    masks = task.masks
    if task.mask_reader is None or masks is None:
        return None, None
    data = task.mask_reader.read(item.mask)
    num_classes = len(masks.classes) if masks.classes is not None else None
    label_map = decode_label_map(data, pixels.shape[1:], None if masks.zero_ignored else num_classes)
    if masks.zero_ignored:
        data = encode_label_map(without_zero(label_map))
        label_map = decode_label_map(data, pixels.shape[1:], num_classes)
    return data, label_map


def sample_of(key: str, images: dict[str | None, Any], label: int | None) -> dict[str, Any]:
    """A sample as TarWriter takes it: the bytes of its images by their endings, those that there are, and its label."""
    found = {str(ending): data for ending, data in images.items() if data is not None}
    return {"__key__": key, **found} | ({} if label is None else {LABEL_MEMBER: str(label).encode()})


def facts_file(target: Path) -> Path:
    """Where the facts of a finished shard lie."""
    return target.with_suffix(".json")


def read_facts(target: Path) -> Written:
    """Facts of a finished shard. Raises DataError."""
    return facts.load(facts_file(target), *IN_FACTS)


def finished(target: Path, moved: Path) -> Written | None:
    """The facts of a shard that was finished before, if its bytes still are what they say.

    moved: where it lies when a killed process had begun to move finished shards out.
    """
    try:
        written = read_facts(target)
    except (FileNotFoundError, DataError):
        return None
    if written.count == 0:
        return written
    for place in (target, moved):
        if place.is_file() and place.with_suffix(".npy").is_file():
            with place.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == written.sha256:
                    return written
    return None


def move_out(files: list[Path], folder: Path) -> None:
    """Move finished shards and their indices to where they belong. May be repeated after a kill at any point."""
    for file in files:
        for piece in (file, file.with_suffix(".npy")):
            if piece.is_file():
                piece.rename(folder / piece.name)


@contextlib.contextmanager
def storing(place: Path) -> Iterator[None]:
    """Name OUT, or a file of it, in what the file system refuses. Raises ConfigError or StorageError."""
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"{place} is a file, or lies below one; choose a folder that is empty or new") from error
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot write {place}: {error}") from error


def finish(
    root: Path,
    written: list[Written],
    classes: list[str] | None,
    source: dict[str, Any],
    left_out: list[dict[str, str]],  # what was unusable before it could be read
    pixel_classes: list[str] | None = None,  # of label maps, which there are if this is given
) -> None:
    """Write the lock of a dataset."""
    left_out = left_out + [bad for w in written for bad in w.left_out]
    written = [w for w in written if w.count]
    if not written:
        raise DataError(
            f"none of the {len(left_out)} images can be decoded; {left_out[0]['file']}: {left_out[0]['reason']}"
        )
    shards = [w.entry() for w in written]
    members = {"image": sorted(set().union(*(w.endings for w in written)))}
    if classes is not None:
        members["label"] = [LABEL_MEMBER]
    schema = {"members": members, "classes": classes}
    if pixel_classes is not None:
        members["label_map"] = [ENDING]
        schema["pixel_classes"] = pixel_classes
    lock = {
        "format": FORMAT,
        "dataset_id": dataset_id(shards, schema),
        "shards": shards,
        "schema": schema,
        "statistics": statistics_of(written, classes, pixel_classes),
        "left_out": left_out,
        "source": source,
        "tool": {"mimstream": __version__, "pillow": PIL.__version__},
    }
    write_lock(root, lock)


def statistics_of(
    written: list[Written], classes: list[str] | None, pixel_classes: list[str] | None = None
) -> dict[str, Any]:
    """Statistics of the pixels, the sizes, the labels and the label maps."""
    height, width = np.concatenate([w.heights_widths for w in written]).T
    labels = sum((w.labels for w in written), Counter())
    found = {
        **Statistics.summary(w.pixels for w in written),
        "height": _spread(height),
        "width": _spread(width),
        "class_counts": [labels[label] for label in range(len(classes))] if classes is not None else None,
    }
    if pixel_classes is not None:
        counts = count_pixels(written)
        found |= {"pixel_counts": counts[: len(pixel_classes)].tolist(), "ignored_pixels": int(counts[IGNORE])}
    return found


def count_pixels(written: Iterable[Written]) -> np.ndarray:
    """Pixels of each class, of those ignored last. Int64 (256,)."""
    counts = np.zeros(IGNORE + 1, np.int64)
    for one in written:
        counts += 0 if one.pixel_counts is None else one.pixel_counts
    return counts


def _spread(values: np.ndarray) -> dict[str, int]:
    return {"min": int(values.min()), "median": int(np.median(values)), "max": int(values.max())}
