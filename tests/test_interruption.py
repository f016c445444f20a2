"""Long work is left only where it is asked, and only while someone wants to know."""

import threading

import pytest

from mim import ranks
from mim.interruption import Left, before_collective, between_batches, leavable
from mim.log import Pace


def leave():
    raise Left


def test_without_anyone_asking_nothing_happens():
    between_batches()
    before_collective()


@pytest.mark.parametrize("work", [between_batches, lambda: Pace("work", 10).advance(1)])
def test_work_can_be_left_between_batches(work):
    with pytest.raises(Left), leavable(leave, lambda: None):
        work()
    work()


@pytest.mark.parametrize("work", [ranks.wait, lambda: ranks.share([])])
def test_ranks_are_asked_before_they_meet(work):
    with pytest.raises(Left), leavable(lambda: None, leave):
        work()
    work()


@pytest.mark.parametrize("work", [between_batches, before_collective])
def test_a_thread_beside_the_work_is_not_part_of_it(work):
    done = []
    with leavable(leave, leave):
        thread = threading.Thread(target=lambda: done.append(work()))
        thread.start()
        thread.join(20)
    assert done == [None]
