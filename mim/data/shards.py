"""The dataset folder: ordinary WebDataset tars, one index per tar, and a lock that says what they must be.

    shard-00000.tar      samples `key.jpg` (png, webp, bmp, tif, npy) and, when labelled, `key.cls` (an ASCII integer)
                         and `key.seg.png` (the class of every pixel, mim/data/label_map.py)
    shard-00000.npy      structured array, a row per sample: hash of the key; offset, size and CRC32 of each member
    dataset.lock.json    format, ordered shards (file, size, sha256, count), schema, statistics, what was left out

A shard may lie elsewhere: its entry then has a `url` (an absolute path or an URL), and only its index is in the folder.
A shard of which only the headers were read says so (`"proof": "headers"`): it has no sha256, its CRC32 are 0, and
`headers_sha256` takes the place of the hash.
Remote shards are read through the cache of this machine (`mim.data.cache`); opening a dataset asks no server.

`dataset_id` hashes only the ordered (sha256, size, count) and the schema: a dataset may move, and its statistics may
be taken again, without becoming another one. Reading is one `pread` per sample, proven by the CRC32 of each member
and by the hash of the key in the header before it; where only headers were read, by key, size and checksum of each
header. Only members that the schema names are read; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mim.config import ConfigError
from mim.contracts import DataError
from mim.data import tar
from mim.data.cache import RemoteShard, ShardCache
from mim.data.checksum import crc32
from mim.data.decode import MAX_BYTES
from mim.data.formats import DTYPES
from mim.data.location import check_storable, is_remote
from mim.data.mapped import MAX_MAPPED, map_array
from mim.data.order import Recent
from mim.data.shard_table import ShardTable, location
from mim.data.store import Store
from mim.log import write_json

FORMAT = 1
LOCK = "dataset.lock.json"
QUARANTINE = "quarantine.json"  # by verify: samples whose bytes are right, and that the decoder refuses
LABEL_MEMBER = "cls"
MEMBERS = ("image", "label", "label_map")  # of a sample
MAX_SPAN = 2 * MAX_BYTES  # of one sample, header and padding included: what one read may take in memory
MEMBER = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4")])


class Record(NamedTuple):
    """What the index says of one sample."""

    shard: int
    key_hash: int
    start: int  # the bytes that it fills: from the header of its first member
    end: int  # to the end of its last
    members: dict[str, tuple[int, int, int]]  # offset, size, CRC32


class Sample(NamedTuple):
    """One verified sample as it was stored."""

    key: str  # "shard-00000.tar/<key>"
    image: memoryview  # of what was read: nothing is copied
    label: int | None
    label_map: memoryview | None = None  # where it was asked for


class Dataset:
    """A dataset folder opened for reading. Cheap to pickle, safe to fork: indices and files are opened on use."""

    def __init__(self, path: Path, lock: dict[str, Any], *, cache: ShardCache | None = None):
        self.path = path
        self.id: str = lock["dataset_id"]
        self._shards = ShardTable(path, lock["shards"])
        self.counts = self._shards.counts
        self.classes: list[str] | None = lock["schema"]["classes"]
        self.pixel_classes: list[str] | None = lock["schema"].get("pixel_classes")  # of label maps
        statistics = lock["statistics"]
        self.mean: list[float] = statistics["mean"]  # per channel, of pixels in [0, 1]
        self.std: list[float] = statistics["std"]
        self.gray: dict[str, float] | None = statistics.get("gray")  # mean and std of colour read as gray
        self.channels = len(self.mean)  # 1 when every image is gray
        self.dtype: str = statistics.get("dtype", "uint8")  # of decoded pixels
        self.range: list[list[float]] = statistics.get("range") or [[0, DTYPES[self.dtype]]] * self.channels
        self.label_map_ending: str | None = lock["schema"]["members"].get("label_map", [None])[0]
        self._members = member_names(lock["schema"])
        self._indices: Recent[np.ndarray] = Recent(MAX_MAPPED)
        self.cache = cache or ShardCache()
        self._store = Store(cache=self.cache)

    @classmethod
    def open(cls, path: str | Path, *, cache_dir: str | Path | None = None, cache_limit: int | None = None) -> Dataset:
        """Open a dataset folder; check that its local shards are present in full length.

        cache_dir, cache_limit (bytes): of remote shards, see `ShardCache`.
        """
        path = Path(path)
        lock = read_lock(path)
        for shard in lock["shards"]:
            file = location(path, shard)
            if is_remote(file):
                continue
            size = _size_of(file)
            if size != shard["size"]:
                fact = "is missing" if size is None else f"has {size} bytes instead of {shard['size']}"
                raise DataError(f"{Path(file)} {fact}; copy the dataset again")
        return cls(path, lock, cache=ShardCache(cache_dir, limit=cache_limit))

    def __len__(self) -> int:
        return int(self.counts.sum())

    @property
    def remote_shards(self) -> dict[int, RemoteShard]:
        """Those that are no local files, by their number."""
        return {number: self._shards.remote_shard(number) for number in np.flatnonzero(self._shards.remote).tolist()}

    def longest_read(self) -> float:
        """Seconds within which any read has succeeded or failed, a wait for another process included; 0 if local."""
        sizes = self._shards.sizes[self._shards.remote]
        return 2 * self.cache.remote.patience.until(int(sizes.max())) if len(sizes) else 0.0

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
            gray = {"mean": float(self.gray["mean"] * scale[0] + shift[0]), "std": float(self.gray["std"] * scale[0])}
            self.gray = gray if alike else None
        self.range = value_range

    def read(self, shard: int, row: int, *, label_map: bool = False) -> Sample:
        """Read and verify one sample. Raises DataError on any difference from the index.

        A damaged copy in the cache is fetched again, once. label_map: read that too, where samples have one.
        """
        place = self._place(shard)
        record = self.record(shard, row, label_map=label_map)
        try:
            return self.unpack(record, self._store.pread(place, record.start, record.end - record.start))
        except DataError:
            if not self._store.recheck(place):
                raise
            return self.unpack(record, self._store.pread(place, record.start, record.end - record.start))

    def read_with(self, store: Store, shard: int, row: int, *, label_map: bool = False) -> Sample:
        """`read` through a store of the caller's own, for a few samples of a shard that may be far away."""
        record = self.record(shard, row, label_map=label_map)
        return self.unpack(record, store.pread(self.location(shard), record.start, record.end - record.start))

    def record(self, shard: int, row: int, *, label_map: bool = False) -> Record:
        """Look a sample up in the index, with its label map when asked. Raises DataError when that cannot be true."""
        key, *found = self.index(shard)[row].item()
        members = dict(zip(self._members, found, strict=True))
        if not label_map:
            members.pop("label_map", None)
        start = min([offset for offset, _, _ in members.values()]) - tar.BLOCK
        end = max([offset + size for offset, size, _ in members.values()])
        if not (0 <= start <= end <= self._shards.sizes[shard] and end - start <= MAX_SPAN):
            raise DataError(
                f"{self.location(shard)}, row {row}: the index is wrong, it leaves the shard; copy the dataset again"
            )
        return Record(shard, key, start, end, members)

    def unpack(self, record: Record, data: bytes) -> Sample:
        """Verify the bytes that a record spans and take them apart. Raises DataError on any difference from it."""
        shard, start = record.shard, record.start
        key = self._key(record, start, data[: tar.BLOCK])
        where = f"{self.location(shard)}, sample {key!r}"
        if key_hash(key) != record.key_hash:
            raise DataError(f"{where}: the header differs from the index; the shard is damaged, copy it again")
        view, content = memoryview(data), {}
        for name, (offset, size, crc) in record.members.items():
            member = name.replace("_", " ")
            at = offset - start  # of the member in `data`
            content[name] = view[at : at + size]
            if self._shards.headers_only[shard]:
                header = data[at - tar.BLOCK : at]
                of = self._key(record, offset - tar.BLOCK, header)
                if tar.parse(header, where, offset - tar.BLOCK)[0] != size or key_hash(of) != record.key_hash:
                    raise DataError(
                        f"{where}: the header of the {member} differs from the index; index the shard again"
                    )
            elif crc32(content[name]) != crc:
                raise DataError(
                    f"{where}: CRC32 of the {member} differs from the index; the shard is damaged, copy it again"
                )
        label = self._label(bytes(content["label"]), where) if "label" in content else None
        return Sample(f"{self._shards.files[shard]}/{key}", content["image"], label, content.get("label_map"))

    def image_ending(self, shard: int, row: int) -> str:
        """The ending of a sample's image member, as it is spelled."""
        record = self.record(shard, row)
        start = record.members["image"][0] - tar.BLOCK
        return split_name(self._name(record, start, self._store.pread(self._place(shard), start, tar.BLOCK)))[1]

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard, row) of a sample by its number in the order of the lock."""
        shard, row = locate(self._shards.ends, sample)
        return int(shard), int(row)

    def _key(self, record: Record, start: int, header: bytes) -> str:
        """The key in the header at `start`, or in the record before it, where long and non-ASCII names stand."""
        return split_name(self._name(record, start, header))[0]

    def _name(self, record: Record, start: int, header: bytes) -> str:
        """The name of the member of a record whose header is at `start`."""
        name = tar.name_of(header)
        if key_hash(split_name(name)[0]) == record.key_hash:
            return name
        before = max(0, start - tar.MAX_EXTENSION - tar.BLOCK)
        extension = self._store.pread(self._place(record.shard), before, start - before) if start else b""
        return tar.long_name_before(extension) or name

    def _label(self, raw: bytes, where: str) -> int:
        assert self.classes is not None
        if not raw.strip().isdigit() or int(raw) >= len(self.classes):  # a line end is what `echo` leaves
            raise DataError(f"{where}: label {raw[:20]!r} is not one of the {len(self.classes)} classes")
        return int(raw)

    def location(self, shard: int) -> str:
        """Where the bytes of a shard lie."""
        return self._shards.locations[shard]

    def _place(self, shard: int) -> str | RemoteShard:
        """What the store reads: a local file, or a remote shard through the cache."""
        return self._shards.remote_shard(shard) if self._shards.remote[shard] else self.location(shard)

    def index(self, shard: int) -> np.ndarray:
        """The index of a shard, mapped: one row per sample, of `index_dtype`."""
        return self._indices.get((shard,), lambda: self._open_index(shard))

    def _open_index(self, shard: int) -> np.ndarray:
        file = (self.path / self._shards.files[shard]).with_suffix(".npy")
        try:
            index = map_array(file)
        except (OSError, ValueError) as error:
            raise DataError(f"{file} is missing or no index ({error}); copy the dataset again") from error
        if index.dtype != index_dtype(self._members) or index.shape != (self.counts[shard],):
            raise DataError(f"{file} does not belong to the {self.counts[shard]} samples of its shard")
        return index

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_indices": Recent(MAX_MAPPED)}


def locate(ends: np.ndarray, samples: Any) -> tuple[Any, Any]:
    """Shard and row of a sample, or of an array of them, where shard i ends before sample `ends[i]`."""
    shard = np.searchsorted(ends, samples, side="right")
    return shard, samples - np.where(shard > 0, ends[shard - 1], 0)


def _size_of(file: str) -> int | None:
    """Bytes of a regular file; None when there is none."""
    try:
        found = os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


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
        "num_left_out": sum(entry.get("count", 1) for entry in lock["left_out"]),
        "proof": sorted({shard.get("proof", "bytes") for shard in shards}),
        "members": schema["members"],
        "classes": dict(zip(classes, statistics["class_counts"], strict=True)) if classes is not None else None,
        "height": statistics["height"],
        "width": statistics["width"],
        "mean": statistics["mean"],
        "std": statistics["std"],
        **_pixels_of(schema, statistics),
        "num_measured": statistics.get("num_measured", sum(shard["count"] for shard in shards)),
        "dtype": statistics.get("dtype", "uint8"),
        "range": statistics.get("range"),
    }


def _pixels_of(schema: dict[str, Any], statistics: dict[str, Any]) -> dict[str, Any]:
    """What is known of label maps: the share of each class among the labelled pixels, and of ignored ones among all."""
    if schema.get("pixel_classes") is None:
        return {}
    counts, ignored = statistics["pixel_counts"], statistics["ignored_pixels"]
    labelled = max(sum(counts), 1)
    shares = {n: round(count / labelled, 6) for n, count in zip(schema["pixel_classes"], counts, strict=True)}
    return {"pixel_classes": shares, "ignored_pixels": round(ignored / max(sum(counts) + ignored, 1), 6)}


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
    if strange := [shard["file"] for shard in lock["shards"] if not _is_plain(shard["file"])]:
        raise DataError(f"{file} names {strange[0]!r}, which is not a file of its own folder")
    _check_locations(file, lock)
    return lock


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file in its own folder. `Path` would take a second for 10^5 names."""
    return os.path.basename(name) == name and name not in ("", ".", "..")


def write_lock(path: Path, lock: dict[str, Any]) -> None:
    """Write the lock: a dataset folder has a whole one or none."""
    _check_locations(path / LOCK, lock)
    write_json(path / LOCK, lock)


def _check_locations(file: Path, lock: dict[str, Any]) -> None:
    """Refuse locations that are no shard's, and credentials: a lock is copied and shown. Raises ConfigError."""
    for shard in lock["shards"]:
        if shard.get("url"):
            check_storable(shard["url"], str(file))


def dataset_id(shards: list[dict[str, Any]], schema: dict[str, Any]) -> str:
    """Identity of the content: no location, no statistics."""
    hashes = [[s["sha256"] or s["headers_sha256"], s["size"], s["count"]] for s in shards]
    content = {"shards": hashes, "schema": schema}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def member_names(schema: dict[str, Any]) -> list[str]:
    """The members that a schema names, in the order of the index."""
    return [name for name in MEMBERS if name in schema["members"]]


def index_dtype(members: list[str]) -> np.dtype:
    """Row of a shard's index."""
    return np.dtype([("key", "<u8"), *((name, MEMBER) for name in members)])


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name as WebDataset does: at the first dot of the last path component."""
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return folder + slash + stem, ending


def key_hash(key: str) -> int:
    """64-bit hash of a sample's key."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
