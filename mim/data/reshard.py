"""Copy a dataset into another number of shards: every sample byte for byte, in its order, verified as it is read.

Shards differ by at most one sample. Classes, statistics and what was left out stay; a quarantine moves along. Keys stay
too, unless two shards of the dataset share one: then the shard's name becomes part of every key. Only the members of
the schema are copied (image, label and label map).

As in `make`, nothing is visible in OUT before all is whole, and what a killed copy had finished is kept, under the hash
of dataset and options.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mim import __version__
from mim.config import ConfigError
from mim.contracts import DataError
from mim.data import duplicates, facts
from mim.data.locations import mark
from mim.data.plan import PARTIAL, shard_name
from mim.data.shards import FORMAT, QUARANTINE, Dataset, dataset_id, is_dataset, read_lock, write_lock
from mim.data.store import Store
from mim.data.workers import opened, run_all
from mim.data.write import Written, facts_file, finished, move_out, sample_of, store_shard, storing
from mim.log import write_json


@dataclass(frozen=True)
class Task:
    """One shard to write: the samples `start` to `end` of the dataset at `path`."""

    path: Path
    target: Path
    moved: Path  # where it lies when a killed copy had begun to move finished shards out
    start: int
    end: int
    qualified: bool  # whether the old shard's name becomes part of every key


@dataclass(frozen=True)
class ReshardReport:
    """What `reshard` did."""

    path: Path
    num_shards: int
    num_samples: int
    dataset_id: str
    num_kept: int  # shards that a killed copy had finished
    began_anew: bool  # OUT held an unfinished copy of other data, or into another number of shards
    images_per_second: float  # copied now

    def text(self) -> str:
        """The report for people."""
        lines = [f"{self.num_samples} samples in {self.num_shards} shards, {self.images_per_second:.0f}/s: {self.path}"]
        if self.num_kept:
            lines.append(f"{self.num_kept} of the shards were finished before a stop, and were kept")
        if self.began_anew:
            lines.append("began anew: what lay unfinished in OUT was of other data or another number of shards")
        return "\n".join(lines)


def reshard(path: str | Path, out: str | Path, *, num_shards: int, workers: int | None = None) -> ReshardReport:
    """Copy the dataset at `path` into `num_shards` shards in OUT. Raises ConfigError, DataError, StorageError."""
    path, out = Path(path), Path(out)
    dataset, lock = Dataset.open(path), read_lock(path)
    if not 1 <= num_shards <= len(dataset):
        raise ConfigError(f"--shards {num_shards} must lie from 1 to the {len(dataset)} samples of {path}")
    work = out / PARTIAL / _identity(dataset, lock, num_shards)
    with storing(out):
        if is_dataset(out) and work.is_dir():  # killed after the lock was written
            shutil.rmtree(out / PARTIAL)
            return ReshardReport(out, num_shards, len(dataset), read_lock(out)["dataset_id"], num_shards, False, 0.0)
        _check_free(out)
        qualified = duplicates.shards_share_keys(dataset)
        began_anew = _remove_others(out, work)
        work.mkdir(parents=True, exist_ok=True)
        bounds = [len(dataset) * i // num_shards for i in range(num_shards + 1)]
        tasks = [
            Task(path, work / shard_name(i), out / shard_name(i), bounds[i], bounds[i + 1], qualified)
            for i in range(num_shards)
        ]
        began = time.monotonic()
        try:
            results = run_all(
                _copy, tasks, workers=workers, description="reshard", total=len(dataset), done=lambda _, r: r[0].count
            )
        except DataError:  # of the dataset, not of this machine: nothing to go on from
            shutil.rmtree(out / PARTIAL, ignore_errors=True)
            raise
        seconds = max(time.monotonic() - began, 1e-9)
        new_id = _finish(path, out, work, lock, [written.entry() for written, _ in results], bounds)
    copied = sum(written.count for written, kept in results if not kept)
    return ReshardReport(
        path=out,
        num_shards=num_shards,
        num_samples=len(dataset),
        dataset_id=new_id,
        num_kept=sum(kept for _, kept in results),
        began_anew=began_anew,
        images_per_second=round(copied / seconds, 1),
    )


def _check_free(out: Path) -> None:
    """Refuse a place that holds anything but what a killed `reshard` left there."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; choose a folder that is empty or new")
    if is_dataset(out) or (out.is_dir() and not (out / PARTIAL).is_dir() and any(out.iterdir())):
        raise ConfigError(f"{out} is not empty; choose a folder that is empty or new")


def _identity(dataset: Dataset, lock: dict[str, Any], num_shards: int) -> str:
    """Hash of what is copied, and how. Where no sha256 proves a shard, its size and time or ETag stand for it."""
    store = Store()
    unproven = [i for i, shard in enumerate(lock["shards"]) if shard["sha256"] is None]
    marks = [mark(dataset.location(i), store) for i in unproven]
    what = (FORMAT, __version__, lock["dataset_id"], marks, num_shards)
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def _remove_others(out: Path, work: Path) -> bool:
    """Remove what an unfinished copy of other data or options left, also what it had moved out already."""
    others = [other for other in work.parent.iterdir() if other != work] if work.parent.is_dir() else []
    for other in others:
        shutil.rmtree(other)
    for file in out.glob("shard-*") if others else []:
        file.unlink()
    return bool(others)


def _copy(task: Task) -> tuple[Written, bool]:
    """Write one shard and its facts; return them, and whether a killed copy had finished it."""
    if (kept := finished(task.target, task.moved)) is not None:
        return kept, True
    dataset, _ = opened(task.path)

    def samples() -> Iterator[dict[str, Any]]:
        for number in range(task.start, task.end):
            shard, row = dataset.locate(number)
            sample = dataset.read(shard, row, label_map=True)
            file, _, key = sample.key.partition("/")
            name = f"{Path(file).stem}/{key}" if task.qualified else key
            images = {dataset.image_ending(shard, row): sample.image, dataset.label_map_ending: sample.label_map}
            yield sample_of(name, images, sample.label)

    labelled, label_map = dataset.classes is not None, dataset.label_map_ending
    size, sha256 = store_shard(task.target, samples(), labelled=labelled, label_map=label_map)
    written = Written(task.target.name, size, sha256, task.end - task.start)
    facts.save(facts_file(task.target), written)
    return written, False


def _finish(
    path: Path, out: Path, work: Path, lock: dict[str, Any], shards: list[dict[str, Any]], bounds: list[int]
) -> str:
    """Move the shards out, write the quarantine and, last, the lock; return the new identity."""
    new_id = dataset_id(shards, lock["schema"])
    move_out([work / shard["file"] for shard in shards], out)
    old = path / QUARANTINE
    if old.is_file():
        quarantine = json.loads(old.read_bytes())
        if quarantine["dataset_id"] == lock["dataset_id"]:
            moved = [_moved(sample, lock["shards"], bounds) for sample in quarantine["samples"]]
            write_json(out / QUARANTINE, {"format": quarantine["format"], "dataset_id": new_id, "samples": moved})
    write_lock(
        out,
        {
            "format": FORMAT,
            "dataset_id": new_id,
            "shards": shards,
            "schema": lock["schema"],
            "statistics": lock["statistics"],
            "left_out": lock["left_out"],
            "source": {"command": "reshard", "dataset_id": lock["dataset_id"], "num_shards": len(shards)},
            "tool": {**lock["tool"], "mimstream": __version__},
        },
    )
    shutil.rmtree(out / PARTIAL)
    return new_id


def _moved(sample: dict[str, Any], shards: list[dict[str, Any]], bounds: list[int]) -> dict[str, Any]:
    """An entry of the quarantine at its new place."""
    before = 0
    for shard in shards:
        if shard["file"] == sample["shard"]:
            break
        before += shard["count"]
    number = before + sample["row"]
    new = next(i for i in range(len(bounds) - 1) if bounds[i + 1] > number)
    return {**sample, "shard": shard_name(new), "row": number - bounds[new]}
