"""Processes for work on shards: one thread each, and none outlives the process that started it.

The pool of the standard library leaves its processes waiting for ever when their parent is killed, with its locks held.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from mim.data.shards import Dataset, read_lock

Task = TypeVar("Task")
Result = TypeVar("Result")
WATCH = 0.2  # seconds between two looks at the parent


def pool(workers: int | None, num_tasks: int) -> ProcessPoolExecutor:
    """As many processes as asked for (default: one per allowed CPU), and no more than there are tasks."""
    count = max(1, min(workers or len(os.sched_getaffinity(0)), num_tasks))
    return ProcessPoolExecutor(count, initializer=_begin, initargs=(os.getpid(),))


def run_all(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    workers: int | None,
    description: str,
    done: Callable[[Task, Result], int],
    total: int | None = None,
) -> list[Result]:
    """Run a function on every task, in processes, beside a bar of images; return the results in the tasks' order.

    done: sees every result as it comes and returns its images. total: images of all tasks, if it is known. The first
    error, also one of `done`, ends all: what runs is waited for, what waits is not begun.
    """
    with (
        tqdm(total=total, desc=description, unit=" images", disable=None) as bar,
        pool(workers, len(tasks)) as processes,
    ):
        futures = {processes.submit(function, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                bar.update(done(futures[future], future.result()))
        except BaseException:
            processes.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]


@functools.lru_cache(maxsize=1)  # in each worker: sending thousands of shards along with each task would take longer
def opened(path: Path) -> tuple[Dataset, list[dict[str, Any]]]:
    """A dataset and its shards as the lock names them, without a check that they are there."""
    lock = read_lock(path)
    return Dataset(path, lock), lock["shards"]


def _begin(parent: int) -> None:
    torch.set_num_threads(1)
    signal.set_wakeup_fd(-1)  # a run's, inherited: its signals are not this process's
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH)
    os._exit(1)
