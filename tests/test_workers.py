"""Processes of a pool do their work and end with their parent, however that ends."""

import multiprocessing
import os
import signal
import time

import pytest
import torch

from mim.data.workers import pool


def work(queue):
    """Start a pool whose process says who it is and then sleeps."""
    with pool(1, 1) as processes:
        processes.submit(os.getpid).add_done_callback(lambda done: queue.put(done.result()))
        processes.submit(time.sleep, 600).result()


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_no_process_outlives_a_parent_that_was_killed():
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    parent = context.Process(target=work, args=(queue,))
    parent.start()
    worker = queue.get(timeout=60)
    assert is_alive(worker)
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    deadline = time.monotonic() + 60
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(worker)


@pytest.mark.parametrize(("workers", "tasks", "count"), [(3, 2, 2), (1, 9, 1), (2, 0, 1)])
def test_there_are_no_more_processes_than_tasks_and_each_runs_on_one_thread(workers, tasks, count):
    with pool(workers, tasks) as processes:
        assert processes._max_workers == count
        assert processes.submit(torch.get_num_threads).result() == 1
