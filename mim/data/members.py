"""The members of a tar -> its samples, by WebDataset's naming, with a stated result where WebDataset is silent.

- A key ends at the first dot of the file name, so `img.0001.jpg` is the member `0001.jpg` of the sample `img`, and no
  image. Endings are read in lower case; keys are not.
- The members of a sample are adjacent. A key that comes back is refused: WebDataset makes partial samples of it.
- A sample has one image. Two of them, or two members of one ending, are refused.
- A sample without an image, or marked `__bad__`, is left out by name. Names without key or ending, hidden files and
  `__meta__/...` belong to no sample; they are counted with the members that nothing reads.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mim.contracts import DataError
from mim.data import tar
from mim.data.decode import MAX_BYTES
from mim.data.listing import IMAGE_ENDINGS
from mim.data.shards import LABEL_MEMBER, index_dtype, key_hash, split_name
from mim.data.tar import Member
from mim.log import aside

META = re.compile(r"__[^/]*__($|/)")  # WebDataset's own rule
BAD = "__bad__"
MAX_ENDINGS = 64
SORT = "sort the members by name (tar --sort=name), or give each sample a key of its own"


class Group(NamedTuple):
    """The members of one sample."""

    key: str
    ending: str  # of the image: jpg, png, ...; "" without one
    image: Member | None
    label: Member | None
    reason: str  # why the sample cannot be used; "" when it can


def samples(
    location: str,
    members: Iterator[Member],
    *,
    labelled: bool,
    image_endings: Sequence[str] = IMAGE_ENDINGS,
    other: Counter[str] | None = None,  # counts, by ending, the members that nothing reads
) -> Iterator[Group]:
    """Group the members of a tar into samples. Raises DataError, naming tar and byte, where they are ambiguous."""
    other = Counter() if other is None else other
    seen: set[int] = set()
    current = ""
    found: dict[str, Member] = {}
    for member in members:
        key, ending = split_name(member.name)
        ending = ending.lower()
        if not ending or not key.rpartition("/")[2] or META.match(member.name):
            _count(other, "(no key or ending)")
            continue
        if found and key == current:
            if ending in found:
                raise _ambiguous(location, member, f"sample {key!r} has two members .{ending}")
        else:
            if found:
                yield _group(location, current, found, labelled, image_endings, other)
            if (number := key_hash(key)) in seen:
                raise _ambiguous(location, member, f"the key {key!r} comes back after other samples; {SORT}")
            seen.add(number)
            current, found = key, {}
        found[ending] = member
    if found:
        yield _group(location, current, found, labelled, image_endings, other)


def build_index(location: str, *, labelled: bool) -> np.ndarray:
    """Index a tar that this package wrote, by a strict scan: every sample must have its image, and its label."""

    def usable() -> Iterator[Group]:
        for group in samples(location, tar.scan(location), labelled=labelled):
            if group.reason:
                raise DataError(f"{location}: sample {group.key!r} cannot be used: {group.reason}")
            yield group

    return index_of(usable(), labelled=labelled)


def index_of(groups: Iterable[Group], *, labelled: bool) -> np.ndarray:
    """The index of a shard: one row per usable sample, in the order of the tar."""
    names = ["image", "label"] if labelled else ["image"]
    numbers = array("Q")  # 8 bytes a number: a list of tuples would take ten times that
    for group in groups:
        numbers.append(key_hash(group.key))
        for member in (group.image, group.label)[: len(names)]:
            assert member is not None, group
            numbers.extend(member[1:4])
    table = np.frombuffer(numbers, np.uint64).reshape(-1, 1 + 3 * len(names))
    index = np.zeros(len(table), dtype=index_dtype(names))
    index["key"] = table[:, 0]
    for i, name in enumerate(names):
        for j, field in enumerate(("offset", "size", "crc32")):
            index[name][field] = table[:, 1 + 3 * i + j]
    return index


def save_index(file: Path, index: np.ndarray) -> None:
    """Write an index aside, then rename it."""
    with aside(file, "wb") as handle:
        np.save(handle, index, allow_pickle=False)


def _group(
    location: str,
    key: str,
    found: dict[str, Member],
    labelled: bool,
    image_endings: Sequence[str],
    other: Counter[str],
) -> Group:
    images = [ending for ending in found if ending in image_endings]
    if len(images) > 1:
        choice = " or ".join(f"--image {ending}" for ending in images)
        raise _ambiguous(location, found[images[1]], f"sample {key!r} has {len(images)} images; choose {choice}")
    label = found.get(LABEL_MEMBER) if labelled else None
    for ending in found:
        if ending not in images and not (label and ending == LABEL_MEMBER):
            _count(other, ending)
    reason = ""
    if BAD in found:
        reason = f"it is marked {BAD}"
    elif not images:
        reason = f"it has no image; its members are {', '.join(list(found)[:5])}"
    elif (size := found[images[0]].size) > MAX_BYTES:
        reason = f"its image has {size} bytes; at most {MAX_BYTES} are decoded"
    elif labelled and label is None:
        image = found[images[0]]
        raise _ambiguous(location, image, f"sample {key!r} has no label (.{LABEL_MEMBER}); leave the labels out")
    elif label is not None and abs(label.offset - found[images[0]].offset) + label.size > MAX_BYTES:
        reason = f"its image and its label lie more than {MAX_BYTES} bytes apart"
    ending = "" if reason else images[0]
    return Group(key, ending, found[ending] if ending else None, label if ending else None, reason)


def _count(other: Counter[str], ending: str) -> None:
    """Count an ending; of a tar that holds a thousand of them, most are counted together."""
    other[ending if ending in other or len(other) < MAX_ENDINGS else "(more)"] += 1


def _ambiguous(location: str, member: Member, reason: str) -> DataError:
    return tar.refusal(location, member.offset - tar.BLOCK, reason)
