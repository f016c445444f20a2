"""Images -> a dataset folder: every image decoded once, shuffled by a key, written as WebDataset tars.

The same images and options give the same bytes: the shuffle is a keyed permutation, tars carry no time. Encoded images
are copied untouched unless they are to be shrunk. Nothing is visible in OUT before it is whole: shards are written into
a hidden folder of it and moved out by rename, the lock last. What a killed process finished is kept, under the hash of
images and options, and reused when its own hash is right. An image that cannot be decoded is left out by name; too many
of them end the making.

With `part`, only every n-th shard is written and all stay in the hidden folder; `join` moves them out.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mim.config import ConfigError
from mim.contracts import IGNORE, DataError
from mim.data.listing import list_images
from mim.data.pairs import Masks, read_classes, with_masks
from mim.data.parts import WHOLE, Part, remove_parts
from mim.data.plan import PARTIAL, QUALITY, Options, Plan, identity_of, plan_of, shard_name
from mim.data.shards import LOCK, is_dataset, read_lock
from mim.data.sources import Source, from_folder, open_source
from mim.data.write import Task, Written, count_pixels, facts_file, finish, move_out, read_facts, storing, write_shards
from mim.log import write_json

LOCK_FILE = ".lock"  # in OUT: two processes that want the same dataset make it once
STEM = LOCK.removesuffix(".json")  # of the files that parts leave


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
    images_per_second: float = 0.0  # written now; what a killed process had finished counts too
    part: str | None = None  # i/n: only these shards were made

    def text(self) -> str:
        """The report for people."""
        lines = [
            f"{self.num_samples} images in {self.path}"
            + (" (made before, reused)" if self.reused else f", {self.images_per_second:.0f}/s")
        ]
        if self.part is not None:
            lines = [f"{self.num_samples} images in part {self.part}; when all are: mim shards join {self.path}"]
        if self.val_path is not None:
            lines.append(f"{self.num_val_samples} images held out in {self.val_path}")
        lines += [f"left out {entry['file']}: {entry['reason']}" for entry in self.left_out]
        if self.ignored:
            lines.append("ignored " + ", ".join(f"{count} {ending}" for ending, count in self.ignored.items()))
        return "\n".join(lines)


def make(
    source: str | Path,
    out: str | Path,
    *,
    labels_from_folders: bool = False,
    labels: str | None = None,
    val_ratio: float = 0.0,
    shard_size: int = Options.shard_size,
    seed: int = 0,
    short: int | None = None,
    quality: int | None = None,
    masks: str | Path | None = None,
    classes: str | None = None,
    mask_suffix: str | None = None,
    zero_ignored: bool = False,
    skip_unpaired: bool = False,
    workers: int | None = None,
    max_left_out: int | None = None,
    part: Part | None = None,
) -> MakeReport:
    """Make the dataset OUT from the images of SOURCE; with `val_ratio` the two datasets OUT/train and OUT/val.

    source: what `mim/data/sources.py` reads. labels_from_folders: the first folder below SOURCE is the class. labels:
    "cls" of tars, or a column of a saved dataset. short: images with a larger short side are shrunk to it and stored as
    JPEG of `quality`. masks: the folder of their label maps (`mim/data/pairs.py`); classes, mask_suffix, zero_ignored
    and skip_unpaired go with it. workers: processes, default one per core. max_left_out: images that may fail to
    decode, default 1% and at least 10. Raises ConfigError, DataError, StorageError.
    """
    if not 0 <= val_ratio < 1:
        raise ConfigError(f"val_ratio={val_ratio} must be at least 0 and below 1")
    if shard_size < 1:
        raise ConfigError(f"shard_size={shard_size} must be at least 1")
    if short is not None and short < 1:
        raise ConfigError(f"--resize short={short} must be at least 1 pixel")
    if quality is not None and (short is None or not 1 <= quality <= 100):
        raise ConfigError(f"--quality {quality} must lie from 1 to 100, and needs --resize short=N")
    quality = QUALITY if short is not None and quality is None else quality
    opened = open_source(source, labels_from_folders=labels_from_folders, labels=labels)
    given = Masks(mask_suffix, zero_ignored, read_classes(classes), skip_unpaired)
    if masks is not None:
        opened = with_masks(opened, Path(masks), given)
    elif given != Masks():
        raise ConfigError("--classes, --mask-suffix, --zero-ignored and --skip-unpaired go with --masks DIR; add it")
    kept = given if masks is not None else None
    options = Options(labels_from_folders, val_ratio, shard_size, seed, labels, short, quality, kept)
    return _make(opened, Path(out), options, workers, max_left_out, part)


def cached(
    folder: str | Path,
    cache_dir: str | Path,
    *,
    labels_from_folders: bool = False,
    val_ratio: float = 0.0,
    seed: int = 0,
) -> Path:
    """Make a folder's dataset once, under a name that changes with its images and the options; return its OUT."""
    folder = Path(folder)
    options = Options(labels_from_folders=labels_from_folders, val_ratio=val_ratio, seed=seed)
    source = from_folder(list_images(folder), labels_from_folders=labels_from_folders)
    place = hashlib.sha256(f"{folder.resolve()}\0{identity_of(source, options)}".encode(errors="surrogateescape"))
    out = Path(cache_dir) / f"{folder.resolve().name}-{place.hexdigest()[:16]}"
    _make(source, out, options, workers=None, max_left_out=None, part=None)
    return out


def join(out: Path, content: dict[str, Any]) -> MakeReport:
    """Move out what all parts have made, and write the locks; `content` is what each of them left."""
    source = dict(content["source"])
    identity = source.pop("hash")
    options = Options.restored(source)
    plan = Plan(
        out, options, identity, content["classes"], {name: [] for name in content["splits"]}, content["left_out"]
    )
    targets = {
        name: [plan.work / name / shard_name(number) for number in range(count)]
        for name, count in content["splits"].items()
    }
    if _is_whole(plan):  # joined before, by a process that was killed at the very end
        shutil.rmtree(out / PARTIAL, ignore_errors=True)
        remove_parts(out, STEM)
        return _report(plan, {}, reused=True)
    if missing := [file for files in targets.values() for file in files if not facts_file(file).is_file()]:
        raise DataError(f"{missing[0]} and {len(missing) - 1} more shards are not there; run their parts again")
    with storing(out), _exclusive(out, WHOLE):
        _publish(plan, targets)
    return _report(plan, {}, reused=False)


def _make(
    source: Source, out: Path, options: Options, workers: int | None, max_left_out: int | None, part: Part | None
) -> MakeReport:
    plan = plan_of(source, out, options)
    tasks = (part or WHOLE).take([task for split in plan.splits.values() for task in split])
    num_images = sum(len(task.items) for task in tasks)
    budget = max(10, num_images // 100) if max_left_out is None else max_left_out
    with storing(out):
        out.mkdir(parents=True, exist_ok=True)
        with _exclusive(out, part or WHOLE):
            reused = _already_made(plan)
            if reused:
                shutil.rmtree(out / PARTIAL, ignore_errors=True)  # what a kill at the very end left
            rate = 0.0
            if not reused:
                began = time.monotonic()
                written = _write(plan, tasks, workers, budget, part)
                rate = round(num_images / max(time.monotonic() - began, 1e-9), 1)
                if part is not None:
                    write_json(out / part.file(STEM), plan.content())
                    bad = [entry for one in written for entry in one.left_out]
                    count = sum(one.count for one in written)
                    name = f"{part.number}/{part.count}"
                    return MakeReport(out, None, count, 0, bad, source.ignored, False, rate, part=name)
    return _report(plan, source.ignored, reused, rate)


def _write(plan: Plan, tasks: list[Task], workers: int | None, budget: int, part: Part | None) -> list[Any]:
    """Write shards into the hidden folder; without parts, move them out, each lock after its shards."""
    if part is None and (plan.out / PARTIAL).is_dir():
        for other in (plan.out / PARTIAL).iterdir():  # of other images or options
            if other != plan.work:
                shutil.rmtree(other) if other.is_dir() else other.unlink()
    for name in plan.splits:
        (plan.work / name).mkdir(parents=True, exist_ok=True)
    try:
        written = write_shards(tasks, workers, budget)
        if part is None:
            _publish(plan, {name: [task.target for task in tasks] for name, tasks in plan.splits.items()})
    except DataError:
        if part is None:
            shutil.rmtree(plan.out / PARTIAL, ignore_errors=True)
        raise
    return written


def _publish(plan: Plan, targets: dict[str, list[Path]]) -> None:
    """Move finished shards out of the hidden folder. May be repeated after a kill at any point."""
    written = {name: [read_facts(file) for file in files] for name, files in targets.items()}
    pixel_classes = _pixel_classes(plan.options.masks, written.values())
    for i, (name, some) in enumerate(written.items()):
        source = {"hash": plan.identity, **plan.options.described()}
        if plan.options.short is not None:
            source["filter"] = "bicubic, antialiased"
        finish(plan.work / name, some, plan.classes, source, plan.left_out if i == 0 else [], pixel_classes)
    for name, files in targets.items():
        (plan.out / name).mkdir(exist_ok=True)
        move_out(files, plan.out / name)
        (plan.work / name / LOCK).rename(plan.out / name / LOCK)
    shutil.rmtree(plan.out / PARTIAL, ignore_errors=True)
    remove_parts(plan.out, STEM)


def _pixel_classes(masks: Masks | None, splits: Iterable[list[Written]]) -> list[str] | None:
    """The classes of label maps: as stated, else as many as occur in any split; None without maps."""
    if masks is None or masks.classes is not None:
        return None if masks is None else list(masks.classes or ())
    counts = count_pixels(one for written in splits for one in written)[:IGNORE]
    if not counts.any():
        raise DataError("the label maps hold no class at all: every pixel is 255, or 0 under --zero-ignored")
    return [str(number) for number in range(int(np.flatnonzero(counts)[-1]) + 1)]


@contextlib.contextmanager
def _exclusive(out: Path, part: Part) -> Iterator[None]:
    """Wait for others that make the same: all of it, or the same part of it."""
    name = LOCK_FILE if part.count == 1 else f"{LOCK_FILE}-{part.number}-of-{part.count}"
    with (out / name).open("a") as file:
        with contextlib.suppress(OSError):  # file systems without locks: two makers write the same bytes, one may fail
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _roots(out: Path, options: Options) -> list[Path]:
    return [out / "train", out / "val"] if options.val_ratio else [out]


def _is_whole(plan: Plan) -> bool:
    roots = _roots(plan.out, plan.options)
    return all(is_dataset(root) and read_lock(root)["source"].get("hash") == plan.identity for root in roots)


def _already_made(plan: Plan) -> bool:
    """Whether OUT holds exactly this dataset; refuse if it holds anything else."""
    out, roots = plan.out, _roots(plan.out, plan.options)
    if _is_whole(plan):
        return True
    if (out / PARTIAL).exists() and not all(is_dataset(root) for root in roots):
        return False  # a killed process began here, in an empty folder; what it moved out already is overwritten
    if any(is_dataset(root) for root in (out, out / "train", out / "val")):
        raise ConfigError(
            f"{out} holds a dataset made from other images or options; choose another folder or delete it"
        )
    own = (PARTIAL, LOCK_FILE, STEM)
    if strange := sorted(entry.name for entry in out.iterdir() if not entry.name.startswith(own)):
        raise ConfigError(f"{out} is not empty (it holds {strange[0]!r}); choose a folder that is empty or new")
    return False


def _report(plan: Plan, ignored: dict[str, int], reused: bool, rate: float = 0.0) -> MakeReport:
    roots = _roots(plan.out, plan.options)
    locks = [read_lock(root) for root in roots]
    counts = [sum(shard["count"] for shard in lock["shards"]) for lock in locks]
    return MakeReport(
        path=roots[0],
        val_path=roots[1] if len(roots) > 1 else None,
        num_samples=counts[0],
        num_val_samples=sum(counts[1:]),
        left_out=[bad for lock in locks for bad in lock["left_out"]],
        ignored=ignored,
        reused=reused,
        images_per_second=rate,
    )
