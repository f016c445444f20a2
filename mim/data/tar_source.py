"""Existing tars as a source of `mim shards make`: headers are listed, images are read when they are written."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mim.config import ConfigError
from mim.contracts import DataError
from mim.data import tar
from mim.data.listing import sample_keys
from mim.data.locations import expand, names
from mim.data.members import samples
from mim.data.shards import LABEL_MEMBER
from mim.data.sources import Source
from mim.data.store import Store

MAX_LABEL = 20  # bytes


class Place(NamedTuple):
    """Where an image lies."""

    location: str
    offset: int
    size: int


@dataclass(frozen=True)
class Tars:
    """Reads members of tars."""

    store: Store = field(default_factory=Store)

    def read(self, place: Place) -> bytes:
        return self.store.pread(*place)


def names_tars(text: str) -> bool:
    """Whether `make` takes an argument for tars: a .tar, braces or a URL of them, or a folder with .tar files."""
    path = Path(text)
    return any(path.rglob("*.tar")) if path.is_dir() else "://" in text or path.suffix == ".tar"


def from_tars(text: str, *, labels: str | None) -> Source:
    """The samples of tars, in their order. Raises ConfigError, and DataError for what is ambiguous or damaged."""
    if labels not in (None, LABEL_MEMBER):
        raise ConfigError(f"--labels {labels} is unknown for tars; use --labels {LABEL_MEMBER}")
    store, ignored = Store(), Counter[str]()
    found: list[tuple[str, str, str]] = []  # tar, key, ending
    places, marks, classes, left_out = [], [], [], []
    locations = expand([text])
    for location, name in zip(locations, names(locations), strict=True):
        modified = os.stat(location).st_mtime_ns if "://" not in location else 0
        members = tar.scan(location, store=store, keep=MAX_LABEL if labels else 0, headers_only=True)
        for group in samples(location, members, labelled=labels is not None, other=ignored):
            if group.image is None:
                left_out.append({"file": f"{name}/{group.key}", "reason": group.reason})
                continue
            found.append((Path(name).stem, group.key, group.ending))
            places.append(Place(location, group.image.offset, group.image.size))
            marks.append(f"{group.image.offset}\0{group.image.size}\0{modified}")
            if group.label is not None:
                raw = (group.label.data or b"").strip()
                if not raw.isdigit():
                    raise DataError(f"{location}: the label of sample {group.key!r} is no class number")
                classes.append(str(int(raw)))
    if not found:
        raise ConfigError(f"{text} holds no images; its other members: {dict(ignored.most_common(8))}")
    count = Counter(key for _, key, _ in found)
    repeated = any(number > 1 for number in count.values())  # then the tar's name becomes part of all keys
    paths = [f"{stem}/{key}.{ending}" if repeated else f"{key}.{ending}" for stem, key, ending in found]
    return Source(
        reader=Tars(),
        names=paths,
        keys=sample_keys(paths),
        places=places,
        marks=marks,
        labels=classes if labels is not None else None,
        ignored=dict(ignored.most_common()),
        left_out=left_out,
    )
