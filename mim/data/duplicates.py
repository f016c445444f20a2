"""Samples of a dataset that share a key or the bytes of their image."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from mim.contracts import DataError
from mim.data.shards import Dataset


def keys(dataset: Dataset, shards: list[int]) -> tuple[list[tuple[int, int, int, str]], list[list[str]]]:
    """Find samples with the same key: (shard, first row, row, key) within a shard, and lists of "shard/key" across."""
    columns = {}
    for shard in shards:
        try:
            columns[shard] = np.asarray(dataset.index(shard)["key"])
        except DataError:  # an index that is missing is reported with its shard
            continue
    within, across = [], []
    for group in _equal(columns):
        names = [_name(dataset, *place) for place in group]
        if len({shard for shard, _ in group}) > 1:
            across.append(names)
        for (shard, row), (other, first), name in zip(group[1:], group, names[1:], strict=False):
            if shard == other:
                within.append((shard, first, row, name.partition("/")[2]))
    return within, across


def contents(dataset: Dataset, marks: dict[int, np.ndarray]) -> list[list[str]]:
    """Find images with the same bytes, as lists of "shard/key".

    marks: shard -> (count,) uint64 of CRC32 and size, 0 for what could not be read. Equal marks are confirmed by
    reading these images again.
    """
    same = []
    for group in _equal(marks):
        if not marks[group[0][0]][group[0][1]]:
            continue
        found: dict[bytes, list[str]] = {}
        for shard, row in group:
            sample = dataset.read(shard, row)
            found.setdefault(hashlib.sha256(sample.image).digest(), []).append(sample.key)
        same += [names for names in found.values() if len(names) > 1]
    return same


def _equal(columns: dict[int, np.ndarray]) -> Iterator[list[tuple[int, int]]]:
    """Yield the places (shard, row) of each value that occurs more than once, in the order of the shards."""
    if not columns:
        return
    values = np.concatenate(list(columns.values()))
    shard = np.repeat(list(columns), [len(column) for column in columns.values()])
    row = np.concatenate([np.arange(len(column)) for column in columns.values()])
    order = np.argsort(values, kind="stable")
    repeats = np.flatnonzero(values[order][1:] == values[order][:-1])  # where the next one is equal
    for run in np.split(repeats, np.flatnonzero(np.diff(repeats) > 1) + 1) if len(repeats) else []:
        places = order[run[0] : run[-1] + 2]
        yield [(int(shard[place]), int(row[place])) for place in places]


def _name(dataset: Dataset, shard: int, row: int) -> str:
    try:
        return dataset.read(shard, row).key
    except DataError:  # damaged, and reported so
        return f"{dataset.location(shard)}/(row {row})"
