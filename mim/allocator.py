"""Freed memory stays with the process for the next step: settings of glibc's malloc, for trainings on CPUs.

A step frees what it allocated, and the next one asks for the same again. By default glibc takes large blocks from the
kernel and gives them back, so that each step pays for zeroed pages, one page fault every 4 KiB. Kept, memory stands at
the peak of a step, no higher. GPUs have torch's caching allocator, which does the same.
"""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
NEVER = -1  # mallopt(3)
LARGEST = (2**30, 2**25)  # bytes: what is larger still comes from the kernel; glibc before 2.35 refuses the first


def keep_freed_memory() -> bool:
    """Ask malloc not to return memory to the kernel; False, and nothing done, where it is not glibc's."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or not any(mallopt(M_MMAP_THRESHOLD, largest) for largest in LARGEST):
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, NEVER))
