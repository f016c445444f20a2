"""The loop notices that it waits for data, once, and says why in numbers."""

import pytest

from mim.data import stages
from mim.data.stages import WINDOW, Clock, Waiting, advise_workers, bound_by

SECONDS = {"read": 0.1, "decode": 0.6, "augment": 0.2, "collate": 0.1}  # of a batch of 100


def steps(waiting, count, *, waited, elapsed=1.0, start=100.0):
    """What `count` steps say; each waits so long of so much."""
    said = []
    for number in range(count):
        waiting.batch(waited, SECONDS, 100)
        said += waiting.step(start + number * elapsed)
    return said


def test_a_loop_that_waits_is_told_once_after_fifty_steps_what_bounds_it(monkeypatch):
    monkeypatch.setattr(stages, "allowed_cpus", lambda: 4)
    waiting = Waiting(workers=2)
    assert steps(waiting, WINDOW, waited=0.3) == []  # the first step, in which workers start, does not count
    first, second = steps(waiting, 1, waited=0.3, start=100.0 + WINDOW)
    assert "the loop waited 30 % of the last 50 steps. A worker makes 100 images/s" in first
    assert "(read 10 %, decode 60 %, augment 20 %, collate 10 %), 2 of them at most 200." in first
    assert "set train.workers=4; decoding bounds a worker" in second
    assert "mim bench data" in second
    assert steps(waiting, 3 * WINDOW, waited=0.5, start=200.0) == []


def test_waiting_a_tenth_of_the_time_is_fine():
    assert steps(Waiting(workers=2), 3 * WINDOW, waited=0.09) == []


def test_a_slow_start_is_no_reason_to_speak():
    waiting = Waiting(workers=2)
    waiting.batch(60.0, SECONDS, 100)
    assert waiting.step(60.0) == []
    assert steps(waiting, 3 * WINDOW, waited=0.01, start=61.0) == []


def test_more_workers_are_advised_only_where_there_are_cpus():
    assert advise_workers(0, 2) == "the main process renders between steps: set train.workers=2"
    assert advise_workers(1, 8) == "1 of 8 allowed CPUs render: set train.workers=8"
    assert advise_workers(8, 8) == "8 workers have 8 allowed CPUs: more workers cannot help, more CPUs can"


def test_cpus_are_those_that_this_process_may_use_shared_among_local_ranks(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))
    assert stages.allowed_cpus() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    assert stages.allowed_cpus() == 2


def test_every_stage_has_a_remedy():
    assert list(stages.REMEDIES) == list(stages.STAGES)
    assert bound_by(SECONDS) == "decode"


def test_a_clock_gives_each_stage_the_time_since_the_one_before(monkeypatch):
    times = iter([1.0, 3.0, 7.0, 7.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = Clock()
    for stage in ("read", "decode", "read"):
        clock.done(stage)
    assert clock.seconds == pytest.approx({"read": 2.5, "decode": 4.0, "augment": 0.0, "collate": 0.0})
