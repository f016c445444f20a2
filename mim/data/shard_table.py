"""The shards that a lock names, as columns: 10^8 samples are in some 10^5 of them, and every worker knows them all.

As Python objects they would be copied into each worker one memory page after the other, for looking at an object
changes its count of references. Columns are a few arrays, which forked workers share for as long as they live.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mim.data.cache import RemoteShard
from mim.data.location import is_remote


class Texts:
    """Strings by their number, in one block of memory."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode(errors="surrogateescape") for text in texts]
        self._ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        self._block = b"".join(encoded)

    def __getitem__(self, number: int) -> str:
        start = self._ends[number - 1] if number else 0
        return self._block[start : self._ends[number]].decode(errors="surrogateescape")


class ShardTable:
    """Where shards lie and what they must be, by their number in the lock."""

    def __init__(self, path: Path, shards: list[dict[str, Any]]) -> None:
        """`shards` are those of the lock of the dataset folder `path`."""
        locations = [location(path, shard) for shard in shards]
        self.counts = np.array([shard["count"] for shard in shards], dtype=np.int64)  # samples
        self.ends = np.cumsum(self.counts)
        self.sizes = np.array([shard["size"] for shard in shards], dtype=np.int64)  # bytes
        self.headers_only = np.array([shard.get("proof", "bytes") == "headers" for shard in shards], dtype=bool)
        self.remote = np.array([is_remote(found) for found in locations], dtype=bool)
        self.files = Texts(shard["file"] for shard in shards)  # names in the dataset folder
        self.locations = Texts(locations)
        self._hashes = Texts((far and shard["sha256"]) or "" for far, shard in zip(self.remote, shards, strict=True))

    def remote_shard(self, number: int) -> RemoteShard:
        """A remote shard as the cache wants it."""
        return RemoteShard(self.locations[number], int(self.sizes[number]), self._hashes[number] or None)


def location(path: Path, shard: dict[str, Any]) -> str:
    """Where the bytes of a shard of the lock lie. A local path is written so that it cannot look like an URL."""
    if shard.get("url"):
        return shard["url"]
    return f"{path}/{shard['file']}" if path.is_absolute() else f"./{path}/{shard['file']}"
