"""The images under a folder, their keys and their classes: names only, nothing is decoded here."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mim.config import ConfigError

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "npy")
MAX_KEY = 94  # bytes: with "." and an ending it fits the 100-byte name of a plain ustar header
HASH = 12  # hexadecimal digits that make a key unique


class ImageFile(NamedTuple):
    """An image file as the folder lists it."""

    path: str  # relative, with "/"
    size: int  # bytes; -1 for a link that leads nowhere
    mtime_ns: int


@dataclass(frozen=True)
class Listing:
    """All images under a folder, sorted by path."""

    folder: Path
    images: list[ImageFile]
    ignored: dict[str, int]  # count of files per other ending


def list_images(folder: Path) -> Listing:
    """Find images at any depth by their ending, following links. Hidden files and folders (".name") are left aside."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give the folder that holds the images")
    images, ignored = [], Counter[str]()
    for path, entry in _walk(folder, "", frozenset()):
        ending = path.rpartition(".")[2].lower() if "." in entry.name else ""
        if ending not in IMAGE_ENDINGS or not (entry.is_file() or entry.is_symlink()):
            ignored[f".{ending}" if ending else "(none)"] += 1
            continue
        try:
            stat = entry.stat()
            images.append(ImageFile(path, stat.st_size, stat.st_mtime_ns))
        except FileNotFoundError:
            images.append(ImageFile(path, -1, 0))
    if not images:
        found = ", ".join(f"{ending} ({count})" for ending, count in ignored.most_common(8)) or "no files at all"
        raise ConfigError(f"{folder} holds no images ({', '.join(IMAGE_ENDINGS)}); found: {found}")
    return Listing(folder, sorted(images), dict(ignored.most_common()))


def sample_keys(paths: list[str]) -> list[str]:
    """Return a unique WebDataset key for each image path: the path without ending, in NFC UTF-8.

    WebDataset ends a key at the first dot of the file name and skips names that begin with "__", so both are
    replaced. Where two keys would be equal, or one too long, a hash of the path is appended.
    """
    plain = [_plain_key(path) for path in paths]
    count = Counter(plain)
    keys = [
        key if count[key] == 1 and len(key.encode()) <= MAX_KEY else _hashed_key(key, path)
        for key, path in zip(plain, paths, strict=True)
    ]
    assert len(set(keys)) == len(keys), "two sample keys are equal"
    return keys


def class_of(path: str) -> str:
    """Return the class of an image: its first folder."""
    name, slash, _ = path.partition("/")
    if not slash:
        raise ConfigError(
            f"{path} lies in no class folder, so it has no label; move it into one or leave labels_from_folders"
        )
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the class folder {name!r} has a name that is not UTF-8; rename it") from error
    return unicodedata.normalize("NFC", name)


def _walk(folder: Path, prefix: str, ancestors: frozenset[tuple[int, int]]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield the visible files below a folder; a link back to an ancestor is not followed."""
    stat = folder.stat()
    if (stat.st_dev, stat.st_ino) in ancestors:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                below = ancestors | {(stat.st_dev, stat.st_ino)}
                yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", below)
            else:
                yield prefix + entry.name, entry


def _plain_key(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    stem = name[: name.rindex(".")].replace(".", "_")
    key = unicodedata.normalize("NFC", (folder + slash + stem).encode(errors="replace").decode())
    key = "".join(character if character.isprintable() else "_" for character in key)
    return "_" + key.lstrip("_") if key.startswith("__") else key


def _hashed_key(key: str, path: str) -> str:
    suffix = hashlib.blake2b(path.encode(errors="surrogateescape")).hexdigest()[:HASH]
    return f"{key.encode()[: MAX_KEY - HASH - 1].decode(errors='ignore')}-{suffix}"
