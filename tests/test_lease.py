"""One job at a time in a run directory; who is gone is replaced, who lives is not."""

import json
import multiprocessing
import os
import signal
import socket
import time

import pytest

from mim.config import ConfigError
from mim.contracts import StorageError
from mim.saving import lease
from tests import forked


@pytest.fixture
def run(tmp_path):
    return tmp_path / "runs/one"


@pytest.fixture
def elsewhere(run, monkeypatch):
    """A lease that a job on another machine left; a beat is waited for 0.6 s, looks are frequent."""
    monkeypatch.setattr(lease, "STALE", 0.6)
    pause = time.sleep
    monkeypatch.setattr(lease.time, "sleep", lambda _: pause(0.05))
    run.mkdir(parents=True)
    found = {"token": "far", "host": "far-node", "machine": "far-node boot", "pid": 7, "since": "2026-01-01T00:00:00"}
    (run / lease.FILE).write_text(json.dumps(found))
    return run / lease.FILE


def test_a_second_job_is_refused_and_told_who_holds_the_run(run):
    with lease.hold(run):
        with pytest.raises(ConfigError) as error, lease.hold(run):
            pass
        assert f"is in use by process {os.getpid()} on {socket.gethostname()} since 20" in str(error.value)
        assert lease.holder(run) is not None


def test_a_lease_is_given_back_even_after_an_error(run):
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("")
    with pytest.raises(ZeroDivisionError), lease.hold(run):
        raise ZeroDivisionError
    assert [path.name for path in run.iterdir()] == ["config.yaml"]
    assert lease.holder(run) is None


def test_a_job_that_wrote_nothing_leaves_no_folder(run):
    with lease.hold(run):
        assert run.is_dir()
    assert not run.parent.exists()


def test_the_lease_of_a_killed_process_of_this_machine_is_taken_over_at_once_and_said(run, capsys):
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def job():
        with lease.hold(run):
            ready.set()
            signal.pause()

    process = context.Process(target=job)
    process.start()
    assert ready.wait(30)
    with pytest.raises(ConfigError, match=f"process {process.pid}"), lease.hold(run):
        pass
    process.kill()
    process.join()
    with lease.hold(run) as held:
        held.check()
    assert f"process {process.pid} on {socket.gethostname()}" in (said := capsys.readouterr().err)
    assert "which is gone: taken over" in said


def test_a_process_that_got_the_number_of_a_dead_holder_is_no_holder(run):
    run.mkdir(parents=True)
    dead = {**lease._own("dead"), "started": "1"}
    (run / lease.FILE).write_text(json.dumps(dead))
    assert lease.holder(run) is None
    with lease.hold(run) as held:
        held.check()


def test_a_job_of_another_machine_that_gives_no_sign_of_life_is_replaced(run, elsewhere, capsys):
    assert "far-node" in lease.holder(run)
    with lease.hold(run) as held:
        held.check()
    said = capsys.readouterr().err
    assert "waiting up to" in said
    assert "held by process 7 on far-node since 2026-01-01T00:00:00, which is gone: taken over" in said


def test_a_job_of_another_machine_that_gives_a_sign_of_life_is_not(run, elsewhere):
    process = multiprocessing.get_context("fork").Process(target=lambda: [touch(elsewhere) for _ in range(40)])
    process.start()
    with pytest.raises(ConfigError, match="process 7 on far-node"), lease.hold(run):
        pass
    process.kill()
    process.join()


def touch(file):
    os.utime(file)
    time.sleep(0.05)


def test_a_holder_that_was_replaced_finds_out_and_keeps_its_hands_off(run):
    with lease.hold(run) as held:
        held.check()
        held.file.write_text(json.dumps({"token": "other", "host": "b", "pid": 8}))
        with pytest.raises(StorageError, match="was taken over by process 8 on b"):
            held.check()
    assert json.loads(held.file.read_text())["token"] == "other"


def test_a_holder_gives_signs_of_life(run, monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.01)
    with lease.hold(run) as held:
        os.utime(held.file, (0, 0))
        deadline = time.monotonic() + 20
        while held.file.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - held.file.stat().st_mtime < 60


def test_a_directory_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"), lease.hold(tmp_path / "file/run"):
        pass


def test_of_several_jobs_that_start_at_once_one_gets_a_stale_lease(run):
    run.mkdir(parents=True)
    (run / lease.FILE).write_text(json.dumps({**lease._own("dead"), "started": "1"}))
    context = multiprocessing.get_context("fork")
    go, end, results = context.Event(), context.Event(), context.SimpleQueue()

    def job():
        go.wait()
        try:
            with lease.hold(run):
                results.put("held")
                end.wait()
        except ConfigError:
            results.put("refused")

    jobs = [context.Process(target=job) for _ in range(6)]
    for process in jobs:
        process.start()
    go.set()
    found = sorted(results.get() for _ in jobs)
    end.set()
    for process in jobs:
        process.join()
    assert found == ["held"] + ["refused"] * 5


def test_both_ranks_are_refused_alike(run, tmp_path):
    def work(_rank):
        try:
            with lease.hold(run):
                return "held"
        except ConfigError as error:
            return str(error)

    with lease.hold(run):
        first, second = forked.ranks(2, work, tmp_path)
    assert first == second
    assert f"is in use by process {os.getpid()}" in first


def test_a_storage_that_does_not_answer_for_a_moment_gives_no_lease_away(run, monkeypatch):
    """ESTALE is what NFS says; it is no other job's lease, and signs of life go on."""
    monkeypatch.setattr(lease, "BEAT", 0.05)
    with lease.hold(run) as held:
        honest, failures = lease._read, iter([True, True])

        def read(file):
            if next(failures, False):
                raise OSError(116, "Stale file handle")
            return honest(file)

        monkeypatch.setattr(lease, "_read", read)
        with pytest.raises(OSError, match="Stale") as error:
            held.check()
        assert not isinstance(error.value, StorageError)
        before, deadline = held.file.stat().st_mtime_ns, time.monotonic() + 10
        while held.file.stat().st_mtime_ns == before:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        held.check()
