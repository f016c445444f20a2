"""TIFF beyond what Pillow keeps: any number of channels, and 16 bits in each, without loss.

Pillow opens 16-bit colour but drops the low bytes, and refuses other numbers of channels than 1, 3 and 4. So the pages
that it would change are read here: uint8, uint16 or float32 in strips or tiles, chunky or planar, uncompressed or
deflate, with or without the horizontal predictor. Other layouts are refused with a way out; the first page is taken.
TIFF revision 6.0 (Adobe, 1992), sections 2, 8, 14, 15; deflate: Adobe's technical note of 2002.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from mim.data.formats import BadImage, Header, on_white

MAX_TAGS = 1024
MAX_VALUES = 1 << 20  # of one tag
MAX_CHANNELS = 1024
SIZES = {1: "B", 3: "H", 4: "I"}  # field types that hold what is asked here: bytes, shorts, longs
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, STRIPS = 256, 257, 258, 259, 262, 273
SAMPLES, ROWS, STRIP_SIZES, PLANAR, PREDICTOR, EXTRA, FORMAT = 277, 278, 279, 284, 317, 338, 339
TILE_WIDTH, TILE_HEIGHT, TILES, TILE_SIZES = 322, 323, 324, 325
ASSOCIATED, UNASSOCIATED = 1, 2  # alpha, in EXTRA
WAY_OUT = "; save it uncompressed or with deflate, or as .npy"


def is_tiff(data: bytes) -> bool:
    """Whether bytes begin like a TIFF (not BigTIFF)."""
    return data[:4] in (b"II*\0", b"MM\0*")


def header(data: bytes) -> Header | None:
    """What a page holds that Pillow would refuse or change; None when Pillow reads it as it is. Raises BadImage."""
    tags = _tags(data)
    samples = _one(tags, SAMPLES, 1)
    bits = set(tags.get(BITS, (1,)))
    kind = _one(tags, FORMAT, 1)
    dtype = {(8, 1): "uint8", (16, 1): "uint16", (32, 3): "float32"}.get((max(bits), kind))
    if dtype is None or len(bits) > 1 or _one(tags, PHOTOMETRIC, 1) not in (0, 1, 2):
        return None
    if dtype == "uint8" and (samples in (1, 3) or _has_alpha(tags)):
        return None
    if dtype == "uint16" and samples == 1:
        return None
    if not 1 <= samples <= MAX_CHANNELS:
        raise BadImage(f"a TIFF of {samples} channels; at most {MAX_CHANNELS} are read")
    channels = samples - 1 if dtype == "uint16" and _has_alpha(tags) else samples
    return Header("tif", channels, dtype, _one(tags, HEIGHT, 0), _one(tags, WIDTH, 0))


def pixels(data: bytes, head: Header) -> np.ndarray:
    """The pixels (H, W, C) of a page that `header` described. Raises BadImage."""
    tags = _tags(data)
    samples = _one(tags, SAMPLES, 1)
    planes = samples if _one(tags, PLANAR, 1) == 2 else 1
    _check_layout(tags, head)
    out = np.empty((planes, head.height, head.width, samples // planes), dtype=head.dtype)
    _read_blocks(data, tags, out)
    if head.dtype == "float32" and not np.isfinite(out).all():
        raise BadImage("a TIFF with NaN or infinite values; replace them, e.g. by a value outside data.range")
    array = out.transpose(1, 2, 0, 3).reshape(head.height, head.width, samples)
    if samples > head.channels:
        colour, alpha = array[..., :-1], array[..., -1:]
        if tags[EXTRA] == (ASSOCIATED,):  # multiplied by alpha already
            array = (colour.astype(np.uint32) + (65535 - alpha)).clip(0, 65535).astype(np.uint16)
        else:
            array = on_white(colour, alpha)
    if head.channels == 1 and _one(tags, PHOTOMETRIC, 1) == 0 and head.dtype != "float32":
        array = np.iinfo(array.dtype).max - array  # white is zero
    return np.ascontiguousarray(array)


def _check_layout(tags: dict[int, tuple[Any, ...]], head: Header) -> None:
    compression, predictor = _one(tags, COMPRESSION, 1), _one(tags, PREDICTOR, 1)
    if compression not in (1, 8, 32946):
        raise BadImage(f"a TIFF of {head.channels} x {head.dtype} compressed by method {compression}{WAY_OUT}")
    if predictor not in (1, 2) or (predictor == 2 and head.dtype == "float32"):
        raise BadImage(f"a TIFF of {head.dtype} with predictor {predictor}{WAY_OUT}")


def _read_blocks(data: bytes, tags: dict[int, tuple[Any, ...]], out: np.ndarray) -> None:
    """Fill the planes (P, H, W, samples) from strips, or from tiles, which are whole at the edges too."""
    planes, height, width, inside = out.shape
    tiled = TILE_WIDTH in tags
    h = max(1, _one(tags, TILE_HEIGHT, 0) if tiled else min(_one(tags, ROWS, height), height))
    w = max(1, _one(tags, TILE_WIDTH, 0)) if tiled else width
    if h * w > 4 * (height + 4096) * (width + 4096):
        raise BadImage(f"a TIFF of {width} x {height} pixels in tiles of {w} x {h}{WAY_OUT}")
    dtype = out.dtype.newbyteorder("<" if data[:2] == b"II" else ">")
    blocks = _blocks(data, tags, tiled, h * w * inside * dtype.itemsize)
    for plane in range(planes):
        for top in range(0, height, h):
            for left in range(0, width, w):
                count = (h if tiled else min(h, height - top)) * w * inside
                raw = next(blocks, b"")
                if len(raw) < count * dtype.itemsize:
                    raise BadImage("a TIFF that is not whole: a strip or tile is too short or missing")
                block = np.frombuffer(raw, dtype, count).reshape(-1, w, inside)
                if _one(tags, PREDICTOR, 1) == 2:
                    block = np.cumsum(block, axis=1, dtype=out.dtype)
                out[plane, top : top + h, left : left + w] = block[: height - top, : width - left]


def _has_alpha(tags: dict[int, tuple[Any, ...]]) -> bool:
    """Whether the last of 2 or 4 samples is transparency; of others nobody knows what they are."""
    return _one(tags, SAMPLES, 1) in (2, 4) and tags.get(EXTRA) in ((ASSOCIATED,), (UNASSOCIATED,))


def _blocks(data: bytes, tags: dict[int, tuple[Any, ...]], tiled: bool, limit: int) -> Iterator[bytes]:
    """The strips or tiles of a page in order, each inflated to at most `limit` bytes."""
    places, sizes = (TILES, TILE_SIZES) if tiled else (STRIPS, STRIP_SIZES)
    for start, size in zip(tags.get(places, ()), tags.get(sizes, ()), strict=False):
        raw = data[start : start + size]
        if _one(tags, COMPRESSION, 1) == 1:
            yield raw
            continue
        inflater = zlib.decompressobj()
        try:
            block = inflater.decompress(raw, limit + 1)  # the one more lets it reach its checksum
        except zlib.error as error:
            raise BadImage(f"a TIFF whose deflate stream is damaged: {error}") from error
        if not inflater.eof:
            raise BadImage("a TIFF whose deflate stream is cut, or longer than its strip or tile")
        yield block


def _tags(data: bytes) -> dict[int, tuple[Any, ...]]:
    """The integer tags of the first page."""
    order = "<" if data[:2] == b"II" else ">"
    try:
        (start,) = struct.unpack_from(order + "I", data, 4)
        (count,) = struct.unpack_from(order + "H", data, start)
        if count > MAX_TAGS:
            raise BadImage(f"a TIFF page of {count} tags")
        found = {}
        for i in range(count):
            place = start + 2 + 12 * i
            tag, kind, number = struct.unpack_from(order + "HHI", data, place)
            if kind not in SIZES or number > MAX_VALUES:
                continue
            layout = f"{order}{number}{SIZES[kind]}"
            inline = struct.calcsize(layout) <= 4
            where = place + 8 if inline else struct.unpack_from(order + "I", data, place + 8)[0]
            found[tag] = struct.unpack_from(layout, data, where)
    except struct.error as error:
        raise BadImage("a TIFF that is not whole: its list of tags ends too soon") from error
    return found


def _one(tags: dict[int, tuple[Any, ...]], tag: int, default: int) -> int:
    values = tags.get(tag, ())
    return int(values[0]) if values else default
