"""The dataset folder: ordinary WebDataset tars, one index per tar, and a lock that says what they must be.

    shard-00000.tar      samples `key.jpg` (png, webp, bmp, tif, npy) and, when labelled, `key.cls` (an ASCII integer)
    shard-00000.npy      structured array, a row per sample: hash of the key; offset, size and CRC32 of each member
    dataset.lock.json    format, ordered shards (file, size, sha256, count), schema, statistics, what was left out

A shard may lie elsewhere: its entry then has a `url` (an absolute path or an URL), and only its index is in the folder.

`dataset_id` hashes only the ordered (sha256, size, count) and the schema: a dataset may move, and its statistics may
be taken again, without becoming another one. Reading is one `pread` per sample, proven by the CRC32 of each member
and by the hash of the key in the header before it. Only members that the schema names are read; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mim.config import ConfigError
from mim.contracts import DataError
from mim.data import tar
from mim.data.checksum import crc32
from mim.data.decode import ENDINGS
from mim.data.formats import DTYPES
from mim.data.store import Store

FORMAT = 1
LOCK = "dataset.lock.json"
IMAGE_MEMBERS = sorted(set(ENDINGS.values()))
LABEL_MEMBER = "cls"
MEMBER = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4")])


class Sample(NamedTuple):
    """One verified sample as it was stored."""

    key: str  # "shard-00000.tar/<key>"
    image: bytes
    label: int | None


class Dataset:
    """A dataset folder opened for reading. Cheap to pickle, safe to fork: indices and files are opened on use."""

    def __init__(self, path: Path, lock: dict[str, Any]):
        self.path = path
        self.id: str = lock["dataset_id"]
        self.counts = np.array([shard["count"] for shard in lock["shards"]], dtype=np.int64)
        self.classes: list[str] | None = lock["schema"]["classes"]
        statistics = lock["statistics"]
        self.mean: list[float] = statistics["mean"]  # per channel, of pixels in [0, 1]
        self.std: list[float] = statistics["std"]
        self.gray: dict[str, float] | None = statistics.get("gray")  # mean and std of colour read as gray
        self.channels = len(self.mean)  # 1 when every image is gray
        self.dtype: str = statistics.get("dtype", "uint8")  # of decoded pixels
        self.range: list[list[float]] = statistics.get("range") or [[0, DTYPES[self.dtype]]] * self.channels
        self._files: list[str] = [shard["file"] for shard in lock["shards"]]
        self._locations = [location(path, shard) for shard in lock["shards"]]
        self._members = ["image", "label"] if self.classes is not None else ["image"]
        self._indices: dict[int, np.ndarray] = {}
        self._store = Store()

    @classmethod
    def open(cls, path: str | Path) -> Dataset:
        """Open a dataset folder; check that its shards are present in full length."""
        path = Path(path)
        lock = read_lock(path)
        for shard in lock["shards"]:
            file = Path(location(path, shard))
            size = file.stat().st_size if file.is_file() else None
            if size != shard["size"]:
                fact = "is missing" if size is None else f"has {size} bytes instead of {shard['size']}"
                raise DataError(f"{file} {fact}; copy the dataset again")
        return cls(path, lock)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def map_range(self, value_range: list[list[float]]) -> None:
        """Let other raw values, [low, high] per channel, become 0 and 1; the statistics follow.

        What lies outside is clamped later, which the statistics do not know.
        """
        old, new = np.array(self.range, dtype=float), np.array(value_range, dtype=float)  # (C, 2)
        scale = (old[:, 1] - old[:, 0]) / (new[:, 1] - new[:, 0])
        shift = (old[:, 0] - new[:, 0]) / (new[:, 1] - new[:, 0])
        self.mean = (np.array(self.mean) * scale + shift).tolist()
        self.std = (np.array(self.std) * scale).tolist()
        if self.gray is not None:  # unknown when channels are mapped differently
            alike = len(set(zip(scale.tolist(), shift.tolist(), strict=True))) == 1
            gray = {"mean": self.gray["mean"] * scale[0] + shift[0], "std": self.gray["std"] * scale[0]}
            self.gray = gray if alike else None
        self.range = value_range

    def read(self, shard: int, row: int) -> Sample:
        """Read and verify one sample. Raises DataError on any difference from the index."""
        record = self._index(shard)[row]
        members = {name: record[name].item() for name in self._members}  # name -> (offset, size, crc32)
        start = min(offset for offset, _, _ in members.values()) - tar.BLOCK  # from the header of the first member
        end = max(offset + size for offset, size, _ in members.values())
        file = self._files[shard]
        data = self._store.pread(self._locations[shard], start, end - start)
        key, _ = split_name(tar.name_of(data[: tar.BLOCK]))
        where = f"{self._locations[shard]}, sample {key!r}"
        if key_hash(key) != record["key"]:
            raise DataError(f"{where}: the header differs from the index; the shard is damaged, copy it again")
        content = {}
        for name, (offset, size, crc) in members.items():
            content[name] = data[offset - start : offset - start + size]
            if crc32(content[name]) != crc:
                raise DataError(
                    f"{where}: CRC32 of the {name} differs from the index; the shard is damaged, copy it again"
                )
        label = self._label(content["label"], where) if "label" in content else None
        return Sample(f"{file}/{key}", content["image"], label)

    def _label(self, raw: bytes, where: str) -> int:
        assert self.classes is not None
        if not raw.isdigit() or int(raw) >= len(self.classes):
            raise DataError(f"{where}: label {raw[:20]!r} is not one of the {len(self.classes)} classes")
        return int(raw)

    def _index(self, shard: int) -> np.ndarray:
        if shard not in self._indices:
            file = (self.path / self._files[shard]).with_suffix(".npy")
            try:
                index = np.load(file, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise DataError(f"{file} is missing or no index ({error}); copy the dataset again") from error
            if index.dtype != index_dtype(self._members) or index.shape != (self.counts[shard],):
                raise DataError(f"{file} does not belong to the {self.counts[shard]} samples of its shard")
            self._indices[shard] = index
        return self._indices[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_indices": {}}


def location(path: Path, shard: dict[str, Any]) -> str:
    """Where the bytes of a shard of the lock lie."""
    return shard.get("url") or f"{path}/{shard['file']}"


def is_dataset(path: str | Path) -> bool:
    """Whether a folder is a finished dataset: the lock is written last."""
    return (Path(path) / LOCK).is_file()


def inspect(path: str | Path) -> dict[str, Any]:
    """What a dataset holds, from its lock alone."""
    lock = read_lock(Path(path))
    schema, statistics, shards = lock["schema"], lock["statistics"], lock["shards"]
    classes = schema["classes"]
    return {
        "path": str(path),
        "dataset_id": lock["dataset_id"],
        "num_samples": sum(shard["count"] for shard in shards),
        "num_shards": len(shards),
        "num_bytes": sum(shard["size"] for shard in shards),
        "num_left_out": len(lock["left_out"]),
        "members": schema["members"],
        "classes": dict(zip(classes, statistics["class_counts"], strict=True)) if classes is not None else None,
        "height": statistics["height"],
        "width": statistics["width"],
        "mean": statistics["mean"],
        "std": statistics["std"],
        "dtype": statistics.get("dtype", "uint8"),
        "range": statistics.get("range"),
    }


def read_lock(path: Path) -> dict[str, Any]:
    """Read and check the lock of a dataset folder."""
    file = path / LOCK
    if not file.is_file():
        parts = [str(path / name) for name in ("train", "val") if is_dataset(path / name)]
        remedy = f"use {' or '.join(parts)}" if parts else "make one: mim shards make FOLDER OUT"
        raise ConfigError(f"{path} is not a dataset, it holds no {LOCK}; {remedy}")
    try:
        lock = json.loads(file.read_bytes())
        version = lock["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not a dataset lock ({error!r}); copy or make the dataset again") from error
    if version > FORMAT:
        raise DataError(
            f"{file} has format {version}, newer than the {FORMAT} that this version reads; update mimstream"
        )
    if lock["dataset_id"] != dataset_id(lock["shards"], lock["schema"]):
        raise DataError(f"{file} was changed: its dataset_id is not that of its shards; copy or make the dataset again")
    if strange := [shard["file"] for shard in lock["shards"] if Path(shard["file"]).name != shard["file"]]:
        raise DataError(f"{file} names {strange[0]!r}, which is not a file of its own folder")
    return lock


def write_lock(path: Path, lock: dict[str, Any]) -> None:
    """Write the lock under a temporary name, then rename: a dataset folder has a whole lock or none."""
    temporary = path / f"{LOCK}.tmp"
    with temporary.open("w", encoding="ascii") as file:
        file.write(json.dumps(lock, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path / LOCK)


def dataset_id(shards: list[dict[str, Any]], schema: dict[str, Any]) -> str:
    """Identity of the content: no location, no statistics."""
    content = {"shards": [[s["sha256"], s["size"], s["count"]] for s in shards], "schema": schema}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def index_dtype(members: list[str]) -> np.dtype:
    """Row of a shard's index."""
    return np.dtype([("key", "<u8"), *((name, MEMBER) for name in members)])


def build_index(path: Path, *, labelled: bool) -> np.ndarray:
    """Index a tar by a strict scan. Every sample must have one image, and one label when `labelled`."""
    wanted = ["image", "label"] if labelled else ["image"]
    samples: dict[str, dict[str, tuple[int, int, int]]] = {}
    for member in tar.scan(path):
        key, ending = split_name(member.name)
        name = "image" if ending in IMAGE_MEMBERS else "label" if ending == LABEL_MEMBER else ending
        if name in samples.setdefault(key, {}):
            raise DataError(f"{path}: sample {key!r} has two members for {name}")
        samples[key][name] = (member.offset, member.size, member.crc32)
    index = np.zeros(len(samples), dtype=index_dtype(wanted))
    for row, (key, members) in enumerate(samples.items()):
        if missing := [name for name in wanted if name not in members]:
            raise DataError(f"{path}: sample {key!r} has no {', '.join(missing)}")
        index[row] = (key_hash(key), *(members[name] for name in wanted))
    return index


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name as WebDataset does: at the first dot of the last path component."""
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return folder + slash + stem, ending


def key_hash(key: str) -> int:
    """64-bit hash of a sample's key."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
