"""Verify a dataset: every byte of every shard is read once, in parallel, and whatever differs from the lock is named.

Errors, which end in exit code 65:
    damaged         bytes that are not those of the index or the lock: truncated, flipped, replaced, mixed up
    duplicate_key   two samples of one shard with the same key
    unreadable      the bytes are proven right, and the decoder refuses them, or those of the label map (`decode` only)
Told, but no error: keys that occur in several shards (a sample's name is shard/key), and images with the same bytes.

With `decode`, the unreadable samples are written to `quarantine.json` beside the lock, which training reads. Only what
is proven right by CRC32 is quarantined: a damaged byte says nothing about the image, and is never skipped over.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mim.contracts import DataError
from mim.data import facts, tar
from mim.data.checksum import crc32
from mim.data.decode import FORMATS, BadImage
from mim.data.parts import WHOLE, Part, read_parts, remove_parts
from mim.data.shards import Dataset, Sample, read_lock
from mim.data.store import Store
from mim.data.verdict import IN_PARTS, Checked, Finding, VerifyReport, report_of
from mim.data.workers import opened, run_all
from mim.data.write import read_sample, storing
from mim.log import write_json

STEM = "verify"  # of the files that parts leave
BITS = {"1": 1, "I;16": 16, "I;16L": 16, "I;16B": 16, "I;16N": 16, "I": 32, "F": 32}  # other modes: 8


def verify(
    path: str | Path,
    *,
    decode: bool = False,
    workers: int | None = None,
    part: Part | None = None,
) -> VerifyReport:
    """Read every byte of a dataset and compare it with index and lock.

    decode: also decode every image, and write the quarantine. part: verify only the shards of this part and leave what
    was found for `join`; the report looks for duplicates among these shards alone, and no quarantine is written. Raises
    ConfigError, StorageError, and DataError where the lock is unusable.
    """
    path = Path(path)
    lock = read_lock(path)  # not `Dataset.open`: what that refuses is reported here, for all shards
    shards = (part or WHOLE).take(list(range(len(lock["shards"]))))
    counts = [shard["count"] for shard in lock["shards"]]
    began = time.monotonic()
    checked = run_all(
        functools.partial(_check, path, decode),
        shards,
        workers=workers,
        description="verify",
        total=sum(counts[shard] for shard in shards),
        done=lambda shard, _: counts[shard],
    )
    seconds = time.monotonic() - began
    if part is not None:
        source = {"dataset_id": lock["dataset_id"], "decode": decode}
        file = path / part.file(STEM)
        with storing(file):
            write_json(file, {"source": source, "seconds": seconds, "checked": facts.plain(checked)})
    return report_of(path, lock, checked, decode=decode, seconds=seconds, part=part)


def join(path: Path) -> VerifyReport | None:
    """Report on a dataset whose parts were verified, as one process would have; None when there are no parts.

    Raises ConfigError when a part is missing, DataError when one cannot be read or is of another dataset.
    """
    parts = read_parts(path, STEM)
    if not parts:
        return None
    lock, source = read_lock(path), parts[0]["source"]
    if source["dataset_id"] != lock["dataset_id"]:
        raise DataError(f"{path} holds reports on another dataset ({STEM}.part-*.json); verify it again")
    found = [facts.restored(part["checked"], f"{path}/{STEM}.part-*.json", *IN_PARTS) for part in parts]
    checked = sorted(itertools.chain.from_iterable(found), key=lambda one: one.shard)
    if [one.shard for one in checked] != list(range(len(lock["shards"]))):
        raise DataError(f"{path}: the parts do not hold each of the {len(lock['shards'])} shards once; verify it again")
    report = report_of(path, lock, checked, decode=source["decode"], seconds=sum(part["seconds"] for part in parts))
    remove_parts(path, STEM)
    return report


def _check(path: Path, decode_images: bool, shard: int) -> Checked:
    dataset, entries = opened(path)
    return check_shard(dataset, entries[shard], shard, decode_images)


def check_shard(dataset: Dataset, entry: dict[str, Any], shard: int, decode_images: bool) -> Checked:
    """Read one shard from its first byte to its last, and compare it with its index and its entry in the lock."""
    checked = Checked(shard)

    def damaged(reason: str, row: int | None = None) -> None:
        checked.findings.append(Finding("damaged", entry["file"], row, None, reason, proven=False))

    location = dataset.location(shard)
    if "://" not in location and not os.path.lexists(location):
        damaged(f"{location} is missing")
        return checked
    digest = hashlib.sha256()
    try:
        file = tar.Forward(location, Store(), digest=digest)
        index = dataset.index(shard)
    except DataError as error:
        damaged(str(error))
        return checked
    if file.size != entry["size"]:
        damaged(f"{location} has {file.size} bytes instead of {entry['size']}")
    checked.contents = np.zeros(len(index), np.uint64)
    for row in np.argsort(index["image"]["offset"], kind="stable").tolist():
        try:
            record = dataset.record(shard, row, label_map=True)
            if record.start < file.at:
                raise tar.refusal(location, record.start, "two samples of the index overlap")
            file.take_until(record.start)
            sample = dataset.unpack(record, file.take(record.end - record.start))
        except DataError as error:
            damaged(str(error), row)
            continue
        checked.contents[row] = crc32(sample.image) << 32 | len(sample.image)
        if decode_images:
            _decode(checked, entry, row, sample, dataset.pixel_classes)
    file.take_until(file.size)
    if reason := _hash_differs(location, entry, digest.hexdigest()):
        damaged(reason)
    return checked


def _hash_differs(location: str, entry: dict[str, Any], sha256: str) -> str:
    """Why a shard is not the one of the lock, with the place where its structure is broken; "" when it is."""
    headers = hashlib.sha256()
    fault = ""
    if entry["sha256"] == sha256:
        return ""
    try:
        for _ in tar.scan(location, headers_only=True, digest=headers):
            pass
    except DataError as error:
        fault = f" ({error})"
    if entry["sha256"] is None and not fault and headers.hexdigest() == entry["headers_sha256"]:
        return ""
    what = "sha256" if entry["sha256"] is not None else "hash of the headers"
    return f"{location}: the {what} differs from the lock{fault}; the shard is damaged or another, copy it again"


def _decode(checked: Checked, entry: dict[str, Any], row: int, sample: Sample, classes: list[str] | None) -> None:
    """Decode one image and its label map for their verdict, the image's mode and the statistics."""
    try:
        header, pixels, label_map = read_sample(sample, classes)
    except BadImage as error:
        proven = entry.get("proof", "bytes") == "bytes"
        reason = str(error) if proven else f"{error}; its bytes are not proven (index the shard without --headers-only)"
        key = sample.key.partition("/")[2]
        checked.findings.append(Finding("unreadable", entry["file"], row, key, reason, proven))
        return
    checked.modes[mode_of(sample.image, pixels)] += 1
    checked.written.add(header, pixels, label_map, sample.label)


def mode_of(data: bytes | memoryview, pixels: Tensor) -> str:
    """Format, mode and bits per channel of an encoded image, e.g. "PNG I;16 16 bit"."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return f"{image.format} {image.mode} {BITS.get(image.mode, 8)} bit"
    except UnidentifiedImageError:  # an array that Pillow does not know
        return f"array of {pixels.shape[0]} channels, {str(pixels.dtype).removeprefix('torch.')}"
