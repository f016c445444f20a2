"""Where the bytes of a shard come from: positioned reads of local files.

`pread` moves no file offset, so a descriptor may be inherited by a forked worker and read from both sides. A pickled
store arrives empty and opens its own descriptors.
"""

from __future__ import annotations

import os
import stat
from collections import OrderedDict

from mim.contracts import DataError, StorageError


class Store:
    """Positioned reads with a bounded number of open files. One per process; not shared between threads."""

    def __init__(self, max_open: int = 128):  # well below the usual limit of 1024 descriptors per process
        self.max_open = max_open
        self._descriptors: OrderedDict[str, int] = OrderedDict()  # least recently used first

    def pread(self, path: str, offset: int, size: int) -> bytes:
        """Return exactly `size` bytes from `offset`. A short file is DataError, a failing disk StorageError."""
        try:
            data = os.pread(self._descriptor(path), size, offset)
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}") from error
        if len(data) < size:
            raise DataError(f"{path} ends at byte {offset + len(data)}, {size - len(data)} bytes short; copy it again")
        return data

    def size(self, path: str) -> int:
        """Return the length of a file in bytes. What is no regular file is DataError, a failing disk StorageError."""
        try:
            found = os.stat(path)
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}") from error
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{path} is not a regular file")
        return found.st_size

    def close(self) -> None:
        """Close all descriptors; the next read opens them again."""
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

    def __getstate__(self) -> dict[str, int]:
        return {"max_open": self.max_open}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(**state)  # type: ignore[misc]
