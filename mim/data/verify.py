"""Verify a dataset: every byte of every shard is read once, in parallel, and whatever differs from the lock is named.

Errors, which end in exit code 65:
    damaged         bytes that are not those of the index or the lock: truncated, flipped, replaced, mixed up
    duplicate_key   two samples of one shard with the same key
    unreadable      the bytes are proven right, and the decoder refuses them (`decode` only)
Told, but no error: keys that occur in several shards (a sample's name is shard/key), and images with the same bytes.

With `decode`, the unreadable samples are written to `quarantine.json` beside the lock, which training reads. Only what
is proven right by CRC32 is quarantined: a damaged byte says nothing about the image, and is never skipped over.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections import Counter
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from mim.contracts import DataError, StorageError
from mim.data import duplicates, tar
from mim.data.checksum import crc32
from mim.data.decode import FORMATS, BadImage
from mim.data.parts import WHOLE, Part, read_parts, remove_parts
from mim.data.quarantine import FORMAT
from mim.data.shards import QUARANTINE, Dataset, read_lock
from mim.data.store import Store
from mim.data.workers import opened, pool
from mim.data.write import Written, read_pixels, statistics_of
from mim.log import write_json

STEM = QUARANTINE.removesuffix(".json")  # of the files that parts leave
NAMED = 100  # keys in several shards: foreign tars may share all of them
SHOWN = 10  # findings of a kind in the text for people; JSON has them all
BITS = {"1": 1, "I;16": 16, "I;16L": 16, "I;16B": 16, "I;16N": 16, "I": 32, "F": 32}  # other modes: 8


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    kind: str  # damaged, duplicate_key or unreadable
    shard: str
    row: int | None  # in the shard; None for the shard as a whole
    key: str | None
    reason: str
    proven: bool = True  # whether the bytes are those that were indexed


@dataclass
class Checked:
    """What came of one shard."""

    shard: int
    findings: list[Finding] = field(default_factory=list)
    contents: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))  # (count,) CRC32 and size of an image
    modes: Counter[str] = field(default_factory=Counter)
    written: Written = field(default_factory=lambda: Written(""))  # sums for the statistics


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found."""

    path: Path
    dataset_id: str
    part: str | None
    num_shards: int
    num_samples: int
    num_bytes: int
    seconds: float
    images_per_second: float
    findings: list[Finding]
    num_same_keys: int  # keys that occur in several shards
    same_keys: list[list[str]]  # "shard/key" of their samples, for the first NAMED of them
    same_contents: list[list[str]]  # "shard/key" of images with the same bytes
    decoded: dict[str, Any] | None  # modes and statistics of all images
    quarantine: Path | None  # the file that was written

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def text(self) -> str:
        """The report for people."""
        lines = [
            f"{self.path}: {self.num_samples} samples in {self.num_shards} shards, {self.num_bytes / 1e6:.1f} MB, "
            f"{self.images_per_second:.0f} images/s"
        ]
        for name, value in (self.decoded or {}).items():
            lines.append(f"{name:8} {value}")
        for kind in ("damaged", "duplicate_key", "unreadable"):
            found = [finding for finding in self.findings if finding.kind == kind]
            lines += [f"{kind}: {_where(finding)}: {finding.reason}" for finding in found[:SHOWN]]
            if len(found) > SHOWN:
                lines.append(f"{kind}: {len(found) - SHOWN} more; --json names all")
        told = (
            ("same key", self.same_keys, self.num_same_keys),
            ("same bytes", self.same_contents, len(self.same_contents)),
        )
        for name, groups, count in told:
            lines += [f"{name}: {', '.join(group)}" for group in groups[:SHOWN]]
            if count > SHOWN:
                lines.append(f"{name}: {count - SHOWN} more")
        if self.quarantine is not None:
            lines.append(f"wrote {self.quarantine}")
        kinds = Counter(finding.kind for finding in self.findings)
        lines.append("clean" if self.clean else ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
        return "\n".join(lines)


def verify(
    path: str | Path,
    *,
    decode: bool = False,
    workers: int | None = None,
    part: Part | None = None,
) -> VerifyReport:
    """Read every byte of a dataset and compare it with index and lock.

    decode: also decode every image, and write the quarantine. part: verify only the shards of this part; duplicates are
    then looked for among these alone. Raises ConfigError, StorageError, and DataError where the lock is unusable.
    """
    path = Path(path)
    lock = read_lock(path)
    dataset = Dataset(path, lock)  # not `open`: what that refuses is reported here, for all shards
    shards = (part or WHOLE).take(list(range(len(lock["shards"]))))
    began = time.monotonic()
    checked = _check_all(path, lock, shards, decode, workers)
    seconds = time.monotonic() - began
    findings = [finding for one in checked for finding in one.findings]
    twice, same_keys, num_same_keys = duplicates.keys(dataset, shards, named=NAMED)
    findings += [
        Finding("duplicate_key", lock["shards"][shard]["file"], row, key, f"row {first} of the shard has the same key")
        for shard, first, row, key in twice
    ]
    samples = sum(lock["shards"][shard]["count"] for shard in shards)
    return VerifyReport(
        path=path,
        dataset_id=dataset.id,
        part=f"{part.number}/{part.count}" if part is not None else None,
        num_shards=len(shards),
        num_samples=samples,
        num_bytes=sum(lock["shards"][shard]["size"] for shard in shards),
        seconds=round(seconds, 3),
        images_per_second=round(samples / max(seconds, 1e-9), 1),
        findings=findings,
        num_same_keys=num_same_keys,
        same_keys=same_keys,
        same_contents=duplicates.contents(dataset, {one.shard: one.contents for one in checked}),
        decoded=_decoded(checked) if decode else None,
        quarantine=_quarantine(path, dataset.id, findings, part) if decode else None,
    )


def join_quarantines(path: Path) -> int | None:
    """Make one quarantine of those of all parts; return how many samples it holds, None when there are no parts."""
    parts = read_parts(path, STEM)
    if not parts:
        return None
    dataset_id = read_lock(path)["dataset_id"]
    if parts[0]["dataset_id"] != dataset_id:
        raise DataError(f"{path} holds quarantines of another dataset; verify it again")
    joined = [sample for one in parts for sample in one["samples"]]
    joined.sort(key=lambda sample: (sample["shard"], sample["row"]))
    write_json(path / QUARANTINE, {"format": FORMAT, "dataset_id": dataset_id, "samples": joined})
    remove_parts(path, STEM)
    return len(joined)


def _check_all(
    path: Path, lock: dict[str, Any], shards: list[int], decode_images: bool, workers: int | None
) -> list[Checked]:
    total = sum(lock["shards"][shard]["count"] for shard in shards)
    with (
        tqdm(total=total, desc="verify", unit=" images", disable=None) as bar,
        pool(workers, len(shards)) as processes,
    ):
        futures = {processes.submit(_check, path, shard, decode_images): shard for shard in shards}
        for future in as_completed(futures):
            if error := future.exception():
                processes.shutdown(cancel_futures=True)
                raise error
            bar.update(lock["shards"][futures[future]]["count"])
    return [future.result() for future in futures]


def _check(path: Path, shard: int, decode_images: bool) -> Checked:
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
            record = dataset.record(shard, row)
            if record.start < file.at:
                raise tar.refusal(location, record.start, "two samples of the index overlap")
            file.take_until(record.start)
            sample = dataset.unpack(record, file.take(record.end - record.start))
        except DataError as error:
            damaged(str(error), row)
            continue
        checked.contents[row] = crc32(sample.image) << 32 | len(sample.image)
        if decode_images:
            _decode(checked, entry, row, sample)
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


def _decode(checked: Checked, entry: dict[str, Any], row: int, sample: Any) -> None:
    """Decode one image for its verdict, its mode and the statistics."""
    try:
        header, pixels = read_pixels(sample.image)
    except BadImage as error:
        proven = entry.get("proof", "bytes") == "bytes"
        reason = str(error) if proven else f"{error}; its bytes are not proven (index the shard without --headers-only)"
        key = sample.key.partition("/")[2]
        checked.findings.append(Finding("unreadable", entry["file"], row, key, reason, proven))
        return
    checked.modes[mode_of(sample.image, pixels)] += 1
    checked.written.add(header, pixels, sample.label)


def mode_of(data: bytes | memoryview, pixels: Tensor) -> str:
    """Format, mode and bits per channel of an encoded image, e.g. "PNG I;16 16 bit"."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return f"{image.format} {image.mode} {BITS.get(image.mode, 8)} bit"
    except UnidentifiedImageError:  # an array that Pillow does not know
        return f"array of {pixels.shape[0]} channels, {str(pixels.dtype).removeprefix('torch.')}"


def _decoded(checked: list[Checked]) -> dict[str, Any]:
    modes = sum((one.modes for one in checked), Counter[str]())
    written = [one.written for one in checked if one.written.count]
    statistics = statistics_of(written, None) if written else {}
    return {"modes": dict(modes.most_common()), **{k: v for k, v in statistics.items() if v is not None}}


def _quarantine(path: Path, dataset_id: str, findings: list[Finding], part: Part | None) -> Path:
    """Write the samples that training must replace."""
    samples = [
        {"shard": finding.shard, "row": finding.row, "key": finding.key, "reason": finding.reason}
        for finding in findings
        if finding.kind == "unreadable" and finding.proven
    ]
    samples.sort(key=lambda sample: (sample["shard"], sample["row"]))
    content: dict[str, Any] = {"format": FORMAT, "dataset_id": dataset_id, "samples": samples}
    if part is not None:
        content["source"] = dataset_id
    file = path / (part.file(STEM) if part is not None else QUARANTINE)
    try:
        write_json(file, content)
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error.strerror}") from error
    return file


def _where(finding: Finding) -> str:
    place = "" if finding.row is None else f" row {finding.row}"
    return f"{finding.shard}{place}{f' ({finding.key})' if finding.key else ''}"
