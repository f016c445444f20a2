"""JPEG by its own structure: a header in microseconds, and only the rows of a box decoded.

Entropy decoding is four fifths of the time of a JPEG and cannot be skipped above a box, but everything below it can:
the height in the frame header is lowered to the end of the box (and the rows that the upsampling of colour looks at),
so any decoder stops there. The pixels are bit for bit those of full decoding.

This is done for files whose structure `parse` understands completely: one frame, baseline or extended sequential
Huffman, 8 bits, one scan of all components, ended by the marker of the end, with nothing but restart markers inside.
Corruption in the scan of such a file is never an error for libjpeg (it fills and warns), so leaving out the end of the
scan cannot change whether an image is accepted. All other files go to Pillow whole.

ITU-T T.81, annex B. simplejpeg decodes where it is installed; it and Pillow both carry libjpeg-turbo.
"""

from __future__ import annotations

import io
import math
import struct
import threading
from typing import NamedTuple

import numpy as np
from PIL import Image

try:
    import simplejpeg
except ImportError:  # the optional extra `fast`
    simplejpeg = None

SOI, EOI = b"\xff\xd8", b"\xff\xd9"
SEQUENTIAL = (0xC0, 0xC1)
OTHER_FRAMES = (*range(0xC2, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0), 0xDC, 0xDE, 0xDF)
SOS, APP1, APP2, APP14 = 0xDA, 0xE1, 0xE2, 0xEE
ORIENTATION = 0x0112  # EXIF tag
SEQUENTIAL_SCAN = bytes((0, 63, 0))  # all frequencies, all bits
MAX_SIDE = 65500  # pixels; libjpeg's
CONTEXT = 2  # rows below a pixel that it depends on: half-height colour is interpolated with the row below
MAX_KEPT = 64 << 20  # bytes of decoded pixels whose memory a thread keeps
XMP = b"http://ns.adobe.com/xap/1.0/"

_scratch = threading.local()


class Jpeg(NamedTuple):
    """The structure of a JPEG that can be cut."""

    height: int
    width: int
    channels: int  # 1 or 3
    orientation: int  # EXIF, 1 to 8
    mcu_height: int  # pixels: a row of blocks of all components
    height_at: int  # offset of the frame's height


def parse(data: bytes | memoryview) -> Jpeg | None:
    """Read the structure; None when anything is unusual or damaged, which is for Pillow to judge."""
    if data[:2] != SOI or data[-2:] != EOI:
        return None
    place, frame, described = 2, None, list[bytes]()
    try:
        while True:
            if data[place] != 0xFF:
                return None
            marker = data[place + 1]
            (length,) = struct.unpack_from(">H", data, place + 2)
            body = bytes(data[place + 4 : place + 2 + length])
            if marker in OTHER_FRAMES or length < 2 or marker < 0xC0 or 0xD0 <= marker <= 0xD9:
                return None
            if marker in SEQUENTIAL:
                if frame is not None:
                    return None
                frame = _frame(body, place + 4)
                if frame is None:
                    return None
            elif marker == APP1:
                described.append(body)
            elif marker == APP2 and body[:4] == b"MPF\0":
                return None
            elif marker == SOS:
                break
            place += 2 + length
    except (IndexError, struct.error):
        return None
    if frame is None or len(body) != 4 + 2 * frame.channels or body[0] != frame.channels:
        return None
    if body[-3:] != SEQUENTIAL_SCAN:
        return None
    orientation = _orientation(described)
    if orientation is None or not _only_restarts(data, place + 2 + length):
        return None
    return frame._replace(orientation=orientation)


def pixels(data: bytes | memoryview, jpeg: Jpeg, box: tuple[int, int, int, int] | None = None) -> np.ndarray | None:
    """The stored pixels (h, w, C) of a box (top, left, h, w), or all, before EXIF turns them.

    None when Pillow must judge.
    """
    top, left, h, w = box or (0, 0, jpeg.height, jpeg.width)
    bottom = top + h
    rows = min(jpeg.height, -(-(bottom + CONTEXT) // jpeg.mcu_height) * jpeg.mcu_height)
    shortened: bytes | bytearray | memoryview = data
    if rows < jpeg.height:
        shortened = bytearray(data)
        shortened[jpeg.height_at : jpeg.height_at + 2] = struct.pack(">H", rows)
    try:
        found = _decode(shortened, (rows, jpeg.width, jpeg.channels), reuse=box is not None)
    except MemoryError:  # says something about the machine, not about the image
        raise
    except Exception:  # of any decoder: Pillow's verdict on the untouched file counts
        return None
    if found.shape != (rows, jpeg.width, jpeg.channels):
        return None
    return found if box is None else np.array(found[top:bottom, left : left + w])


def _decode(data: bytes | bytearray | memoryview, shape: tuple[int, int, int], *, reuse: bool) -> np.ndarray:
    """All pixels; with `reuse` in memory that the next call of this thread overwrites."""
    if simplejpeg is not None:
        # not strict: what libjpeg repairs with a warning is accepted, as by Pillow
        colours = "GRAY" if shape[2] == 1 else "RGB"
        return simplejpeg.decode_jpeg(data, colours, buffer=_buffer(math.prod(shape)) if reuse else None, strict=False)
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        return np.array(image).reshape(image.height, image.width, -1)


def _buffer(size: int) -> bytearray | None:
    """Memory that is touched already: fresh pages cost a tenth of decoding into them."""
    if size > MAX_KEPT:
        return None
    kept = getattr(_scratch, "kept", None)
    if kept is None or len(kept) < size:
        kept = _scratch.kept = bytearray(size)
    return kept


def _frame(body: bytes, start: int) -> Jpeg | None:
    precision, height, width, count = struct.unpack_from(">BHHB", body)
    if precision != 8 or count not in (1, 3) or len(body) != 6 + 3 * count:
        return None
    if not 1 <= height <= MAX_SIDE or not 1 <= width <= MAX_SIDE:
        return None
    sampling = [body[7 + 3 * i] for i in range(count)]
    vertical = [s & 15 for s in sampling]
    if any(not 1 <= s >> 4 <= 4 or not 1 <= s & 15 <= 4 for s in sampling):
        return None
    mcu_height = 8 * max(vertical)
    return Jpeg(height, width, count, 1, mcu_height, start + 1)


def _orientation(described: list[bytes]) -> int | None:
    """The orientation in the APP1 segments, 1 when they say none; None when it is for Pillow to read."""
    exifs = [body for body in described if body[:6] == b"Exif\0\0"]
    if len(exifs) > 1:
        return None
    exif, found = Image.Exif(), None
    try:
        if exifs:
            exif.load(exifs[0])
            found = exif.get(ORIENTATION)
    except Exception:  # a broken block counts as absent, as in decode.py
        return None
    if found is None and any(body.startswith(XMP) and b"Orientation" in body for body in described):
        return None
    return found if found in range(1, 9) else 1  # others turn nothing


def _only_restarts(data: bytes | memoryview, start: int) -> bool:
    """Whether the scan holds no marker but restarts before the end: every FF is stuffed, a restart, or the end."""
    scan = np.frombuffer(data, np.uint8, offset=start)
    after = (scan[:-2] == 0xFF).view(np.uint8)
    after *= scan[1:-1]  # what follows an FF, 0 elsewhere and where it is stuffed
    if not after.max(initial=0):  # no restarts: half the time of looking at each FF
        return True
    return bool(((after == 0) | ((after >= 0xD0) & (after <= 0xD7))).all())
