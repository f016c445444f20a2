"""Processes for work on shards: one thread each, and none outlives the process that started it.

The pool of the standard library leaves its processes waiting for ever when their parent is killed, with its locks held.
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor

import torch

WATCH = 0.2  # seconds between two looks at the parent


def pool(workers: int | None, num_tasks: int) -> ProcessPoolExecutor:
    """As many processes as asked for (default: one per allowed CPU), and no more than there are tasks."""
    count = max(1, min(workers or len(os.sched_getaffinity(0)), num_tasks))
    return ProcessPoolExecutor(count, initializer=_begin, initargs=(os.getpid(),))


def _begin(parent: int) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH)
    os._exit(1)
