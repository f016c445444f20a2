"""Loader workers end when their main process says so or is gone, whoever else sends signals."""

import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from mim.data.augment import crop
from mim.data.mixture import order_of
from mim.data.shards import Dataset
from mim.data.stream import loader

OPTIONS = {"view": crop, "sizes": [(16, 24)], "batch_size": 8, "num_steps": 40, "workers": 1, "timeout": 20}


@pytest.fixture(scope="module")
def dataset(shards):
    return Dataset.open(shards / "train")


@pytest.fixture
def handlers():
    """Handlers in the main process, as a run has them."""
    previous = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_ctrl_c_reaches_workers_too_and_they_go_on(dataset):
    found = iter(loader(dataset, **OPTIONS, order=order_of(dataset, seed=0)))
    next(found)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGINT)
    assert len(list(found)) == 39


@pytest.mark.usefixtures("handlers")
def test_sigterm_from_anyone_but_the_main_process_is_outlived(dataset):
    """As when a launcher sends it to the whole process group."""
    found = iter(loader(dataset, **OPTIONS, order=order_of(dataset, seed=0)))
    next(found)
    (worker,) = multiprocessing.active_children()
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    assert len(list(found)) == 39


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid):
    """Whether a process ended; a zombie that nobody waits for has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("idle", [True, False], ids=["waiting for work", "waiting to hand over"])
def test_no_worker_outlives_a_killed_main_process(dataset, idle):
    """Two workers: each holds the pipe of the other open, so a broken pipe alone would end none."""

    def consume(ready):
        steps = {"num_steps": 2} if idle else {"num_steps": 4000, "sizes": [(256, 256)]}
        found = iter(loader(dataset, **OPTIONS | {"workers": 2} | steps, order=order_of(dataset, seed=0)))
        next(found)
        ready.set()
        signal.pause()

    context = multiprocessing.get_context("fork")
    ready = context.Event()
    main = context.Process(target=consume, args=(ready,))
    main.start()
    assert ready.wait(30)
    workers = children_of(main.pid)
    assert len(workers) == 2
    main.kill()
    main.join()
    deadline = time.monotonic() + 20
    while not all(map(gone, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(gone, workers))


@pytest.mark.usefixtures("handlers")
def test_a_worker_that_the_main_process_ends_is_gone(dataset):
    """A fork inherits handlers; one that swallows SIGTERM would leave a worker that holds up the exit."""
    found = iter(loader(dataset, **OPTIONS, order=order_of(dataset, seed=0)))
    next(found)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(timeout=10)
    assert worker.exitcode == 0
