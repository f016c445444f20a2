"""A bank of features as files for others: Parquet, or one .npy per column beside the keys.

Written from blocks (`mim/probing/feature_cache.py`), one after the other, so the memory holds no more than one; each
file takes its name when it is whole, and the manifest comes last.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mim.config import ConfigError
from mim.log import aside
from mim.probing.bank import Block, Part
from mim.probing.feature_cache import FeatureCache, file_name, write_column

FORMATS = ("parquet", "npy")


def check_format(kind: str) -> None:
    """Refuse a format that nobody here writes. Raises ConfigError."""
    if kind not in FORMATS:
        raise ConfigError(f"format={kind!r} is unknown; choose {' or '.join(FORMATS)}")
    if kind == "parquet":
        _pyarrow()


def write(out: Path, kind: str, store: FeatureCache, blocks: list[Block], *, labelled: bool) -> list[str]:
    """Write all blocks of a store into a folder; return the names of the files."""
    return _parquet(out, store, blocks, labelled) if kind == "parquet" else _npy(out, store, blocks, labelled)


def _parquet(out: Path, store: FeatureCache, blocks: list[Block], labelled: bool) -> list[str]:
    """`features.parquet`: key, label where there are any (null = unknown), and a list of floats for each column."""
    arrow, parquet = _pyarrow()
    name = "features.parquet"
    with aside(out / name, "wb") as file:
        writer = None
        for block in blocks:
            table = _table(arrow, store.part(block), labelled)
            writer = writer or parquet.ParquetWriter(file, table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()
    return [name]


def _table(arrow: Any, part: Part, labelled: bool) -> Any:
    columns: dict[str, Any] = {"key": arrow.array(part.keys, arrow.string())}
    if labelled:
        labels = part.labels.numpy()
        columns["label"] = arrow.array(labels, arrow.int64(), mask=labels < 0)
    for name, value in part.columns.items():
        array = value.numpy()  # (rows, D) or (rows, N, D)
        found = arrow.array(np.ascontiguousarray(array).reshape(-1))
        for size in reversed(array.shape[1:]):
            found = arrow.FixedSizeListArray.from_arrays(found, size)
        columns[name] = found
    return arrow.table(columns)


def _npy(out: Path, store: FeatureCache, blocks: list[Block], labelled: bool) -> list[str]:
    """`<layer>_<pooling>.npy` of each column, `keys.txt` (one per line) and `labels.npy` (-1 = unknown)."""

    def parts() -> Iterator[Part]:
        yield from (store.part(block) for block in blocks)

    rows, names = blocks[-1].end, list(store.part(blocks[0]).columns)
    for name in names:
        write_column(out / file_name(name), (part.columns[name].numpy() for part in parts()), rows)
    with aside(out / "keys.txt") as file:
        for part in parts():
            file.writelines(f"{key}\n" for key in part.keys)
    written = [*map(file_name, names), "keys.txt"]
    if labelled:
        write_column(out / "labels.npy", (part.labels.numpy() for part in parts()), rows)
        written.append("labels.npy")
    return written


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(
            f"format=parquet needs pyarrow ({error}); run `pip install 'mimstream[parquet]'`, or set format=npy"
        ) from error
    return pyarrow, parquet
