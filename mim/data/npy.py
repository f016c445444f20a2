"""Images in NumPy's `.npy` format: (H, W) or (H, W, C) of uint8, uint16 or float32, for what no image format holds.

Arrays of objects are refused before anything is unpickled, and nothing is allocated before the header has been held
against the length of the file.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.lib import format as npy_format

from mim.data.formats import DTYPES, BadImage, Header

MAGIC = b"\x93NUMPY"
MAX_HEADER = 4096  # bytes; what NumPy writes for an image takes 128


def header(data: bytes) -> Header:
    """Read shape and type. Raises BadImage."""
    (height, width, channels), dtype, _, _ = _parse(data)
    return Header("npy", channels, dtype.name, height, width)


def pixels(data: bytes) -> np.ndarray:
    """The pixels (H, W, C) in the machine's byte order. Raises BadImage."""
    shape, dtype, fortran, start = _parse(data)
    flat = np.frombuffer(data, dtype, offset=start)
    array = flat.reshape(shape[::-1]).transpose(2, 1, 0) if fortran else flat.reshape(shape)
    array = np.array(array, dtype=dtype.newbyteorder("="), order="C")  # writable
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise BadImage("an array with NaN or infinite values; replace them, e.g. by a value outside data.range")
    return array


def _parse(data: bytes) -> tuple[tuple[int, int, int], np.dtype, bool, int]:
    """Shape (H, W, C), type, whether in Fortran's order, and the offset of the first value."""
    file = io.BytesIO(data)
    try:
        version = npy_format.read_magic(file)
        read = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file, max_header_size=MAX_HEADER)
    except KeyError as error:
        raise BadImage("an array in a version of .npy above 2.0; write it with np.save") from error
    except ValueError as error:
        raise BadImage(f"no .npy array that can be read: {' '.join(str(error).split())}") from error
    if dtype.hasobject or dtype.name not in DTYPES:
        raise BadImage(f"an array of {dtype.name}; uint8, uint16 and float32 are read")
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise BadImage(f"an array of shape {shape}; images are (H, W) or (H, W, C)")
    height, width, channels = (*shape, 1)[:3]
    start = file.tell()
    if len(data) - start != height * width * channels * dtype.itemsize:
        raise BadImage(f"an array of shape {shape} in {len(data) - start} bytes; the file is not whole")
    return (height, width, channels), dtype, fortran, start
