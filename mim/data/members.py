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
    label_map: Member | None
    reason: str  # why the sample cannot be used; "" when it can


class Wanted(NamedTuple):
    """What is read of a sample."""

    images: tuple[str, ...]  # endings
    labelled: bool
    label_map: str | None  # ending


def samples(
    location: str,
    members: Iterator[Member],
    *,
    labelled: bool,
    label_map: str | None = None,  # ending of the label map, which every sample then has
    image_endings: Sequence[str] = IMAGE_ENDINGS,
    other: Counter[str] | None = None,  # counts, by ending, the members that nothing reads
) -> Iterator[Group]:
    """Group the members of a tar into samples. Raises DataError, naming tar and byte, where they are ambiguous."""
    other = Counter() if other is None else other
    wanted = Wanted(tuple(ending for ending in image_endings if ending != label_map), labelled, label_map)
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
                yield _group(location, current, found, wanted, other)
            if (number := key_hash(key)) in seen:
                raise _ambiguous(location, member, f"the key {key!r} comes back after other samples; {SORT}")
            seen.add(number)
            current, found = key, {}
        found[ending] = member
    if found:
        yield _group(location, current, found, wanted, other)


def build_index(location: str, *, labelled: bool, label_map: str | None = None) -> np.ndarray:
    """Index a tar that this package wrote, by a strict scan: every sample must have all members that are named."""

    def usable() -> Iterator[Group]:
        for group in samples(location, tar.scan(location), labelled=labelled, label_map=label_map):
            if group.reason:
                raise DataError(f"{location}: sample {group.key!r} cannot be used: {group.reason}")
            yield group

    return index_of(usable(), labelled=labelled, mapped=label_map is not None)


def index_of(groups: Iterable[Group], *, labelled: bool, mapped: bool = False) -> np.ndarray:
    """The index of a shard: one row per usable sample, in the order of the tar. mapped: with their label maps."""
    names = ["image"] + ["label"] * labelled + ["label_map"] * mapped
    numbers = array("Q")  # 8 bytes a number: a list of tuples would take ten times that
    for group in groups:
        numbers.append(key_hash(group.key))
        for member in (getattr(group, name) for name in names):
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


def _group(location: str, key: str, found: dict[str, Member], wanted: Wanted, other: Counter[str]) -> Group:
    images = [ending for ending in found if ending in wanted.images]
    if len(images) > 1:
        choice = " or ".join(f"--image {ending}" for ending in images)
        raise _ambiguous(location, found[images[1]], f"sample {key!r} has {len(images)} images; choose {choice}")
    label = found.get(LABEL_MEMBER) if wanted.labelled else None
    label_map = found.get(wanted.label_map) if wanted.label_map is not None else None
    for ending, member in found.items():
        if ending not in images and member is not label and member is not label_map:
            _count(other, ending)
    reason = ""
    if BAD in found:
        reason = f"it is marked {BAD}"
    elif not images:
        reason = f"it has no image; its members are {', '.join(list(found)[:5])}"
    elif (size := found[images[0]].size) > MAX_BYTES:
        reason = f"its image has {size} bytes; at most {MAX_BYTES} are decoded"
    else:
        image = found[images[0]]
        if wanted.labelled and label is None:
            raise _ambiguous(location, image, f"sample {key!r} has no label (.{LABEL_MEMBER}); leave the labels out")
        if wanted.label_map is not None and label_map is None:
            raise _ambiguous(location, image, f"sample {key!r} has no label map (.{wanted.label_map}); leave them out")
        used = [member for member in (image, label, label_map) if member is not None]
        start, end = min(member.offset for member in used), max(member.offset + member.size for member in used)
        if len(used) > 1 and end - start > MAX_BYTES + image.size - tar.BLOCK:
            reason = f"the members that are read of it lie more than {MAX_BYTES} bytes apart"
    if reason:
        return Group(key, "", None, None, None, reason)
    return Group(key, images[0], found[images[0]], label, label_map, "")


def _count(other: Counter[str], ending: str) -> None:
    """Count an ending; of a tar that holds a thousand of them, most are counted together."""
    other[ending if ending in other or len(other) < MAX_ENDINGS else "(more)"] += 1


def _ambiguous(location: str, member: Member, reason: str) -> DataError:
    return tar.refusal(location, member.offset - tar.BLOCK, reason)
