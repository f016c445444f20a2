"""One tar -> its index and its facts, unless an index that was stopped has left them.

The facts of a finished tar lie in a hidden folder of OUT until the lock is written. They are kept when the size and the
time (or the ETag) of the tar, the options and the index are what they were; a remote tar without ETag is read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mim import __version__
from mim.contracts import DataError
from mim.data import tar
from mim.data.listing import IMAGE_ENDINGS
from mim.data.locations import mark
from mim.data.members import Group, index_of, samples, save_index
from mim.data.shards import FORMAT
from mim.data.store import Store
from mim.log import write_json

FINISHED = ".indexed"  # in OUT
MAX_LEFT_OUT = 100  # samples of one shard that the lock names; the others are counted
MAX_LABEL = 20  # bytes of a label
MAX_CLASSES = 1_000_000


@dataclass(frozen=True)
class Options:
    """What decides an index, besides the tars."""

    headers_only: bool = False
    labels: str | None = None  # "cls", or None
    image: str | None = None  # ending of the image member; None: whichever known one is there
    label_maps: str | None = None  # ending of the label map's member; None: none is read


@dataclass(frozen=True)
class Task:
    """One tar to index."""

    number: int
    location: str
    name: str
    folder: Path
    options: Options


class Result(NamedTuple):
    """What came of a tar."""

    facts: dict[str, Any]
    kept: bool = False  # from an index before a stop
    stale: bool = False  # that one was of other options or another tar


def index_or_keep(task: Task) -> Result:
    """Index one tar, unless an index before a stop has done so and nothing has changed since."""
    place = (task.folder / FINISHED / task.name).with_suffix(".json")
    rows = (task.folder / task.name).with_suffix(".npy")
    now = mark(task.location, Store())
    what = hashlib.sha256(repr((FORMAT, __version__, task.location, now, asdict(task.options))).encode()).hexdigest()
    found: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        found = json.loads(place.read_bytes())
        if now is not None and found.get("what") == what and found.get("index") == _hash(rows):
            return Result(found["facts"] | {"number": task.number}, kept=True)
    facts = index_shard(task)
    write_json(place, {"what": what, "index": _hash(rows) if facts["count"] else None, "facts": facts})
    return Result(facts, stale=bool(found))


def _hash(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def index_shard(task: Task) -> dict[str, Any]:
    """Index one tar; return its facts."""
    store, digest, other = Store(), hashlib.sha256(), Counter[str]()
    labelled = task.options.labels is not None
    endings = (task.options.image,) if task.options.image else IMAGE_ENDINGS
    keep = MAX_LABEL if labelled else 0
    padding = 0
    facts: dict[str, Any] = {"number": task.number, "file": task.name, "url": task.location}
    found, labels = set(), Counter[int]()
    left_out: list[dict[str, Any]] = []
    num_left_out = 0

    def members() -> Iterator[tar.Member]:
        nonlocal padding
        only = task.options.headers_only
        padding = yield from tar.scan(task.location, store=store, keep=keep, headers_only=only, digest=digest)

    def usable() -> Iterator[Group]:
        nonlocal num_left_out
        groups = samples(
            task.location,
            members(),
            labelled=labelled,
            label_map=task.options.label_maps,
            image_endings=endings,
            other=other,
        )
        for group in groups:
            if group.reason:
                num_left_out += 1
                if num_left_out <= MAX_LEFT_OUT:
                    left_out.append({"file": f"{task.name}/{group.key}", "reason": group.reason})
                continue
            found.add(group.ending)
            if group.label is not None:
                labels[_label(task.location, group)] += 1
            yield group

    rows = index_of(usable(), labelled=labelled, mapped=task.options.label_maps is not None)
    if num_left_out > MAX_LEFT_OUT:
        count = num_left_out - MAX_LEFT_OUT
        left_out.append({"file": task.name, "reason": f"{count} more samples like these", "count": count})
    if len(rows):
        save_index((task.folder / task.name).with_suffix(".npy"), rows)
    elif num_left_out or other:
        raise _nothing_usable(task, other)
    else:
        left_out.append({"file": task.name, "reason": "the tar is empty"})
    proof = {"sha256": None, "proof": "headers", "headers_sha256": digest.hexdigest()}
    facts |= proof if task.options.headers_only else {"sha256": digest.hexdigest()}
    facts |= {"size": store.size(task.location), "count": len(rows), "endings": sorted(found), "left_out": left_out}
    if padding > tar.RECORD:
        facts["padding"] = padding
    return facts | {"class_counts": {str(label): labels[label] for label in sorted(labels)}, "other": dict(other)}


def _label(location: str, group: Group) -> int:
    assert group.label is not None
    raw = group.label.data
    if raw is None or not raw.strip().isdigit() or int(raw) >= MAX_CLASSES:
        shown = raw if raw is not None else f"{group.label.size} bytes"
        raise DataError(f"{location}: sample {group.key!r} has the label {shown!r}; a class number below a million is")
    return int(raw)


def _nothing_usable(task: Task, other: Counter[str]) -> DataError:
    shown = ", ".join(f"{ending} ({count})" for ending, count in other.most_common(8))
    wanted = f".{task.options.image}" if task.options.image else f"one of {', '.join(IMAGE_ENDINGS)}"
    likely = next((ending for ending, _ in other.most_common() if ending.rpartition(".")[2] in IMAGE_ENDINGS), None)
    remedy = f"; perhaps --image {likely}" if likely and not task.options.image else ""
    return DataError(
        f"{task.location}: no sample has an image ({wanted}, after the first dot of the name); found: {shown}{remedy}"
    )
