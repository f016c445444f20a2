"""A Hugging Face dataset saved by `save_to_disk`, as a source of `mim shards make`. Needs the package `datasets`.

Only bytes that lie in the dataset itself are read: a row that names a file elsewhere is refused.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mim.config import ConfigError
from mim.contracts import DataError
from mim.data.sources import Source

LIKELY = ("image", "img")  # column, where several hold images


@dataclass(frozen=True)
class Rows:
    """Reads the images of a column."""

    folder: Path
    column: str

    def read(self, place: int) -> bytes:
        value = _open(self.folder, self.column)[place][self.column]
        if not value or not value.get("bytes"):
            raise DataError(
                f"{self.folder}, row {place}: {self.column} holds no bytes but names a file; "
                "save the dataset with its images embedded"
            )
        return value["bytes"]


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return ((folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()) or (
        folder / "dataset_dict.json"
    ).is_file()


def from_saved_dataset(folder: Path, *, labels: str | None) -> Source:
    """The rows of a saved dataset. labels: the column that holds the class."""
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(str(path.parent) for path in sorted(folder.glob("*/state.json")))
        raise ConfigError(f"{folder} holds several splits; name one of them: {splits}")
    datasets = _datasets()
    dataset = datasets.load_from_disk(str(folder))
    images = [name for name, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
    column = images[0] if len(images) == 1 else next((name for name in LIKELY if name in images), None)
    if column is None:
        raise ConfigError(f"{folder} has {len(images)} columns of images among {', '.join(dataset.features)}; need one")
    classes = _labels(dataset, labels, folder) if labels is not None else None
    numbers = range(len(dataset))
    fingerprint = (folder / "state.json").read_text()
    return Source(
        reader=Rows(folder, column),
        names=[f"row-{number:09d}" for number in numbers],
        keys=[f"{number:09d}" for number in numbers],
        places=numbers,
        marks=[fingerprint if number == 0 else "" for number in numbers],
        labels=classes,
    )


def _labels(dataset: Any, column: str, folder: Path) -> list[str]:
    if column not in dataset.features:
        raise ConfigError(f"{folder} has no column {column!r}; it has {', '.join(dataset.features)}")
    kind = dataset.features[column]
    values = dataset[column][:]
    if any(value is None or (isinstance(value, int) and value < 0) for value in values):
        raise ConfigError(f"{folder}: some rows of {column!r} have no label; leave --labels out")
    return [kind.int2str(value) if hasattr(kind, "int2str") else str(value) for value in values]


@functools.lru_cache(maxsize=4)  # per process: a worker opens it once
def _open(folder: Path, column: str) -> Any:
    datasets = _datasets()
    dataset = datasets.load_from_disk(str(folder)).select_columns([column])
    return dataset.cast_column(column, datasets.Image(decode=False))


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("a saved dataset needs the package datasets: pip install 'mimstream[hf]'") from error
    return datasets
