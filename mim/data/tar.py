"""Strict scan of a tar, local or remote: where every member lies, and its CRC32.

Shards come from strangers, so the parser accepts only what a shard needs: regular files and directories, in ustar,
with the two common long-name extensions (pax 'x', GNU 'L'), bounded. Links, devices, sparse files, compression, names
that leave the folder, sizes that leave the file and a missing end are refused by name and offset. `tarfile` is more
lenient: it expands sparse files, reads pax headers of any size and takes a truncated archive for a short one.

A scan reads every byte once; with `headers_only` it reads the headers and jumps over the data, so that a remote tar is
listed by ranges, without CRC32.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

from mim.contracts import DataError
from mim.data import checksum
from mim.data.store import Store

BLOCK = 512
RECORD = 20 * BLOCK  # what tar writers fill up with zeros
MAX_EXTENSION = 64 * 1024  # bytes of one pax or long-name record; real ones hold a path
MAX_NAME = 255  # bytes
MAX_MEMBERS = 1 << 20  # of one tar: bounds what a listing of it can take in memory
CHUNK = 4 << 20  # bytes read at a time
HEADERS_CHUNK = 8 << 10  # the same when only headers are read: a header, and the small members that follow it
GZIP = b"\x1f\x8b"
REGULAR = (b"0", b"\0")
DIRECTORY = b"5"
PAX = b"x"
LONG_NAME = b"L"
REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
}


class Member(NamedTuple):
    """A regular file inside a tar; its header is the block before `offset`."""

    name: str
    offset: int  # of the data, in bytes
    size: int
    crc32: int  # 0 when only headers were read
    data: bytes | None = None  # the data itself, where the scan was asked to keep it


class Forward:
    """Reads a file forward in pieces, each byte at most once; a digest sees every byte that is taken."""

    def __init__(self, location: str, store: Store, *, digest: Any = None, chunk: int = CHUNK):
        self.location = location
        self.size = store.size(location)
        self.at = 0  # offset of the next byte
        self._store, self._digest, self._chunk = store, digest, chunk
        self._buffer, self._start = b"", 0  # what was read ahead, and its offset

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes. Raises DataError when the file ends before."""
        if self.at + count > self.size:
            raise refusal(self.location, self.at, f"the file ends at byte {self.size}; it is truncated")
        piece = self.peek(count)
        self.at += count
        if self._digest is not None:
            self._digest.update(piece)
        return piece

    def peek(self, count: int) -> bytes:
        """Return the next bytes, at most `count`, without passing them."""
        if self.at + count > self._start + len(self._buffer):
            self._buffer = self._buffer[self.at - self._start :]  # empty when a skip has left it behind
            begin = self.at + len(self._buffer)
            more = min(max(self._chunk, count - len(self._buffer)), self.size - begin)
            self._buffer += self._store.pread(self.location, begin, more) if more else b""
            self._start = self.at
        return self._buffer[self.at - self._start : self.at - self._start + count]

    def skip(self, count: int) -> None:
        """Go on without reading; the digest does not see these bytes."""
        self.at += count

    def take_until(self, end: int) -> None:
        """Read on to the byte `end`, for the digest alone."""
        while self.at < end:
            self.take(min(end - self.at, self._chunk))


def name_of(header: bytes) -> str:
    """Return the name in one 512-byte header, unchecked: bytes that are not UTF-8 are replaced."""
    return _raw_name(header).decode("utf-8", "replace")


def long_name_before(data: bytes) -> str | None:
    """Return the name in the extension record that `data` ends with, as it stands before the header of a member.

    None when it ends with none. Names that are long or not ASCII stand there; the header then holds a cut one.
    """
    for start in range(len(data) - 2 * BLOCK, -1, -BLOCK):
        try:
            size, kind = parse(data[start : start + BLOCK], "", 0)
            record = data[start + BLOCK : start + BLOCK + size]
            if kind in (PAX, LONG_NAME) and start + BLOCK + size + -size % BLOCK == len(data):
                return _checked_name(_text(record), "", 0) if kind == LONG_NAME else _pax(record, "", 0)[0]
        except DataError:  # no header, but data that happens to lie at a block
            continue
    return None


def scan(
    location: str | Path,
    *,
    store: Store | None = None,
    keep: int = 0,  # bytes: the data of members up to this size comes with them
    headers_only: bool = False,
    digest: Any = None,  # of hashlib: sees the whole file; with `headers_only`, headers and name records
) -> Generator[Member, None, int]:
    """Yield the regular files of a tar in order; raise DataError with file and offset on anything unexpected.

    Returns how many zero bytes follow the end: tar writers fill up a record (RECORD), a lost tail may be longer.
    """
    chunk = HEADERS_CHUNK if headers_only else CHUNK
    file = Forward(str(location), store or Store(), digest=None if headers_only else digest, chunk=chunk)
    see = digest.update if headers_only and digest is not None else lambda _: None
    path = file.location
    if file.peek(len(GZIP)) == GZIP:
        raise refusal(path, 0, "the file is compressed; decompress it first (gunzip)")
    long_name: str | None = None
    long_size: int | None = None
    count = 0
    while True:
        at = file.at
        header = file.take(BLOCK)
        see(header)
        if not any(header):
            return _check_end(file, at)
        size, kind = parse(header, path, at)
        if long_size is not None:
            size, long_size = long_size, None
        if file.at + size > file.size:
            raise refusal(path, at, f"a member of {size} bytes leaves the file of {file.size} bytes; it is truncated")
        count += 1
        if count > MAX_MEMBERS:
            raise refusal(path, at, f"more than {MAX_MEMBERS} members; cut the tar into smaller ones")
        if kind in (PAX, LONG_NAME):
            record = _extension(file, size, at)
            see(record)
            if kind == LONG_NAME:
                long_name = _checked_name(_text(record), path, at)
            else:
                long_name, long_size = _pax(record, path, at)
            continue
        name = long_name if long_name is not None else _checked_name(_raw_name(header), path, at)
        long_name = None
        if kind == DIRECTORY:
            continue
        offset = file.at
        crc32, data = _content(file, size, keep=keep, headers_only=headers_only)
        yield Member(name, offset, size, crc32, data)


def parse(header: bytes, path: str, at: int) -> tuple[int, bytes]:
    """Check a header; return the size of its data and its type."""
    try:
        expected = _octal(header[148:156])
        size = _octal(header[124:136])
    except ValueError as error:
        raise refusal(path, at, "a header holds a number that is not octal") from error
    if sum(header) - sum(header[148:156]) + 8 * ord(" ") != expected:
        raise refusal(path, at, "the checksum of a header does not match; this is no tar, or it is damaged")
    kind = header[156:157]
    if kind in (*REGULAR, PAX, LONG_NAME) or (kind == DIRECTORY and size == 0):
        return size, kind
    raise refusal(
        path, at, f"{name_of(header)!r} is {REFUSED.get(kind, f'of type {kind!r}')}; only regular files are read"
    )


def _extension(file: Forward, size: int, at: int) -> bytes:
    if size > MAX_EXTENSION:
        raise refusal(file.location, at, f"a long-name record of {size} bytes exceeds {MAX_EXTENSION}")
    record = file.take(size)
    file.take(-size % BLOCK)
    return record


def _pax(record: bytes, path: str, at: int) -> tuple[str | None, int | None]:
    """Return path and size of a pax record: lines of `LENGTH KEY=VALUE\\n`, LENGTH counting the whole line."""
    name, size = None, None
    try:
        while record:
            count = int(record[: record.index(b" ")])
            key, _, value = record[record.index(b" ") + 1 : count - 1].partition(b"=")
            if count < 5 or record[count - 1 : count] != b"\n":
                raise ValueError("length and line end disagree")
            if key.startswith(b"GNU.sparse"):
                raise refusal(path, at, "a sparse file; only regular files are read")
            if key == b"path":
                name = _checked_name(value, path, at)
            if key == b"size":
                size = _octal(b"%o" % int(value))
            record = record[count:]
    except DataError:
        raise
    except ValueError as error:
        raise refusal(path, at, f"a malformed pax record ({error})") from error
    return name, size


def _content(file: Forward, size: int, *, keep: int, headers_only: bool) -> tuple[int, bytes | None]:
    """CRC32 and, up to `keep` bytes, the data of the next member; leaves the file after its padding."""
    crc32, data = 0, None
    if size <= keep:
        data = file.take(size)
        crc32 = 0 if headers_only else checksum.crc32(data)
    elif headers_only:
        file.skip(size)
    else:
        left = size
        while left:
            piece = file.take(min(left, CHUNK))
            crc32, left = checksum.crc32(piece, crc32), left - len(piece)
    if headers_only and size > keep:
        file.skip(-size % BLOCK)
    else:
        file.take(-size % BLOCK)
    return crc32, data


def _check_end(file: Forward, at: int) -> int:
    """A tar ends with two zero blocks and only zeros after them: a member hidden there would be lost silently.

    Returns the number of these zeros.
    """
    if file.at + BLOCK > file.size or any(file.take(BLOCK)):
        raise refusal(file.location, at, "one zero block where the end needs two; the file is truncated or damaged")
    padding = file.size - file.at
    while left := file.size - file.at:
        rest = file.take(min(left, CHUNK))
        if rest.count(0) != len(rest):
            raise refusal(file.location, at, "data follows the end of the archive (were two tars concatenated?)")
    return padding


def _checked_name(raw: bytes, path: str, at: int) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refusal(path, at, f"the name {raw!r} is not UTF-8") from error
    parts = name.rstrip("/").split("/")
    if not parts[0] or ".." in parts or "\0" in name or len(raw) > MAX_NAME:
        raise refusal(path, at, f"the name {name[:80]!r} is empty, absolute, holds '..', or exceeds {MAX_NAME} bytes")
    return name


def _raw_name(header: bytes) -> bytes:
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + _text(header[:100]) if prefix else _text(header[:100])


def _text(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


def _octal(field: bytes) -> int:
    """Number of a header field; base-256 (GNU, above 8 GiB) is not a member of a shard. Raises ValueError."""
    digits = field.strip(b" \0")
    if digits and not digits.isdigit():  # int() alone would take a sign and underscores
        raise ValueError(f"{field!r} is no number")
    return int(digits or b"0", 8)


def refusal(path: str, at: int, reason: str) -> DataError:
    """What is wrong with a file at a byte, as the error that says so."""
    return DataError(f"{path}, byte {at}: {reason}")


def padding_told(padding: dict[str, int]) -> list[str]:
    """Lines for people about tars that end with more zeros than tar writers leave."""
    return [
        f"warning: {count} zero bytes follow the end of {file}, more than the {RECORD} that tar writers leave; if "
        f"its tail was lost, samples are missing: compare it with its origin"
        for file, count in padding.items()
    ]
