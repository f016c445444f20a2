"""Room in the shard cache: what lies there, what may go, and in which order.

A file is in use while a process holds a lock on it (flock, so a killed process holds none); such a file is never
removed. Of the others, abandoned downloads go first, then the shards that were opened longest ago.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mim.contracts import StorageError

SHARD = re.compile(r"(u-)?[0-9a-f]{64}\.tar")
PART = re.compile(r"(u-)?[0-9a-f]{64}\.tar\.(\d+)\.part")  # the number is the size when complete, in bytes
FREE_RATIO, MAX_FREE = 0.05, 20 << 30  # share of the disk that stays free whatever the limit, but at most as many bytes
STALE = 24 * 3600  # seconds after which an abandoned download is not resumed any more


class _Entry(NamedTuple):
    path: Path
    reserved: int  # bytes, of a download those of the whole shard
    present: int  # bytes on the disk
    order: tuple[bool, float]  # the smallest goes first


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file against other processes; without `wait`, yield False when another one holds it.

    The file is of its own, never a shard: readers hold their shards for long. It is removed at the end; whoever waited
    for it then makes a new one.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            held = _lock(descriptor, wait)
            if held and not _is_at(descriptor, path):
                continue
            try:
                yield held
            finally:
                if held:
                    path.unlink(missing_ok=True)
            return
        finally:
            release(descriptor)


def part_lock(path: Path) -> Path:
    """The lock file of a download."""
    return path.with_suffix(".lock")


def release(descriptor: int) -> None:
    """Unlock and close. Closing alone would leave the lock with a child that was forked meanwhile."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def make_room(folder: Path, size: int, *, limit: int | None) -> None:
    """Remove what is not in use until everything, downloads counted whole, fits into `limit` bytes and the disk.

    size: bytes of the download that asks, for the message; its file is there already. Raises StorageError.
    """
    with locked(folder / "room.lock"):
        entries = sorted(_entries(folder), key=lambda entry: entry.order)
        disk = os.statvfs(folder)
        free = disk.f_bavail * disk.f_frsize - min(int(FREE_RATIO * disk.f_blocks * disk.f_frsize), MAX_FREE)
        capacity = sum(entry.present for entry in entries) + free
        bound = "the disk" if limit is None or capacity < limit else "cache_limit"
        capacity = capacity if limit is None else min(capacity, limit)
        used = sum(entry.reserved for entry in entries)
        for entry in entries:
            if used <= capacity:
                break
            if remove_unused(entry.path):
                used -= entry.reserved
        if used > capacity:
            raise StorageError(
                f"no room for a shard of {size} bytes in {folder}: shards in use and downloads take {used - size} "
                f"bytes, {bound} allows {max(capacity, 0)}; raise train.cache_limit, free the disk, or choose another "
                f"train.cache_dir"
            )


def remove_stale(folder: Path) -> None:
    """Remove downloads that were abandoned long ago."""
    for entry in _entries(folder):
        if PART.fullmatch(entry.path.name):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - entry.path.stat().st_mtime > STALE:
                    remove_unused(entry.path)


def remove_unused(path: Path) -> bool:
    """Remove a shard or a download unless a process holds it; say whether it is gone."""
    if PART.fullmatch(path.name):
        with locked(part_lock(path), wait=False) as held:
            if held:
                path.unlink(missing_ok=True)
            return held
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    try:
        if not _lock(descriptor, wait=False):
            return False
        if _is_at(descriptor, path):
            path.unlink()
            path.with_suffix(".sha256").unlink(missing_ok=True)
        return True
    finally:
        release(descriptor)


def _entries(folder: Path) -> Iterator[_Entry]:
    """What this cache put into the folder; a stranger's files are neither counted nor touched."""
    with os.scandir(folder) as found:
        for file in found:
            part = PART.fullmatch(file.name)
            if part is None and SHARD.fullmatch(file.name) is None:
                continue
            with contextlib.suppress(FileNotFoundError):
                stat = file.stat(follow_symlinks=False)
                reserved = int(part[2]) if part else stat.st_size
                yield _Entry(Path(file.path), reserved, stat.st_size, (part is None, stat.st_atime_ns))


def _lock(descriptor: int, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False
