"""Freed memory is there for the next step, without new pages from the kernel."""

import ctypes
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from mim import allocator
from mim.allocator import keep_freed_memory

FAULTS = """
import resource
from mim.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        bytearray(b"x") * 2**26  # 64 MiB, written and freed
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

alone = faults()
keep_freed_memory()
faults()  # takes what it then keeps
print(alone, faults())
"""


GLIBC = tuple(map(int, (platform.libc_ver()[1] or "0").split(".")))


@pytest.mark.skipif(GLIBC < (2, 35), reason="malloc is not glibc's, or takes larger blocks from the kernel")
def test_what_a_step_frees_costs_the_next_one_no_page_faults():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    alone, kept = map(int, done.stdout.split())
    assert alone >= 3 * 2**26 // 2**21  # at least one for each huge page
    assert kept < alone / 10


def test_another_malloc_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()


def test_an_older_glibc_keeps_as_large_blocks_as_it_can(monkeypatch):
    asked = []

    def mallopt(option, value):
        asked.append((option, value))
        return int(value <= 2**25)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    assert keep_freed_memory()
    assert asked[-2:] == [(allocator.M_MMAP_THRESHOLD, 2**25), (allocator.M_TRIM_THRESHOLD, allocator.NEVER)]
