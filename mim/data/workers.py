"""Processes for work on shards: one thread each, and none outlives the process that started it.

The pool of the standard library leaves its processes waiting for ever when their parent is killed, with its locks held.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mim.data.shards import Dataset, read_lock

WATCH = 0.2  # seconds between two looks at the parent


def pool(workers: int | None, num_tasks: int) -> ProcessPoolExecutor:
    """As many processes as asked for (default: one per allowed CPU), and no more than there are tasks."""
    count = max(1, min(workers or len(os.sched_getaffinity(0)), num_tasks))
    return ProcessPoolExecutor(count, initializer=_begin, initargs=(os.getpid(),))


@functools.lru_cache(maxsize=1)  # in each worker: sending thousands of shards along with each task would take longer
def opened(path: Path) -> tuple[Dataset, list[dict[str, Any]]]:
    """A dataset and its shards as the lock names them, without a check that they are there."""
    lock = read_lock(path)
    return Dataset(path, lock), lock["shards"]


def _begin(parent: int) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH)
    os._exit(1)
