"""One process: signals ask once and act twice, and the end of a run is in status.json."""

import json
import multiprocessing
import os
import signal
import time

import pytest

from mim.contracts import DataError
from mim.watch.attendant import SIGNALS, Attendant
from mim.watch.board import Board
from mim.watch.status import Status
from mim.watch.stopping import Deadline


@pytest.fixture
def attendant(tmp_path):
    """`attendant(**options)` of a run directory of one process."""

    def make(**options):
        return Attendant(Board.open(), Status(tmp_path, "mae", 9, 4), **{"patience": None, "deadline": None} | options)

    return make


def status(folder):
    return json.loads((folder / "status.json").read_text())


def go_on(stopping):
    """Steps of 10 ms until the loop is told to stop, which it must be within 20 s."""
    assert any(stopping(step) for step in range(6, 2000) if time.sleep(0.01) is None)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_comes_twice_at_once_asks_to_stop(attendant, number, capfd):
    previous = signal.getsignal(number)
    found = attendant()
    with found.attending():
        found.stopping.begin(5)
        assert not found.stopping(5)
        for _ in range(2):
            signal.raise_signal(number)
        go_on(found.stopping)
        assert found.stopping.reason == signal.Signals(number).name
    assert signal.getsignal(number) == previous
    assert capfd.readouterr().err.count("saving after this step") == 1


def test_the_end_of_the_time_asks_to_stop(attendant):
    found = attendant(deadline=Deadline(time.time() - 1, "5m before the end"))
    with found.attending():
        found.stopping.begin(5)
        go_on(found.stopping)
    assert found.stopping.reason == "5m before the end"


def test_a_run_that_begins_says_that_it_runs(attendant, tmp_path):
    Status(tmp_path, "mae", 9).write("stopped", 4, code=75)  # of an earlier start
    with attendant().attending():
        assert (status(tmp_path)["state"], status(tmp_path)["step"]) == ("running", 4)


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [(DataError("too many"), 65, "too many"), (KeyError("blocks"), 70, "KeyError: 'blocks'")],
)
def test_an_error_is_written_down_and_goes_on(attendant, tmp_path, error, code, reason):
    with pytest.raises(type(error)), attendant().attending():
        raise error
    found = status(tmp_path)
    assert (found["state"], found["exit_code"], found["reason"]) == ("failed", code, reason)


def ends(attendant, act, *, patience=None):
    """The exit code of a process in which the main thread does `act` in the middle of a run."""

    def run():
        found = attendant(patience=patience)
        with found.attending():
            found.stopping.begin(1)
            found.stopping(1)
            found.at("log", 1)
            act(found)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    return process.exitcode


def test_a_later_signal_ends_the_process_although_the_main_thread_is_busy(attendant, tmp_path):
    def act(_found):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2.5)
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            sum(range(1000))

    assert ends(attendant, act) == 75
    assert status(tmp_path)["reason"] == "a second SIGTERM: stopped at once"


def test_a_main_thread_that_hangs_ends_with_its_stack_written(attendant, tmp_path):
    def stands_still(found):
        found.at("data", 2)
        time.sleep(1e6)

    assert ends(attendant, stands_still, patience=1.0) == 70
    assert status(tmp_path)["reason"].startswith("the run did not get past the data of step 2 within 1 s; the stacks")
    assert "stands_still" in (tmp_path / "stacks-rank0.txt").read_text()
