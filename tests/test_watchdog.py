"""Who keeps the others waiting is named; only time that was seen to pass counts."""

import pytest
import torch.distributed as dist

from mim.watch import watchdog
from mim.watch.board import Board
from mim.watch.watchdog import Beat, Look, Watchdog, blame


def looks(*beats):
    return [Look(beat, alive=True) for beat in beats]


def test_the_rank_that_came_to_fewer_places_is_named_with_its_place():
    found = looks(Beat(30, "backward", 7), Beat(28, "data", 7), Beat(30, "backward", 7))
    assert blame(found, 600) == (
        "rank 1 did not get past the data of step 7 within 600 s; others wait for it at the backward of step 7"
    )


def test_several_that_are_behind_are_named_together():
    found = looks(Beat(28, "forward", 7), Beat(28, "forward", 7), Beat(30, "save", 7))
    assert blame(found, 600).startswith("ranks 0, 1 did not get past the forward of step 7")
    many = looks(*[Beat(28, "forward", 7)] * 20, Beat(30, "save", 7))
    assert blame(many, 600).startswith("ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more did not get past")


def test_a_rank_that_does_not_write_any_more_is_named_first():
    found = [Look(Beat(28, "data", 7), alive=True), Look(Beat(30, "update", 7), alive=False)]
    assert blame(found, 600) == "rank 1 did not answer for 3 s; it was last seen at the update of step 7"
    assert blame([found[0], Look(None, alive=False)], 600) == "rank 1 did not answer for 3 s"


def test_ranks_that_wait_at_the_same_place_are_told_as_such():
    assert blame(looks(*[Beat(3, "start", 0)] * 4), 9) == "each of the 4 ranks did not get past the start within 9 s"
    assert blame(looks(Beat(9, "data", 4)), 9) == "the run did not get past the data of step 4 within 9 s"


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def late(dog, clock, seconds):
    """Whether a rank is late after so many seconds, at one poll a second."""
    found = False
    for _ in range(seconds):
        clock[0] += 1.0
        found = dog.poll() or found
    return found


@pytest.fixture
def dog(clock):
    """A rank in step 5 that may take ten seconds for a step."""
    found = Watchdog(Board(dist.HashStore(), 0, 1), 10.0)
    for place in ("log", "data"):
        found.at(place, 5)
    found.poll()
    return found


def test_a_step_that_takes_too_long_is_late(dog, clock):
    assert not late(dog, clock, 9)
    assert late(dog, clock, 1)


def test_coming_to_the_next_place_begins_anew(dog, clock):
    for place in ("forward", "backward", "update"):
        assert not late(dog, clock, 9)
        dog.at(place, 5)


def test_a_process_that_was_stopped_and_goes_on_is_not_late(dog, clock):
    clock[0] += 10000.0
    assert not dog.poll()


@pytest.mark.parametrize("place", ["start", "evaluation", "save"])
def test_long_places_have_three_times_as_long(dog, clock, place):
    dog.at(place, 5)
    assert not late(dog, clock, 29)
    assert late(dog, clock, 2)


def test_the_first_step_of_a_process_has_three_times_as_long(clock):
    dog = Watchdog(Board(dist.HashStore(), 0, 1), 10.0)
    dog.at("forward", 5)
    assert not late(dog, clock, 29)
    assert late(dog, clock, 2)


def test_every_batch_of_an_evaluation_begins_anew(dog, clock):
    dog.at("evaluation", 5)
    for _ in range(5):
        assert not late(dog, clock, 29)
        dog.moves()


def test_without_a_timeout_nothing_is_late(clock):
    dog = Watchdog(Board(dist.HashStore(), 0, 1), None)
    dog.at("data", 5)
    assert not late(dog, clock, 1000)
    assert watchdog.group_options(None)[0].timeout.days == 365  # torch's own would end a run in a debugger


def test_a_collective_waits_longer_than_the_watchdog():
    (options,) = watchdog.group_options(600)
    assert options.timeout.total_seconds() > watchdog.LONG * 600
