"""Copy a dataset into another number of shards: every sample byte for byte, in its order, verified as it is read.

Shards differ by at most one sample. Classes, statistics and what was left out stay; a quarantine moves along. Keys stay
too, unless two shards of the dataset share one: then the shard's name becomes part of every key. Only the members of
the schema are copied (image and label).
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mim import __version__
from mim.config import ConfigError
from mim.contracts import DataError, StorageError
from mim.data import duplicates
from mim.data.plan import PARTIAL, shard_name
from mim.data.shards import FORMAT, QUARANTINE, Dataset, dataset_id, is_dataset, read_lock, write_lock
from mim.data.workers import pool
from mim.data.write import sample_of, store_shard
from mim.log import write_json


@dataclass(frozen=True)
class ReshardReport:
    """What `reshard` did."""

    path: Path
    num_shards: int
    num_samples: int
    dataset_id: str
    images_per_second: float

    def text(self) -> str:
        """The report for people."""
        return f"{self.num_samples} samples in {self.num_shards} shards, {self.images_per_second:.0f}/s: {self.path}"


def reshard(path: str | Path, out: str | Path, *, num_shards: int, workers: int | None = None) -> ReshardReport:
    """Copy the dataset at `path` into `num_shards` shards in OUT. Raises ConfigError, DataError, StorageError."""
    path, out = Path(path), Path(out)
    dataset, lock = Dataset.open(path), read_lock(path)
    if not 1 <= num_shards <= len(dataset):
        raise ConfigError(f"--shards {num_shards} must lie from 1 to the {len(dataset)} samples of {path}")
    _check_free(out)
    qualified = bool(duplicates.keys(dataset, list(range(len(dataset.counts))))[1])
    bounds = [len(dataset) * i // num_shards for i in range(num_shards + 1)]
    work = out / PARTIAL
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        began = time.monotonic()
        shards = _copy_all(dataset, work, bounds, qualified, workers)
        new_id = _finish(path, out, work, lock, shards, bounds)
    except (StorageError, DataError):
        raise
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    rate = round(len(dataset) / max(time.monotonic() - began, 1e-9), 1)
    return ReshardReport(out, num_shards, len(dataset), new_id, rate)


def _check_free(out: Path) -> None:
    """Refuse a place that holds anything but what a killed `reshard` left there."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; choose a folder that is empty or new")
    if is_dataset(out) or (out.is_dir() and not (out / PARTIAL).is_dir() and any(out.iterdir())):
        raise ConfigError(f"{out} is not empty; choose a folder that is empty or new")


def _copy_all(
    dataset: Dataset, work: Path, bounds: list[int], qualified: bool, workers: int | None
) -> list[dict[str, Any]]:
    with (
        tqdm(total=len(dataset), desc="reshard", unit=" images", disable=None) as bar,
        pool(workers, len(bounds) - 1) as processes,
    ):
        futures = [
            processes.submit(_copy, dataset, work / shard_name(i), start, end, qualified)
            for i, (start, end) in enumerate(itertools.pairwise(bounds))
        ]
        for future in as_completed(futures):
            if error := future.exception():
                processes.shutdown(cancel_futures=True)
                raise error
            bar.update(future.result()["count"])
    return [future.result() for future in futures]


def _copy(dataset: Dataset, target: Path, start: int, end: int, qualified: bool) -> dict[str, Any]:
    """Write the samples `start` to `end` of a dataset as one shard; return its entry in the lock."""

    def samples() -> Iterator[dict[str, Any]]:
        for number in range(start, end):
            shard, row = dataset.locate(number)
            sample = dataset.read(shard, row)
            file, _, key = sample.key.partition("/")
            name = f"{Path(file).stem}/{key}" if qualified else key
            yield sample_of(name, dataset.image_ending(shard, row), sample.image, sample.label)

    size, sha256 = store_shard(target, samples(), labelled=dataset.classes is not None)
    return {"file": target.name, "size": size, "sha256": sha256, "count": end - start}


def _finish(
    path: Path, out: Path, work: Path, lock: dict[str, Any], shards: list[dict[str, Any]], bounds: list[int]
) -> str:
    """Move the shards out, write the quarantine and, last, the lock; return the new identity."""
    new_id = dataset_id(shards, lock["schema"])
    for shard in shards:
        for name in (shard["file"], Path(shard["file"]).with_suffix(".npy").name):
            (work / name).rename(out / name)
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
