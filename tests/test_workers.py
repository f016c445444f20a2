"""Processes of a pool do their work and end with their parent, however that ends."""

import multiprocessing
import os
import signal
import time

import pytest
import torch

from mim.data.workers import pool, run_all


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


def slow_square(number):
    time.sleep(0.1 if number == 0 else 0)
    return number * number


def fail_at_two(number):
    if number == 2:
        raise ValueError("two")
    return number


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_tasks_and_each_is_seen_once(workers):
    seen = []
    found = run_all(
        slow_square, range(7), workers=workers, description="x", done=lambda task, result: seen.append(task) or result
    )
    assert found == [number * number for number in range(7)]
    assert sorted(seen) == list(range(7))


def test_an_error_of_a_task_ends_all_that_has_not_begun():
    seen = []
    with pytest.raises(ValueError, match="two"):
        run_all(fail_at_two, range(500), workers=1, description="x", done=lambda task, _: seen.append(task) or 1)
    assert len(seen) < 100


def test_what_sees_the_results_can_end_it_all():
    def done(task, result):
        raise KeyError(task)

    with pytest.raises(KeyError):
        run_all(slow_square, range(500), workers=1, description="x", done=done)
    assert not multiprocessing.active_children()


def test_no_tasks_are_no_error():
    assert run_all(slow_square, [], workers=None, description="x", done=lambda *_: 1) == []
