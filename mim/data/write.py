"""Shards from lists of images: parallel tar writing, the statistics of the pixels, and the lock at the end."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from torch import Tensor
from tqdm import tqdm
from webdataset import TarWriter

from mim import __version__
from mim.contracts import DataError
from mim.data.decode import BadImage, Header, decode, read_header
from mim.data.members import build_index
from mim.data.shards import FORMAT, LABEL_MEMBER, dataset_id, write_lock


class Item(NamedTuple):
    path: str  # relative to the folder
    key: str
    label: int | None


@dataclass(frozen=True)
class Task:
    """One shard to write."""

    folder: Path
    target: Path
    items: list[Item]


@dataclass
class Written:
    """What came of a task: facts of the shard, and sums for the statistics."""

    file: str
    size: int = 0
    sha256: str = ""
    count: int = 0
    endings: set[str] = field(default_factory=set)
    colour: bool = False
    levels: np.ndarray = field(default_factory=lambda: np.zeros((3, 256), dtype=np.int64))  # histogram per channel
    heights_widths: list[tuple[int, int]] = field(default_factory=list)
    labels: Counter[int] = field(default_factory=Counter)
    left_out: list[dict[str, str]] = field(default_factory=list)

    def add(self, header: Header, pixels: Tensor, label: int | None) -> None:
        channels = pixels.numpy()  # (C, H, W)
        histograms = [np.bincount(channel.ravel(), minlength=256) for channel in channels]
        self.levels += np.stack(histograms)  # gray counts in all three
        self.colour |= header.channels == 3
        self.endings.add(header.ending)
        self.heights_widths.append(channels.shape[1:])
        self.count += 1
        if label is not None:
            self.labels[label] += 1


def write_shards(tasks: list[Task], workers: int, budget: int) -> list[Written]:
    """Write all shards in parallel processes; stop as soon as more than `budget` images cannot be decoded."""
    left_out: list[dict[str, str]] = []
    with (
        tqdm(total=sum(len(task.items) for task in tasks), desc="shards", unit=" images", disable=None) as bar,
        ProcessPoolExecutor(min(workers, len(tasks))) as pool,
    ):
        futures = {pool.submit(_write_shard, task): task for task in tasks}
        for future in as_completed(futures):
            left_out += future.result().left_out
            bar.update(len(futures[future].items))
            if len(left_out) > budget:
                pool.shutdown(cancel_futures=True)
                shown = "; ".join(f"{bad['file']}: {bad['reason']}" for bad in left_out[:3])
                raise DataError(
                    f"more than {budget} images cannot be decoded ({shown}); remove them or raise max_left_out"
                )
    return [future.result() for future in futures]


def _write_shard(task: Task) -> Written:
    """Write one tar and its index, leaving out what cannot be decoded."""
    written = Written(task.target.name)
    with task.target.open("wb") as file:
        with TarWriter(file, encoder=False, mtime=0) as writer:
            for item in task.items:
                try:
                    data = (task.folder / item.path).read_bytes()
                    header = read_header(data)
                    pixels = decode(data, header.channels)
                except (BadImage, FileNotFoundError) as error:
                    reason = str(error) if isinstance(error, BadImage) else "the link leads nowhere"
                    written.left_out.append({"file": item.path, "reason": reason})
                    continue
                label = {} if item.label is None else {LABEL_MEMBER: str(item.label).encode()}
                writer.write({"__key__": item.key, header.ending: data, **label})
                written.add(header, pixels, item.label)
        file.flush()
        os.fsync(file.fileno())
    if written.count == 0:
        task.target.unlink()
        return written
    labelled = task.items[0].label is not None
    with task.target.with_suffix(".npy").open("wb") as file:
        np.save(file, build_index(str(task.target), labelled=labelled), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    with task.target.open("rb") as file:
        written.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    written.size = task.target.stat().st_size
    return written


def finish(root: Path, written: list[Written], classes: list[str] | None, source: dict[str, Any]) -> None:
    """Write the lock of a dataset."""
    left_out = [bad for w in written for bad in w.left_out]
    written = [w for w in written if w.count]
    if not written:
        raise DataError(
            f"none of the {len(left_out)} images can be decoded; {left_out[0]['file']}: {left_out[0]['reason']}"
        )
    shards = [{"file": w.file, "size": w.size, "sha256": w.sha256, "count": w.count} for w in written]
    members = {"image": sorted(set().union(*(w.endings for w in written)))}
    if classes is not None:
        members["label"] = [LABEL_MEMBER]
    schema = {"members": members, "classes": classes}
    lock = {
        "format": FORMAT,
        "dataset_id": dataset_id(shards, schema),
        "shards": shards,
        "schema": schema,
        "statistics": _statistics(written, classes),
        "left_out": left_out,
        "source": source,
        "tool": {"mimstream": __version__, "pillow": PIL.__version__},
    }
    write_lock(root, lock)


def _statistics(written: list[Written], classes: list[str] | None) -> dict[str, Any]:
    """Mean and deviation over all pixels in [0, 1], from integer histograms: exact, in any order of the shards."""
    channels = 3 if any(w.colour for w in written) else 1
    levels = np.sum([w.levels for w in written], axis=0)[:channels]  # (C, 256)
    values, total = np.arange(256) / 255, levels.sum(axis=1)  # (256,), (C,)
    mean = (levels * values).sum(axis=1) / total
    variance = (levels * (values - mean[:, None]) ** 2).sum(axis=1) / total
    height, width = np.concatenate([w.heights_widths for w in written]).T
    labels = sum((w.labels for w in written), Counter())
    return {
        "mean": mean.round(6).tolist(),
        "std": np.sqrt(variance).round(6).tolist(),
        "height": _spread(height),
        "width": _spread(width),
        "class_counts": [labels[label] for label in range(len(classes))] if classes is not None else None,
    }


def _spread(values: np.ndarray) -> dict[str, int]:
    return {"min": int(values.min()), "median": int(np.median(values)), "max": int(values.max())}
