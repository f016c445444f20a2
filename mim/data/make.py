"""A folder of images -> a dataset folder: every image decoded once, shuffled by a key, written as WebDataset tars.

The same images and options give the same bytes: paths are sorted, the shuffle is a keyed permutation, tars carry no
time. Encoded images are copied untouched. Nothing is visible in OUT before it is whole: shards are written into a
hidden folder of it and moved out by rename, the lock last. An image that cannot be decoded is left out by name; too
many of them end the making.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from mim.config import ConfigError
from mim.contracts import StorageError
from mim.data.listing import Listing, class_of, list_images, sample_keys
from mim.data.order import key64, permutation
from mim.data.shards import FORMAT, LOCK, is_dataset, read_lock
from mim.data.write import Item, Task, finish, write_shards

PARTIAL = ".partial"  # in OUT: what is being written; left by a killed process, removed by the next
LOCK_FILE = ".lock"  # in OUT: two processes that want the same dataset make it once


@dataclass(frozen=True)
class Options:
    """What decides the bytes of a dataset, besides the images."""

    labels_from_folders: bool = False
    val_ratio: float = 0.0
    shard_size: int = 1000  # samples
    seed: int = 0


@dataclass(frozen=True)
class MakeReport:
    """What `make` did."""

    path: Path  # the dataset to train on: OUT, or OUT/train
    val_path: Path | None  # OUT/val
    num_samples: int
    num_val_samples: int
    left_out: list[dict[str, str]]  # {"file", "reason"} of each image that cannot be decoded
    ignored: dict[str, int]  # files of other endings
    reused: bool  # OUT held the same dataset already

    def text(self) -> str:
        """The report for people."""
        lines = [f"{self.num_samples} images in {self.path}" + (" (made before, reused)" if self.reused else "")]
        if self.val_path is not None:
            lines.append(f"{self.num_val_samples} images held out in {self.val_path}")
        lines += [f"left out {entry['file']}: {entry['reason']}" for entry in self.left_out]
        if self.ignored:
            lines.append("ignored " + ", ".join(f"{count} {ending}" for ending, count in self.ignored.items()))
        return "\n".join(lines)


def make(
    folder: str | Path,
    out: str | Path,
    *,
    labels_from_folders: bool = False,
    val_ratio: float = 0.0,
    shard_size: int = Options.shard_size,
    seed: int = 0,
    workers: int | None = None,
    max_left_out: int | None = None,
) -> MakeReport:
    """Make the dataset OUT from the images under FOLDER; with `val_ratio` the two datasets OUT/train and OUT/val.

    labels_from_folders: the first folder below FOLDER is the class. workers: processes, default one per core.
    max_left_out: images that may fail to decode, default 1% and at least 10. Raises ConfigError, DataError,
    StorageError.
    """
    options = Options(labels_from_folders, val_ratio, shard_size, seed)
    if not 0 <= val_ratio < 1:
        raise ConfigError(f"val_ratio={val_ratio} must be at least 0 and below 1")
    if shard_size < 1:
        raise ConfigError(f"shard_size={shard_size} must be at least 1")
    return _make(list_images(Path(folder)), Path(out), options, workers, max_left_out)


def cached(
    folder: str | Path,
    cache_dir: str | Path,
    *,
    labels_from_folders: bool = False,
    val_ratio: float = 0.0,
    seed: int = 0,
) -> Path:
    """Make a folder's dataset once, under a name that changes with its images and the options; return its OUT."""
    listing = list_images(Path(folder))
    options = Options(labels_from_folders=labels_from_folders, val_ratio=val_ratio, seed=seed)
    place = hashlib.sha256(f"{listing.folder.resolve()}\0{_source(listing, options)}".encode(errors="surrogateescape"))
    out = Path(cache_dir) / f"{listing.folder.resolve().name}-{place.hexdigest()[:16]}"
    _make(listing, out, options, workers=None, max_left_out=None)
    return out


def _make(listing: Listing, out: Path, options: Options, workers: int | None, max_left_out: int | None) -> MakeReport:
    source = _source(listing, options)
    budget = max(10, len(listing.images) // 100) if max_left_out is None else max_left_out
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _exclusive(out):
            reused = _already_made(out, source, options)
            if not reused:
                _write(listing, out, options, source, workers or len(os.sched_getaffinity(0)), budget)
    except FileExistsError as error:
        raise ConfigError(f"{out} is a file; choose a folder that is empty or new") from error
    except OSError as error:
        raise StorageError(f"cannot make {out}: {error}") from error
    return _report(out, listing, options, reused)


def _write(listing: Listing, out: Path, options: Options, source: str, workers: int, budget: int) -> None:
    """Write everything into the hidden folder, then move it out, each lock after its shards."""
    classes, parts = _split(listing, options)
    partial = out / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    try:
        tasks = {name: _tasks(listing, partial / name, items, options) for name, items in parts.items()}
        written = iter(write_shards([task for part in tasks.values() for task in part], workers, budget))
        for name, part in tasks.items():
            finish(partial / name, [next(written) for _ in part], classes, {"hash": source, **asdict(options)})
        for name in tasks:
            (out / name).mkdir(exist_ok=True)
            for file in sorted((partial / name).iterdir(), key=lambda file: file.name == LOCK):
                file.rename(out / name / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _source(listing: Listing, options: Options) -> str:
    """Hash of what a dataset is made from, without reading the images."""
    digest = hashlib.sha256(repr((FORMAT, asdict(options))).encode())
    for image in listing.images:
        digest.update(f"{image.path}\0{image.size}\0{image.mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


@contextlib.contextmanager
def _exclusive(out: Path) -> Iterator[None]:
    with (out / LOCK_FILE).open("a") as file:
        with contextlib.suppress(OSError):  # file systems without locks: two makers write the same bytes, one may fail
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _roots(out: Path, options: Options) -> list[Path]:
    return [out / "train", out / "val"] if options.val_ratio else [out]


def _already_made(out: Path, source: str, options: Options) -> bool:
    """Whether OUT holds exactly this dataset; refuse if it holds anything else."""
    roots = _roots(out, options)
    if all(is_dataset(root) and read_lock(root)["source"].get("hash") == source for root in roots):
        return True
    if (out / PARTIAL).exists() and not all(is_dataset(root) for root in roots):
        return False  # a killed process began here, in an empty folder; what it moved out already is overwritten
    if any(is_dataset(root) for root in (out, out / "train", out / "val")):
        raise ConfigError(
            f"{out} holds a dataset made from other images or options; choose another folder or delete it"
        )
    if strange := sorted(entry.name for entry in out.iterdir() if entry.name not in (PARTIAL, LOCK_FILE)):
        raise ConfigError(f"{out} is not empty (it holds {strange[0]!r}); choose a folder that is empty or new")
    return False


def _split(listing: Listing, options: Options) -> tuple[list[str] | None, dict[str, list[Item]]]:
    """Return the classes, and the shuffled items of each dataset to write ("" is OUT itself).

    An image is in val by a hash of its own path, so it stays there when others are added.
    """
    paths = [image.path for image in listing.images]
    keys = sample_keys(paths)
    names = [class_of(path) for path in paths] if options.labels_from_folders else None
    classes = sorted(set(names)) if names is not None else None
    number = {name: label for label, name in enumerate(classes or [])}
    parts: dict[str, list[Item]] = {"train": [], "val": []} if options.val_ratio else {"": []}
    for i in permutation(len(paths), "make", options.seed):
        held_out = key64("val", options.seed, paths[i]) < options.val_ratio * 2**63
        part = ("val" if held_out else "train") if options.val_ratio else ""
        parts[part].append(Item(paths[i], keys[i], number[names[i]] if names is not None else None))
    if empty := [part for part, items in parts.items() if not items]:
        raise ConfigError(
            f"val_ratio={options.val_ratio} leaves no image of {len(paths)} for {empty[0]}; choose another"
        )
    return classes, parts


def _tasks(listing: Listing, root: Path, items: list[Item], options: Options) -> list[Task]:
    root.mkdir(parents=True)
    starts = range(0, len(items), options.shard_size)
    return [
        Task(listing.folder, root / f"shard-{number:05d}.tar", items[start : start + options.shard_size])
        for number, start in enumerate(starts)
    ]


def _report(out: Path, listing: Listing, options: Options, reused: bool) -> MakeReport:
    roots = _roots(out, options)
    locks = [read_lock(root) for root in roots]
    counts = [sum(shard["count"] for shard in lock["shards"]) for lock in locks]
    return MakeReport(
        path=roots[0],
        val_path=roots[1] if len(roots) > 1 else None,
        num_samples=counts[0],
        num_val_samples=sum(counts[1:]),
        left_out=[bad for lock in locks for bad in lock["left_out"]],
        ignored=listing.ignored,
        reused=reused,
    )
