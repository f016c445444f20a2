"""Arrays of `.npy` files, mapped into memory without a descriptor that stays open.

NumPy's own mapping keeps one for as long as the array lives. A dataset has an index per shard: with a limit of 1024
descriptors, the usual one, a process could read from no more than about 900 shards.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy_format

# Of one kind in a process. Mapping an index anew takes as long as decoding a small image, so all of ImageNet-1k's (1281
# shards of 1000, shuffled whole) stay; Linux allows a process 65530 mappings of all kinds.
MAX_MAPPED = 2048
MAX_HEADER = 4096  # bytes; what NumPy writes for a structured array of four fields takes 256


def map_array(file: Path) -> np.ndarray:
    """The array of a file, of which only what is looked at is read. Raises OSError, and ValueError for no array."""
    with file.open("rb") as opened:
        version = npy_format.read_magic(opened)
        if version != (1, 0):
            raise ValueError(f"an array in version {version} of .npy, where 1.0 is read")
        shape, fortran, dtype = npy_format.read_array_header_1_0(opened, max_header_size=MAX_HEADER)
        start = opened.tell()
        size = opened.seek(0, 2)
    if dtype.hasobject or fortran or size != start + math.prod(shape) * dtype.itemsize:
        raise ValueError(f"no array of {dtype} {shape} in {size} bytes")
    if size == start:
        return np.empty(shape, dtype)
    mapped = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)  # closes the file behind it
    array = mapped.numpy()[start:].view(dtype).reshape(shape)
    array.flags.writeable = False
    return array
