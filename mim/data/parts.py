"""Work in parts: `--part i/n` lets any scheduler run n processes on n machines that know nothing of each other.

Part i takes every n-th shard, beginning with the i-th, and leaves a file that says what it did; `mim shards join`
checks that all n are there and that they did parts of the same work.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mim.config import ConfigError
from mim.contracts import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """Part `number` of `count`, from 1."""

    number: int
    count: int

    def take(self, items: list[T]) -> list[T]:
        """The items of this part."""
        return items[self.number - 1 :: self.count]

    def file(self, stem: str) -> str:
        """Name of the file that this part leaves."""
        return f"{stem}.part-{self.number}-of-{self.count}.json"


WHOLE = Part(1, 1)


def parse_part(text: str | None) -> Part | None:
    """Read `i/n`."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    part = Part(int(match[1]), int(match[2])) if match else None
    if part is None or not 1 <= part.number <= part.count:
        raise ConfigError(f"--part {text} is no part; write i/n with i from 1 to n, e.g. --part 3/8")
    return part


def read_parts(folder: Path, stem: str) -> list[dict[str, Any]]:
    """Read what all parts of one work left in a folder, in their order; [] when there is none.

    Raises ConfigError when a part is missing or does not belong to the others.
    """
    found: dict[int, dict[str, Any]] = {}
    counts = set()
    for file in sorted(folder.glob(f"{stem}.part-*-of-*.json")):
        match = re.fullmatch(re.escape(stem) + r"\.part-(\d+)-of-(\d+)\.json", file.name)
        if match is None:
            continue
        try:
            found[int(match[1])] = json.loads(file.read_bytes())
        except ValueError as error:
            raise DataError(f"{file} is not what a part leaves ({error}); run this part again") from error
        counts.add(int(match[2]))
    if not found:
        return []
    if len(counts) > 1:
        raise ConfigError(f"{folder} holds parts of {' and of '.join(map(str, sorted(counts)))}; run all of one count")
    count = counts.pop()
    if missing := [number for number in range(1, count + 1) if number not in found]:
        shown = ", ".join(f"{number}/{count}" for number in missing[:10])
        raise ConfigError(f"{folder}: {len(missing)} of {count} parts are missing: run --part {shown}")
    parts = [found[number] for number in range(1, count + 1)]
    if strange := [i + 1 for i, part in enumerate(parts) if part.get("source") != parts[0].get("source")]:
        raise ConfigError(
            f"{folder}: part {strange[0]} of {count} was made from other data or options than part 1; run it again"
        )
    return parts


def remove_parts(folder: Path, stem: str) -> None:
    """Remove what parts left, once it has been joined."""
    for file in folder.glob(f"{stem}.part-*-of-*.json"):
        file.unlink(missing_ok=True)
