"""What came of verifying: the findings of each shard, the report on all of them, and the quarantine.

A part of the work leaves what it found; the report on the whole is made from that, so that it is the one of a process
that did all alone, with the duplicates between the parts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mim.data import duplicates
from mim.data.parts import Part
from mim.data.quarantine import FORMAT
from mim.data.shards import QUARANTINE, Dataset
from mim.data.tar import padding_told
from mim.data.write import IN_FACTS, Written, statistics_of, storing
from mim.log import write_json

NAMED = 100  # keys in several shards: foreign tars may share all of them
SHOWN = 10  # findings of a kind in the text for people; JSON has them all


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
    padding: dict[str, int]  # zero bytes after the end of each tar that has more of them than tar writers leave
    decoded: dict[str, Any] | None  # modes and statistics of all images
    quarantine: Path | None  # the file that was written
    num_quarantined: int | None  # samples in it

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
        lines += padding_told(self.padding)
        if self.quarantine is not None:
            lines.append(f"wrote {self.quarantine}")
        kinds = Counter(finding.kind for finding in self.findings)
        lines.append("clean" if self.clean else ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
        if self.part is not None:
            lines.append(f"part {self.part} is done; when all are: mim shards join {self.path}")
        return "\n".join(lines)


IN_PARTS = (Checked, Finding, *IN_FACTS)  # every class that a part leaves


def report_of(
    path: Path, lock: dict[str, Any], checked: list[Checked], *, decode: bool, seconds: float, part: Part | None = None
) -> VerifyReport:
    """Look for duplicates among all that was checked, and report; of a whole dataset write the quarantine too."""
    dataset = Dataset(path, lock)
    shards = [one.shard for one in checked]
    entries = [lock["shards"][shard] for shard in shards]
    findings = [finding for one in checked for finding in one.findings]
    twice, same_keys, num_same_keys = duplicates.keys(dataset, shards, named=NAMED)
    findings += [
        Finding("duplicate_key", lock["shards"][shard]["file"], row, key, f"row {first} of the shard has the same key")
        for shard, first, row, key in twice
    ]
    samples = sum(entry["count"] for entry in entries)
    bad = _quarantine(path, dataset.id, findings) if decode and part is None else None
    return VerifyReport(
        path=path,
        dataset_id=dataset.id,
        part=f"{part.number}/{part.count}" if part is not None else None,
        num_shards=len(shards),
        num_samples=samples,
        num_bytes=sum(entry["size"] for entry in entries),
        seconds=round(seconds, 3),
        images_per_second=round(samples / max(seconds, 1e-9), 1),
        findings=findings,
        num_same_keys=num_same_keys,
        same_keys=same_keys,
        same_contents=duplicates.contents(dataset, {one.shard: one.contents for one in checked}),
        padding={entry["file"]: entry["padding"] for entry in entries if "padding" in entry},
        decoded=_decoded(checked, dataset.pixel_classes) if decode else None,
        quarantine=path / QUARANTINE if bad is not None else None,
        num_quarantined=bad,
    )


def _decoded(checked: list[Checked], pixel_classes: list[str] | None) -> dict[str, Any]:
    modes = sum((one.modes for one in checked), Counter[str]())
    written = [one.written for one in checked if one.written.count]
    statistics = statistics_of(written, None, pixel_classes) if written else {}
    return {"modes": dict(modes.most_common()), **{k: v for k, v in statistics.items() if v is not None}}


def _quarantine(path: Path, dataset_id: str, findings: list[Finding]) -> int:
    """Write the samples that training must replace; return how many they are."""
    samples = [
        {"shard": finding.shard, "row": finding.row, "key": finding.key, "reason": finding.reason}
        for finding in findings
        if finding.kind == "unreadable" and finding.proven
    ]
    samples.sort(key=lambda sample: (sample["shard"], sample["row"]))
    file = path / QUARANTINE
    with storing(file):
        write_json(file, {"format": FORMAT, "dataset_id": dataset_id, "samples": samples})
    return len(samples)


def _where(finding: Finding) -> str:
    place = "" if finding.row is None else f" row {finding.row}"
    return f"{finding.shard}{place}{f' ({finding.key})' if finding.key else ''}"
