"""Ranks agree on the step that they stop after; times are read, and a deadline is the earliest that is known."""

import threading

import pytest
import torch.distributed as dist

from mim.config import ConfigError
from mim.watch import stopping
from mim.watch.board import Board
from mim.watch.stopping import Stopping


@pytest.fixture
def ranks(monkeypatch):
    """Three ranks on one board, each about to do step 1."""
    monkeypatch.setattr(dist, "new_group", lambda backend, timeout: None)
    store = dist.HashStore()
    found = [Stopping(Board(store, rank, 3)) for rank in range(3)]
    for one in found:
        one.begin(1)
    return found


def poll(*ranks):
    for one in ranks:
        one.poll()


def test_nobody_stops_while_nobody_asks(ranks):
    assert not any(one(step) for step in range(1, 5) for one in ranks if one.poll() is None)


def test_all_stop_after_the_latest_step_that_one_of_them_has_begun(ranks):
    first, second, third = ranks
    for step in (1, 2, 3):
        assert not first(step)  # it has begun step 4
    assert not second(1)
    third.ask("a signal")
    poll(*ranks, *ranks)
    assert [one.reason for one in ranks] == ["a signal"] * 3
    assert [first(4), second(2), second(3), second(4), third(1), third(4)] == [True, False, False, True, False, True]


def test_a_rank_waits_for_the_votes_of_the_others(ranks):
    first, second, third = ranks
    first.ask("a signal")
    poll(first)
    answers = []
    asking = threading.Thread(target=lambda: answers.append(first(1)))
    asking.start()
    assert not second(1)  # it has not looked yet, and begins step 2
    poll(second, third)
    assert answers == []
    poll(first)
    asking.join(20)
    assert answers == [False]
    assert first.now(2)


def test_a_rank_that_has_not_begun_votes_when_it_does(ranks):
    late = Stopping(ranks[0]._board)
    late.ask("a signal")
    late.poll()
    assert not late.voting
    late.begin(8)
    late.poll()
    assert late.voting


def test_ranks_that_return_to_an_earlier_step_stop_after_its_next(ranks):
    for one in ranks:
        assert not any(one(step) for step in range(1, 9))
    ranks[1].ask("a signal")
    poll(*ranks, *ranks)
    for one in ranks:
        one.begin(4)
    assert not any(one.now(9) for one in ranks)
    poll(*ranks, *ranks)
    assert [one(4) for one in ranks] == [True] * 3


def test_the_first_reason_stands(ranks):
    ranks[2].ask("a signal")
    ranks[0].ask("the time")
    poll(*ranks)
    assert {one.reason for one in ranks} == {"a signal"}


@pytest.mark.parametrize(
    ("text", "expected"), [("90s", 90), ("5m", 300), ("1.5h", 5400), ("2d", 172800), ("1h30m", 5400), ("1h 30m", 5400)]
)
def test_times_have_units(text, expected):
    assert stopping.seconds(text, "train.stop_before") == expected


@pytest.mark.parametrize("text", ["5", "m", "5 minutes", "-5m", ""])
def test_anything_else_is_refused_by_the_name_of_its_key(text):
    with pytest.raises(ConfigError, match=r"train\.stop_before=.* is not a time; write e\.g\. '90s', '5m' or '1h30m'"):
        stopping.seconds(text, "train.stop_before")


@pytest.mark.parametrize(
    ("limit", "environment", "at", "reason"),
    [
        ("24h", {}, 1000 + 86400 - 300, "5m before the end of train.time_limit=24h"),
        (None, {"SLURM_JOB_END_TIME": "5000"}, 4700, "5m before the end of the Slurm job's limit"),
        ("24h", {"SLURM_JOB_END_TIME": "5000"}, 4700, "5m before the end of the Slurm job's limit"),
        ("1h", {"SLURM_JOB_END_TIME": "500000"}, 4300, "5m before the end of train.time_limit=1h"),
    ],
)
def test_the_earliest_end_that_is_known_counts(limit, environment, at, reason):
    found = stopping.deadline(limit, "5m", began=1000.0, environment=environment)
    assert (found.at, found.reason) == (at, reason)


def test_there_is_no_deadline_where_no_end_is_known():
    assert stopping.deadline(None, "5m", began=0.0, environment={}) is None


def test_a_limit_that_leaves_no_time_is_refused():
    with pytest.raises(ConfigError, match=r"train\.time_limit=3m leaves no time .* train\.stop_before=5m"):
        stopping.deadline("3m", "5m", began=0.0, environment={})


def test_both_are_asked_whether_to_stop():
    asked = []
    either = stopping.either(lambda step: step == 2, lambda step: asked.append(step))
    assert [either(1), either(2)] == [False, True]
    assert asked == [1, 2]
