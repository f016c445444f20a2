"""Strict scan of a tar: where every member lies, and its CRC32.

Shards come from strangers, so the parser accepts only what a shard needs: regular files and directories, in ustar,
with the two common long-name extensions (pax 'x', GNU 'L'), bounded. Links, devices, sparse files, compression, names
that leave the folder, sizes that leave the file and a missing end are refused by name and offset. `tarfile` is more
lenient: it expands sparse files, reads pax headers of any size and takes a truncated archive for a short one.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mim.contracts import DataError

BLOCK = 512
MAX_EXTENSION = 64 * 1024  # bytes of one pax or long-name record; real ones hold a path
MAX_NAME = 255  # bytes
CHUNK = 1 << 20  # bytes read at a time
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
    crc32: int


def name_of(header: bytes) -> str:
    """Return the name in one 512-byte header, unchecked: bytes that are not UTF-8 are replaced."""
    return _raw_name(header).decode("utf-8", "replace")


def scan(path: str | Path) -> Iterator[Member]:
    """Yield the regular files of a tar in order; raise DataError with file and offset on anything unexpected."""
    path = Path(path)
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        if file.read(len(GZIP)) == GZIP:
            raise _refusal(path, 0, "the file is compressed; decompress it first (gunzip)")
        file.seek(0)
        long_name: str | None = None
        long_size: int | None = None
        while True:
            at = file.tell()
            header = _read(file, BLOCK, path, at)
            if not any(header):
                _check_end(file, path, at)
                return
            size, kind = _parse(header, path, at)
            if long_size is not None:
                size, long_size = long_size, None
            if file.tell() + size > length:
                raise _refusal(path, at, f"a member of {size} bytes leaves the file of {length} bytes; it is truncated")
            if kind in (PAX, LONG_NAME):
                record = _extension(file, size, path, at)
                if kind == LONG_NAME:
                    long_name = _checked_name(_text(record), path, at)
                else:
                    long_name, long_size = _pax(record, path, at)
                continue
            name = long_name if long_name is not None else _checked_name(_raw_name(header), path, at)
            long_name = None
            if kind == DIRECTORY:
                continue
            offset = file.tell()
            yield Member(name, offset, size, _crc32(file, size, path))


def _parse(header: bytes, path: Path, at: int) -> tuple[int, bytes]:
    """Check a header; return the size of its data and its type."""
    try:
        expected = _octal(header[148:156])
        size = _octal(header[124:136])
    except ValueError as error:
        raise _refusal(path, at, "a header holds a number that is not octal") from error
    if sum(header) - sum(header[148:156]) + 8 * ord(" ") != expected:
        raise _refusal(path, at, "the checksum of a header does not match; this is no tar, or it is damaged")
    kind = header[156:157]
    if kind in (*REGULAR, PAX, LONG_NAME) or (kind == DIRECTORY and size == 0):
        return size, kind
    raise _refusal(
        path, at, f"{name_of(header)!r} is {REFUSED.get(kind, f'of type {kind!r}')}; only regular files are read"
    )


def _extension(file: BinaryIO, size: int, path: Path, at: int) -> bytes:
    if size > MAX_EXTENSION:
        raise _refusal(path, at, f"a long-name record of {size} bytes exceeds {MAX_EXTENSION}")
    record = _read(file, size, path, at)
    _read(file, -size % BLOCK, path, at)
    return record


def _pax(record: bytes, path: Path, at: int) -> tuple[str | None, int | None]:
    """Return path and size of a pax record: lines of `LENGTH KEY=VALUE\\n`, LENGTH counting the whole line."""
    name, size = None, None
    try:
        while record:
            count = int(record[: record.index(b" ")])
            key, _, value = record[record.index(b" ") + 1 : count - 1].partition(b"=")
            if count < 5 or record[count - 1 : count] != b"\n":
                raise ValueError("length and line end disagree")
            if key.startswith(b"GNU.sparse"):
                raise _refusal(path, at, "a sparse file; only regular files are read")
            if key == b"path":
                name = _checked_name(value, path, at)
            if key == b"size":
                size = _octal(b"%o" % int(value))
            record = record[count:]
    except DataError:
        raise
    except ValueError as error:
        raise _refusal(path, at, f"a malformed pax record ({error})") from error
    return name, size


def _crc32(file: BinaryIO, size: int, path: Path) -> int:
    """CRC32 of the next `size` bytes; leaves the file after their padding."""
    crc, left = 0, size
    while left:
        piece = _read(file, min(left, CHUNK), path, file.tell())
        crc, left = zlib.crc32(piece, crc), left - len(piece)
    _read(file, -size % BLOCK, path, file.tell())
    return crc


def _check_end(file: BinaryIO, path: Path, at: int) -> None:
    """A tar ends with two zero blocks and nothing after them: a member hidden behind the end would be lost silently."""
    if len(second := file.read(BLOCK)) < BLOCK or any(second):
        raise _refusal(path, at, "one zero block where the end needs two; the file is truncated or damaged")
    while rest := file.read(CHUNK):
        if rest.count(0) != len(rest):
            raise _refusal(path, at, "data follows the end of the archive (were two tars concatenated?)")


def _checked_name(raw: bytes, path: Path, at: int) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _refusal(path, at, f"the name {raw!r} is not UTF-8") from error
    parts = name.rstrip("/").split("/")
    if not parts[0] or ".." in parts or "\0" in name or len(raw) > MAX_NAME:
        raise _refusal(path, at, f"the name {name[:80]!r} is empty, absolute, holds '..', or exceeds {MAX_NAME} bytes")
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


def _read(file: BinaryIO, count: int, path: Path, at: int) -> bytes:
    if len(data := file.read(count)) < count:
        raise _refusal(path, at, "the file ends before the archive does; it is truncated")
    return data


def _refusal(path: Path, at: int, reason: str) -> DataError:
    return DataError(f"{path}, byte {at}: {reason}")
