"""Signals, time limits and hangs of runs on two processes: all ranks stop at one step, and nothing is lost."""

import signal
import time

import pytest

from mim.saving import checkpoint
from mim.watch import attendant
from tests.launched import Forked, Torchrun
from tests.test_train import dataset, lines, recipe, tensors  # noqa: F401  (dataset is a fixture)

STEPS = 12
EVALS = ("evals.knn.every=5 steps", "evals.knn.k=3", "evals.knn.batch_size=4", "evals.reconstruction.every=5 steps")


@pytest.fixture(scope="module")
def experiment(dataset, tmp_path_factory):  # noqa: F811
    """A recipe, and its run on two ranks that nobody interrupts."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    options = {"optim__length": f"{STEPS} steps", "train__log_every": "1 steps", "train__save_every": "4 steps"}
    path = recipe(dataset, folder, data__val_path=str(dataset), **options)
    with Forked(path, folder / "run", *EVALS) as run:
        assert run.codes() == [0, 0], run.said
    assert (run.status["state"], run.status["exit_code"]) == ("done", 0)
    return path, folder / "run"


def finish(path, folder, reference):
    """Rerun the command to its end and compare with the run that nobody interrupted."""
    with Forked(path, folder, *EVALS) as run:
        assert run.codes() == [0, 0], run.said
    ours, theirs = ([{**e, "reconstruction": None} for e in lines(found)] for found in (folder, reference))
    assert ours == theirs
    mine, other = tensors(folder), tensors(reference)
    assert mine.keys() == other.keys()
    for name, value in other.items():
        assert mine[name].equal(value), name


def check_stopped(run):
    """All ranks stopped, and the step that the status names is saved."""
    status = run.status
    assert (status["state"], status["exit_code"]) == ("stopped", 75), run.said
    assert checkpoint.step_of(checkpoint.newest(run.run)) == status["step"]


def test_sigterm_to_one_rank_stops_all_at_one_saved_step_and_the_rerun_is_exact(experiment, tmp_path):
    path, reference = experiment
    with Forked(path, tmp_path / "run", *EVALS, step=0.2) as run:
        run.until_step(2)
        run.send(1, signal.SIGTERM)
        assert run.codes() == [75, 75], run.said
    check_stopped(run)
    assert 2 <= run.status["step"] < STEPS
    assert run.status["reason"] == "SIGTERM (rank 1)"
    finish(path, tmp_path / "run", reference)


def test_sigterm_to_torchrun_stops_all_ranks_and_the_status_says_so(experiment, tmp_path):
    path, _ = experiment
    with Torchrun(path, tmp_path / "run", "optim.length=100000 steps") as launched:
        launched.until_step(3)
        launched.process.terminate()
        assert launched.process.wait(60) != 0
    check_stopped(launched)
    assert launched.status["reason"].startswith("SIGTERM (rank ")


def test_a_signal_during_an_evaluation_leaves_it_and_the_rerun_does_it_again(experiment, tmp_path):
    path, reference = experiment
    with Forked(path, tmp_path / "run", *EVALS, batch=1.0) as run:
        run.until(run.slow_place.exists)
        run.send(1, signal.SIGUSR1)
        assert run.codes() == [75, 75], run.said
    check_stopped(run)
    assert [(e["step"], e["event"]) for e in lines(tmp_path / "run")][-1] == (5, "train")
    assert "step 5: knn, reconstruction at the next start" in run.said
    finish(path, tmp_path / "run", reference)


def test_a_second_signal_during_a_save_ends_all_ranks_at_once_with_the_older_checkpoint(experiment, tmp_path):
    path, reference = experiment
    with Forked(path, tmp_path / "run", *EVALS, step=0.2) as run:
        run.until_step(2)
        run.send(0, signal.SIGTERM)
        assert run.codes() == [75, 75], run.said
    first = run.status["step"]
    with Forked(path, tmp_path / "run", *EVALS, save=1e6) as run:
        run.until(run.slow_place.exists)
        run.send(1, signal.SIGTERM)
        time.sleep(attendant.ONE_SIGNAL + 0.5)
        run.send(1, signal.SIGTERM)
        assert run.codes() == [75, 75], run.said
    check_stopped(run)
    assert (run.status["step"], run.status["reason"]) == (first, "a second SIGTERM: stopped at once")
    finish(path, tmp_path / "run", reference)


def test_a_signal_before_the_first_step_ends_all_ranks_at_once(experiment, tmp_path):
    path, _ = experiment
    with Forked(path, tmp_path / "run", step=1e6) as run:
        run.until((tmp_path / "run/log.jsonl").exists)
        run.send(1, signal.SIGTERM)
        assert run.codes() == [75, 75], run.said
    assert (run.status["state"], run.status["step"]) == ("stopped", 0)
    assert run.status["reason"] == "SIGTERM before the first step"


def test_a_run_stops_before_its_time_ends_and_the_rerun_is_exact(experiment, tmp_path):
    path, reference = experiment
    limits = ("train.time_limit=60s", "train.stop_before=58s")
    with Forked(path, tmp_path / "run", *EVALS, *limits, step=1.0) as run:
        assert run.codes() == [75, 75], run.said
    check_stopped(run)
    assert "58s before the end of train.time_limit=60s" in run.status["reason"]
    assert 1 <= run.status["step"] < STEPS
    finish(path, tmp_path / "run", reference)


def test_a_rank_that_hangs_is_named_with_its_place_and_all_stacks_are_written(experiment, tmp_path):
    path, _ = experiment
    with Forked(path, tmp_path / "run", "train.timeout=2s", hang=(1, 6)) as run:
        assert run.codes() == [70, 70], run.said
    status = run.status
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", 70, 4)
    assert status["reason"].startswith(
        "rank 1 did not get past the forward of step 6 within 2 s; others wait for it at the backward of step 6"
    )
    assert "slow_forward" in (tmp_path / "run/stacks-rank1.txt").read_text()
    assert "backward" in (tmp_path / "run/stacks-rank0.txt").read_text()


def reason_without(lost, number, experiment, run, *options):
    """Send a signal to one of two ranks at step 5; returns why the other one says that the run failed."""
    path, _ = experiment
    with Forked(path, run, *options, step=0.2) as forked:
        forked.until_step(5)
        forked.send(lost, number)
        left = forked.ranks[1 - lost]
        left.join(60)
        assert left.exitcode == 70, forked.said
    assert forked.status["state"] == "failed"
    return forked.status["reason"]


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_is_frozen_or_killed_is_named(experiment, tmp_path, number):
    reason = reason_without(1, number, experiment, tmp_path / "run", "train.timeout=2s")
    assert reason.startswith("rank 1 did not answer for 3 s; it was last seen at the ")


def test_without_the_first_rank_and_its_store_the_next_says_so(experiment, tmp_path):
    reason = reason_without(0, signal.SIGKILL, experiment, tmp_path / "run")
    assert reason.startswith("the store of the launch, which rank 0 or its launcher keeps, has ended")


def test_the_error_of_another_rank_is_the_reason_that_the_status_gives(experiment, tmp_path):
    path, _ = experiment
    with Forked(path, tmp_path / "run", fail=(1, 6)) as run:
        assert run.codes() == [70, 70], run.said
    assert run.status["reason"] == "rank 1: FloatingPointError: the sum is odd"
    assert (run.status["state"], run.status["exit_code"]) == ("failed", 70)
