"""Whole remote shards on the local disk, named by their content, so that a name can neither collide nor lie.

    <sha256>.tar             a shard whose hash the lock states
    u-<hash>.tar             one without: hash of URL, size and ETag; <its own sha256> lies beside it as u-<hash>.sha256
    NAME.tar.SIZE.part       a download; resumed by whoever wants the shard after a kill
    NAME.tar.SIZE.lock       held while somebody downloads it
    room.lock                held while room is made

A shard is published by one rename, after size and sha256 are proven and the bytes synced. Whole files are hashed once:
publication stamps a time of modification that any later writer changes, and a file without it is hashed again before
use. What is wrong is fetched again once; then it is a DataError. Every process of a node may use one folder: a shard
is downloaded once, and never removed while a process has it open.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

from mim.config import ConfigError
from mim.contracts import DataError, StorageError
from mim.data.eviction import locked, make_room, part_lock, release, remove_stale
from mim.data.location import redact
from mim.data.remote import Remote
from mim.data.wire import Patience
from mim.log import say

FOLDER = "~/.cache/mimstream/shards"
STAMP = 10**18  # time of modification, ns: proven, and not written since
MAX_OPEN = 8  # shards that a process keeps open, and thereby in the cache
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CHUNK = 1 << 20  # bytes hashed at a time


class RemoteShard(NamedTuple):
    """A shard as a lock describes it."""

    url: str
    size: int  # bytes
    sha256: str | None = None  # hexadecimal; None when only its headers were indexed


class ShardCache:
    """Positioned reads of remote shards through local copies. Arrives empty in another process; not for threads."""

    def __init__(self, folder: str | Path | None = None, *, limit: int | None = None, patience: Patience | None = None):
        """limit: bytes; None lets the cache grow until little of the disk is left."""
        self.folder = Path(folder or FOLDER).expanduser().absolute()
        self.limit = limit
        self.remote = Remote(patience)
        self._process: int
        self._forget()

    def pread(self, shard: RemoteShard, offset: int, size: int) -> bytes:
        """Return exactly `size` bytes from `offset`, downloading the shard first if it is not there.

        Raises DataError (overwritten, or not what the lock states), StorageError (server, disk, no room).
        """
        descriptor = self._descriptor(shard)
        try:
            data = os.pread(descriptor, size, offset)
        except OSError as error:
            raise self._disk_error(shard, error) from error
        if len(data) < size:
            raise DataError(f"{redact(shard.url)} has {shard.size} bytes, too few for the index; index it again")
        return data

    def fetch(self, shard: RemoteShard) -> None:
        """Make sure that a shard is there, and count it as used now. Raises as `pread`."""
        self._prepare()
        release(self._fetch(shard))

    def recheck(self, shard: RemoteShard) -> bool:
        """Hash a shard that gave bytes which an index contradicts; say whether reading it again may help."""
        name = self._name(shard)
        if name not in self._open:
            return False  # it gave no bytes
        held = os.fstat(self._open[name])
        release(self._open.pop(name))
        descriptor = self._open_sound(name, shard, rehash=True)
        if descriptor is None:
            return True
        replaced = not os.path.samestat(os.fstat(descriptor), held)  # by another process that found it, too
        release(descriptor)
        return replaced

    def close(self) -> None:
        """Let go of all shards; the next read opens them again."""
        self.remote.close()
        own = self._process == os.getpid()
        while self._open:
            descriptor = self._open.popitem()[1]
            release(descriptor) if own else os.close(descriptor)  # after a fork the lock is the parent's, too

    def _descriptor(self, shard: RemoteShard) -> int:
        self._prepare()
        name = self._name(shard)
        if name in self._open:
            self._open.move_to_end(name)
        else:
            while len(self._open) >= MAX_OPEN:
                release(self._open.popitem(last=False)[1])
            self._open[name] = self._fetch(shard)
        return self._open[name]

    def _fetch(self, shard: RemoteShard) -> int:
        """Return a descriptor of the sound shard, which keeps it in the cache while it is open."""
        name = self._name(shard)
        for _ in range(3):  # another process may remove the shard between its download and our opening it
            try:
                if (descriptor := self._open_sound(name, shard)) is not None:
                    return descriptor
                self._download(name, shard)
            except StorageError:
                raise
            except OSError as error:
                raise self._disk_error(shard, error) from error
        raise StorageError(f"{redact(shard.url)} is removed from {self.folder} as soon as it is there; raise the limit")

    def _open_sound(self, name: str, shard: RemoteShard, *, rehash: bool = False) -> int | None:
        """Open a published shard; remove one that is cut, foreign or changed, and return None."""
        path = self.folder / name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            path.unlink(missing_ok=True)  # somebody's symbolic link
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        found = os.fstat(descriptor)
        if found.st_nlink == 0:  # removed between opening and locking
            release(descriptor)
            return None
        sound = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_size == shard.size
        if sound and (rehash or found.st_mtime_ns != STAMP):
            sound = _sha256(descriptor).hexdigest() == (shard.sha256 or self._recorded(path))
        if not sound:
            say(f"{redact(shard.url)}: its copy in {self.folder} is damaged; it is fetched again")
            release(descriptor)
            path.unlink(missing_ok=True)  # whoever has it open goes on until an index contradicts it
            return None
        os.utime(path, ns=(time.time_ns(), STAMP), follow_symlinks=False)
        return descriptor

    def _download(self, name: str, shard: RemoteShard) -> None:
        """Download, prove and publish a shard, unless another process did so while we waited for it."""
        path = self.folder / name
        part = self.folder / f"{name}.{shard.size}.part"
        with locked(part_lock(part)):
            if path.exists():
                return
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                make_room(self.folder, shard.size, limit=self.limit)
                for attempt in (1, 2):
                    if self._receive(descriptor, path, shard):
                        break
                    if attempt == 2:
                        part.unlink()
                        raise DataError(
                            f"{redact(shard.url)} is not the shard of the lock (its sha256 differs, twice); upload it "
                            f"again or index it again"
                        )
                os.fsync(descriptor)
                os.utime(part, ns=(time.time_ns(), STAMP), follow_symlinks=False)
                part.rename(path)
            except OSError as error:
                if error.errno in NO_SPACE or os.fstat(descriptor).st_size == 0:
                    part.unlink(missing_ok=True)
                raise
            finally:
                os.close(descriptor)
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)

    def _receive(self, descriptor: int, path: Path, shard: RemoteShard) -> bool:
        """Append what is missing of a download; say whether it is right, and empty it if not."""
        at = os.fstat(descriptor).st_size
        if at > shard.size:
            os.ftruncate(descriptor, at := 0)
        digest = _sha256(descriptor)
        os.lseek(descriptor, at, os.SEEK_SET)

        def write(piece: bytes) -> None:
            digest.update(piece)
            view = memoryview(piece)
            while view:
                view = view[os.write(descriptor, view) :]

        self.remote.copy(shard.url, at, shard.size, write)
        size = self.remote.identify(shard.url).size
        if size != shard.size:
            raise DataError(f"{redact(shard.url)} has {size} bytes instead of the {shard.size} of the lock")
        if shard.sha256 is None:
            path.with_suffix(".sha256").write_text(digest.hexdigest())
        elif digest.hexdigest() != shard.sha256:
            os.ftruncate(descriptor, 0)
            return False
        return True

    def _name(self, shard: RemoteShard) -> str:
        if shard.sha256 is not None:
            return f"{shard.sha256}.tar"
        size, etag = self.remote.identify(shard.url)
        if size != shard.size:
            raise DataError(f"{redact(shard.url)} has {size} bytes instead of the {shard.size} of the lock")
        return f"u-{hashlib.sha256(repr((shard.url, size, etag)).encode()).hexdigest()}.tar"

    def _recorded(self, path: Path) -> str | None:
        try:
            return path.with_suffix(".sha256").read_text()
        except FileNotFoundError:
            return None

    def _prepare(self) -> None:
        """Once per process: make and check the folder. After a fork, forget what is the parent's."""
        if self._process == os.getpid():
            return
        self.close()
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = os.lstat(self.folder)
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
                raise ConfigError(
                    f"{self.folder} is no safe place for a cache, others own it or may write into it; choose another "
                    f"train.cache_dir, or chmod 700 it"
                )
            with locked(self.folder / "room.lock"):
                remove_stale(self.folder)
        except OSError as error:
            raise StorageError(f"cannot use {self.folder} as cache: {error.strerror}") from error
        self._process = os.getpid()

    def _disk_error(self, shard: RemoteShard, error: OSError) -> StorageError:
        if error.errno in NO_SPACE:
            return StorageError(
                f"no space left in {self.folder} for {redact(shard.url)} ({shard.size} bytes): {error.strerror}; free "
                f"some, lower train.cache_limit, or choose another train.cache_dir"
            )
        return StorageError(f"cannot keep {redact(shard.url)} in {self.folder}: {error.strerror}")

    def _forget(self) -> None:
        self._process = 0  # the id of the one that has made and checked the folder
        self._open: OrderedDict[str, int] = OrderedDict()  # least recently used first, each with a shared lock

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "limit": self.limit, "remote": self.remote}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def _sha256(descriptor: int) -> Any:
    """Hash a file from its beginning, without moving its offset."""
    digest, at = hashlib.sha256(), 0
    while piece := os.pread(descriptor, CHUNK, at):
        digest.update(piece)
        at += len(piece)
    return digest
