"""What shards are made from: a folder of images, a list or CSV, tars, or a Hugging Face dataset saved to disk.

Each becomes a `Source`: names, keys and labels of all images, known without decoding one, and a reader that a worker
process asks for their bytes.

    folder                      images at any depth; the first folder is the class when asked
    .csv .tsv .txt .lst         path[,label] per line, paths relative to the list; the first line is a header when its
                                first field has no ending of an image: then columns may be named path and label
    .tar, folder of tars, URL   (a folder without images) existing WebDatasets; labels from the member .cls when asked
                                also a dataset folder of ours
    folder of save_to_disk      Hugging Face `datasets` (needs mimstream[hf]); labels from a column when asked
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mim.config import ConfigError
from mim.data.listing import IMAGE_ENDINGS, Listing, class_of, list_images, sample_keys
from mim.data.shards import is_dataset

LIST_ENDINGS = {".csv": ",", ".tsv": "\t", ".txt": ",", ".lst": ","}  # and what separates their fields
PATH_COLUMNS = ("path", "file", "filename", "image")
LABEL_COLUMNS = ("label", "class", "category")


class Reader(Protocol):
    """Reads encoded images; sent to worker processes."""

    def read(self, place: Any) -> bytes:
        """Return the bytes of one image. FileNotFoundError when they are gone."""
        ...


@dataclass(frozen=True)
class Source:
    """All images of a dataset to make. The lists are as long as there are images."""

    reader: Reader
    names: Sequence[str]  # for people, and for the held-out split
    keys: Sequence[str]  # unique, as WebDataset can read them
    places: Sequence[Any]  # what the reader takes
    marks: Sequence[str]  # change when an image changes; no image is read for them
    labels: Sequence[str] | None = None  # class of each image
    ignored: dict[str, int] = field(default_factory=dict)  # files that are no images, by ending
    left_out: Sequence[dict[str, str]] = ()  # what was found to be unusable already
    masks: Reader | None = None  # of the label map of each image
    mask_places: Sequence[Any] | None = None  # what that reader takes

    @property
    def classes(self) -> list[str] | None:
        """All classes: in the order of their numbers when they are numbers, else sorted by name."""
        if self.labels is None:
            return None
        found = set(self.labels)
        return sorted(found, key=(lambda name: int(name)) if all(map(_is_number, found)) else None)

    def identity(self, *more: object) -> str:
        """Hash of what a dataset is made from."""
        digest = hashlib.sha256(repr(more).encode())
        labels = self.labels or [""] * len(self.names)
        for name, mark, label in zip(self.names, self.marks, labels, strict=True):
            digest.update(f"{name}\0{mark}\0{label}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True)
class Files:
    """Reads files below a folder."""

    folder: Path

    def read(self, place: str) -> bytes:
        return (self.folder / place).read_bytes()


def open_source(path: str | Path, *, labels_from_folders: bool, labels: str | None) -> Source:
    """Find out what `path` is, by the rules of the module docstring. Raises ConfigError, DataError."""
    from mim.data import saved_datasets, tar_source

    place = Path(path)
    if saved_datasets.is_saved_dataset(place):
        _refuse(labels_from_folders, "--labels-from-folders", "a saved dataset; use --labels COLUMN")
        return saved_datasets.from_saved_dataset(place, labels=labels)
    if place.is_file() and place.suffix.lower() in LIST_ENDINGS:
        _refuse(labels_from_folders or labels, "labels", "a list; its second column is the label")
        return from_list(place)
    listing = _images_of(place)
    if listing is None and tar_source.names_tars(str(path)):
        _refuse(labels_from_folders, "--labels-from-folders", "tars; use --labels cls")
        return tar_source.from_tars(str(path), labels=labels)
    _refuse(labels, "--labels", "a folder; use --labels-from-folders")
    return from_folder(listing or list_images(place), labels_from_folders=labels_from_folders)


def from_folder(listing: Listing, *, labels_from_folders: bool) -> Source:
    """The images of a folder."""
    paths = [image.path for image in listing.images]
    return Source(
        reader=Files(listing.folder),
        names=paths,
        keys=sample_keys(paths),
        places=paths,
        marks=[f"{image.size}\0{image.mtime_ns}" for image in listing.images],
        labels=[class_of(path) for path in paths] if labels_from_folders else None,
        ignored=listing.ignored,
    )


def from_list(file: Path) -> Source:
    """The images that a list names, in its order. Raises ConfigError with the line."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as handle:
            rows = list(csv.reader(handle, delimiter=LIST_ENDINGS[file.suffix.lower()]))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{file} is no list of paths in UTF-8 ({error})") from error
    numbered = [(number, row) for number, row in enumerate(rows, 1) if row and row[0].strip()]
    if not numbered:
        raise ConfigError(f"{file} names no images; write one path per line")
    path_column, label_column, start = _columns(numbered[0][1])
    paths: list[str] = []
    labels, marks = [], []
    first: dict[str, int] = {}
    root = os.path.abspath(file.parent)
    for number, row in numbered[start:]:
        where = f"{file}, line {number}"
        if len(row) <= max(path_column, label_column):
            raise ConfigError(f"{where}: {len(row)} fields, but the first line has {len(numbered[0][1])}")
        if "://" in row[path_column]:
            raise ConfigError(f"{where}: {row[path_column].strip()} is no local file; lists name local files")
        path = os.path.normpath(os.path.join(root, row[path_column].strip()))
        if first.setdefault(path, number) != number:
            raise ConfigError(f"{where}: {path} stands in line {first[path]} already")
        if label_column >= 0 and not row[label_column].strip():
            raise ConfigError(f"{where}: {path} has no label; give every line one, or none")
        paths.append(path)
        labels.append(row[label_column].strip() if label_column >= 0 else "")
        marks.append(_mark(path))
    if not paths:
        raise ConfigError(f"{file} names no images below its header")
    top = (
        root if all(path.startswith(root + "/") for path in paths) else os.path.commonpath(map(os.path.dirname, paths))
    )
    shown = [os.path.relpath(path, top) for path in paths]
    return Source(Files(Path(top)), shown, sample_keys(shown), shown, marks, labels if label_column >= 0 else None)


def _images_of(folder: Path) -> Listing | None:
    """The images of a folder; None when it has none, or is none, or holds shards: their indices are arrays too."""
    if any(is_dataset(place) for place in (folder, folder / "train", folder / "val")):
        return None
    try:
        return list_images(folder)
    except ConfigError:
        return None


def _columns(first: list[str]) -> tuple[int, int, int]:
    """Columns of path and label (-1: none), and the row where the data begin."""
    fields = [name.strip().lower() for name in first]
    if fields[0].rpartition(".")[2] in IMAGE_ENDINGS and "." in fields[0]:
        return 0, 1 if len(fields) > 1 else -1, 0
    path = next((i for i, name in enumerate(fields) if name in PATH_COLUMNS), 0)
    label = next((i for i, name in enumerate(fields) if name in LABEL_COLUMNS and i != path), -1)
    if label < 0 and len(fields) == 2:
        label = 1 - path
    return path, label, 1


def _mark(path: str) -> str:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return "missing"
    return f"{found.st_size}\0{found.st_mtime_ns}"


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) < 10


def _refuse(given: object, option: str, instead: str) -> None:
    if given:
        raise ConfigError(f"{option} cannot be used with {instead}")
