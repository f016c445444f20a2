"""Where the bytes of a shard come from: positioned reads of local files and of remote objects.

A location is a local path or an URL of `mim.data.location.SCHEMES`. Local files are read in place, remote objects by
range. A `RemoteShard` in its place is read through the cache: downloaded whole, once per node. Local `pread`
moves no file offset, so a descriptor may be inherited by a forked worker and read from both sides. A pickled store
arrives empty and opens its own descriptors and connections.
"""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from typing import Any

from mim.contracts import DataError, StorageError
from mim.data.cache import RemoteShard, ShardCache
from mim.data.location import is_remote
from mim.data.remote import Remote
from mim.data.wire import Patience


class Store:
    """Positioned reads with a bounded number of open files. One per process; not shared between threads."""

    def __init__(
        self,
        max_open: int = 128,  # well below the usual limit of 1024 descriptors per process
        patience: Patience | None = None,
        *,
        cache: ShardCache | None = None,  # that remote shards are read through
    ):
        self.max_open = max_open
        self.remote = Remote(patience)
        self.cache = cache
        self._descriptors: OrderedDict[str, int] = OrderedDict()  # least recently used first

    def pread(self, location: str | RemoteShard, offset: int, size: int) -> bytes:
        """Return exactly `size` bytes from `offset`; of a `RemoteShard` through the cache, of an URL by range.

        Raises DataError when the file is shorter or (remote) was overwritten, StorageError when a disk or a server
        fails until the deadline, ConfigError for a location that is refused.
        """
        if isinstance(location, RemoteShard):
            assert self.cache is not None
            return self.cache.pread(location, offset, size)
        if location not in self._descriptors and is_remote(location):
            return self.remote.pread(location, offset, size)
        try:
            data = os.pread(self._descriptor(location), size, offset)
        except OSError as error:
            raise StorageError(f"cannot read {location}: {error.strerror}") from error
        if len(data) < size:
            short = size - len(data)
            raise DataError(f"{location} ends at byte {offset + len(data)}, {short} bytes short; copy it again")
        return data

    def size(self, location: str) -> int:
        """Length of a file or object in bytes. Raises as `pread`; what is no regular file is DataError."""
        if is_remote(location):
            return self.remote.identify(location).size
        try:
            found = os.stat(location)
        except OSError as error:
            raise StorageError(f"cannot read {location}: {error.strerror}") from error
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{location} is not a regular file")
        return found.st_size

    def recheck(self, location: str | RemoteShard) -> bool:
        """Look again at a shard whose bytes contradict its index; say whether another read may give others."""
        return isinstance(location, RemoteShard) and self.cache is not None and self.cache.recheck(location)

    def close(self) -> None:
        """Close all descriptors and connections; the next read opens them again."""
        self.remote.close()
        if self.cache is not None:
            self.cache.close()
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _descriptor(self, path: str) -> int:
        if path in self._descriptors:
            self._descriptors.move_to_end(path)
        else:
            if len(self._descriptors) >= self.max_open:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptors[path]

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptors": OrderedDict()}
