"""Saves: what is written is the snapshot, what fails is told and survived, what is deleted could be spared."""

import errno
import hashlib
import json
import os
import shutil
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from mim.contracts import StorageError
from mim.saving import checkpoint, lease, retention, save_stages, saver, snapshot
from mim.saving.lease import Lease
from mim.saving.saver import Saver
from tests import forked


def tensors(value=1.0):
    return {
        "model.weight": torch.full((8, 4), value),
        "optimizer.state": torch.full((3,), value),
        "ema.x": torch.ones(()),
    }


def loaded(folder):
    state = {name: torch.zeros_like(value) for name, value in tensors().items()}
    checkpoint.load_tensors(folder, state)
    return state


@pytest.fixture
def stage(monkeypatch):
    """`stage(name, action)`: act when a save comes to a stage; returns the list of stages that were passed."""
    passed, actions = [], {}

    def reached(name):
        passed.append(name)
        actions.get(name, lambda: None)()

    monkeypatch.setattr(save_stages, "reached", reached)

    def at(name=None, action=None):
        assert name is None or name in save_stages.STAGES
        actions[name] = action or (lambda: None)
        return passed

    return at


def full_disk(run):
    """Make the first file of tensors one that takes no byte: a real ENOSPC of the kernel."""
    (folder,) = (run / "checkpoints").glob(".tmp-*")
    (folder / "tensors/shard-00001-model-00001-of-00001.safetensors").symlink_to("/dev/full")


def fail():
    raise OSError(errno.EIO, os.strerror(errno.EIO))


# ---- what is written -----------------------------------------------------------------------------


def test_a_save_in_the_background_holds_the_weights_of_its_step_although_they_change_at_once(tmp_path, stage):
    go = threading.Event()
    stage("before-tensors", go.wait)
    values = tensors(1.0)
    with Saver(tmp_path, None, keep=2) as saving:
        saving.save(3, values, {"position": 18})
        for value in values.values():
            value.fill_(99.0)
        go.set()
        saving.wait()
    (folder,) = checkpoint.list_checkpoints(tmp_path)
    assert checkpoint.verify(folder) is None
    assert all(value.max() == 1 for value in loaded(folder).values())
    assert checkpoint.read_json(folder / "state.json") == {"format": 1, "step": 3, "position": 18}


def test_state_that_the_loop_goes_on_filling_is_saved_as_it_was(tmp_path, stage):
    go = threading.Event()
    stage("before-tensors", go.wait)
    bad = [1]
    with Saver(tmp_path, None, keep=2) as saving:
        saving.save(1, tensors(), {"bad": bad})
        bad.append(2)
        go.set()
        saving.wait()
    assert checkpoint.read_json(checkpoint.newest(tmp_path) / "state.json")["bad"] == [1]


def test_a_second_save_reuses_the_memory_of_the_first_and_mixes_nothing(tmp_path):
    with Saver(tmp_path, None, keep=2) as saving:
        saving.save(1, tensors(1.0), {})
        saving.save(2, tensors(2.0), {})
        saving.wait()
    first, second = checkpoint.list_checkpoints(tmp_path)
    assert loaded(first)["model.weight"].max() == 1
    assert loaded(second)["model.weight"].min() == 2


def test_the_next_save_waits_for_the_one_in_flight(tmp_path, stage):
    go, order = threading.Event(), []
    stage("before-tensors", go.wait)
    with Saver(tmp_path, None, keep=2) as saving:
        saving.save(1, tensors(), {})
        threading.Timer(0.2, lambda: (order.append("released"), go.set())).start()
        saving.save(2, tensors(), {})
        order.append("second snapshot")
        saving.wait()
    assert order == ["released", "second snapshot"]
    assert len(checkpoint.list_checkpoints(tmp_path)) == 2


def test_the_loop_goes_on_while_a_save_is_written(tmp_path, stage):
    go = threading.Event()
    stage("before-tensors", go.wait)
    with Saver(tmp_path, None, keep=2) as saving:
        saving.save(1, tensors(), {})
        saving.check()  # returns although nothing is written
        assert checkpoint.list_checkpoints(tmp_path) == []
        go.set()


def test_the_hashes_of_the_manifest_are_those_of_the_files(tmp_path):
    with Saver(tmp_path, None, keep=2) as saving:
        saving.save(
            1, tensors(), {}, write_extra=lambda folder: (folder / "tokenizer.json").write_text("{}"), wait=True
        )
    folder = checkpoint.newest(tmp_path)
    files = checkpoint.read_json(folder / "manifest.json")["files"]
    assert files.keys() == {"state.json", "tokenizer.json", "tensors/shard-00001-model-00001-of-00001.safetensors"}
    for name, entry in files.items():
        data = (folder / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_tensors_are_hashed_while_they_are_written_and_not_read_for_it(tmp_path):
    taken = snapshot.Snapshot()
    (tmp_path / "tensors").mkdir()
    taken.take(tensors(), tmp_path / "tensors")
    opened = []

    def watch(event, arguments):
        if event == "open" and str(arguments[0]).startswith(str(tmp_path)) and isinstance(arguments[1], str):
            opened.append(arguments[1])

    sys.addaudithook(watch)
    (entry,) = taken.write().values()
    assert opened == ["w"]
    assert entry["sha256"] == hashlib.sha256(next((tmp_path / "tensors").iterdir()).read_bytes()).hexdigest()


def test_large_tensors_go_to_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "FILE_BYTES", 200)
    values = {f"model.{i}": torch.full((20,), float(i)) for i in range(5)}  # of 80 bytes
    with Saver(tmp_path, None, keep=2) as saving:
        saving.save(1, values, {}, wait=True)
    folder = checkpoint.newest(tmp_path)
    assert len(list((folder / "tensors").iterdir())) == 3
    found = checkpoint.read_tensors(folder, ("model.",))
    assert all(torch.equal(found[name], value) for name, value in values.items())


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path):
    with Saver(tmp_path, None, keep=2) as saving:
        saving.save(1, tensors(), {}, wait=True)
    folder = checkpoint.newest(tmp_path)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                assert set(file.keys()) == set(tensors())
        else:
            json.loads(path.read_text())


def test_a_save_passes_its_stages_in_order(tmp_path, stage):
    passed = stage()
    with Saver(tmp_path, None, keep=2) as saving:
        for step in (1, 2, 3):
            saving.save(step, tensors(), {}, wait=True)
    assert passed[-len(save_stages.STAGES) :] == list(save_stages.STAGES)


# ---- what fails ----------------------------------------------------------------------------------


def test_a_full_disk_is_survived_and_told_and_the_one_before_is_intact(tmp_path, stage, capsys):
    with Saver(tmp_path, None, keep=2, failed_saves=2) as saving:
        told = []
        saving.tell = lambda event, step, **values: told.append((event, step, values))
        saving.save(1, tensors(), {}, wait=True)
        stage("folder", lambda: full_disk(tmp_path))
        saving.save(2, tensors(), {})
        saving.wait()
    ((event, step, values),) = told
    assert (event, step, values["in_a_row"], values["stops"]) == ("save_failed", 2, 1, False)
    assert "No space left on device" in values["reason"]
    assert "training goes on (1 of 2" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert checkpoint.verify(tmp_path / "checkpoints/step-00000001") is None


def test_more_failed_saves_in_a_row_than_allowed_end_the_run(tmp_path, stage):
    stage("folder", lambda: full_disk(tmp_path))
    with Saver(tmp_path, None, keep=2, failed_saves=2) as saving:
        for step in (1, 2, 3):
            saving.save(step, tensors(), {})
        with pytest.raises(StorageError, match=r"step-00000003 was not saved: .*run the same command"):
            saving.wait()


def test_a_save_that_succeeds_forgives_the_failures_before_it(tmp_path, stage):
    with Saver(tmp_path, None, keep=2, failed_saves=1) as saving:
        for step in range(1, 7):
            stage("folder", (lambda: full_disk(tmp_path)) if step % 2 else None)
            saving.save(step, tensors(), {})
        saving.wait()
    assert [checkpoint.step_of(folder) for folder in checkpoint.list_checkpoints(tmp_path)] == [4, 6]


def test_a_save_that_the_run_waits_for_may_not_fail(tmp_path, stage):
    stage("folder", lambda: full_disk(tmp_path))
    with Saver(tmp_path, None, keep=2) as saving, pytest.raises(StorageError, match="No space left"):
        saving.save(1, tensors(), {}, wait=True)


def test_a_failure_surfaces_at_the_next_check(tmp_path, stage):
    stage("folder", lambda: full_disk(tmp_path))
    with Saver(tmp_path, None, keep=2, failed_saves=0) as saving:
        saving.save(1, tensors(), {})
        saving._save.thread.join()
        with pytest.raises(StorageError):
            saving.check()


@pytest.mark.parametrize("name", save_stages.STAGES[3:15])
def test_a_disk_that_fails_at_any_stage_of_the_writing_leaves_the_last_checkpoint_valid(tmp_path, stage, name):
    with Saver(tmp_path, None, keep=2, failed_saves=5) as saving:
        saving.save(1, tensors(1.0), {}, wait=True)
        stage(name, fail)
        saving.save(2, tensors(2.0), {})
        saving.wait()
        assert saving.failed == 1
        stage(name, None)
        assert loaded(checkpoint.newest(tmp_path))["model.weight"].max() <= 2
        saving.save(3, tensors(3.0), {}, wait=True)
    assert loaded(checkpoint.newest(tmp_path))["model.weight"].max() == 3
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


def test_an_error_that_is_no_disk_ends_the_run_at_once(tmp_path, stage):
    def mistake():
        raise TypeError("of ours")

    stage("before-tensors", mistake)
    with Saver(tmp_path, None, keep=2) as saving:
        saving.save(1, tensors(), {})
        with pytest.raises(RuntimeError, match="TypeError: of ours"):
            saving.wait()


def test_too_little_space_is_found_before_anything_is_written(tmp_path, stage, monkeypatch):
    passed = stage()
    usage = shutil.disk_usage(tmp_path)._replace(free=150)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    values = tensors()
    needed = int(1.1 * (8 * 4 + 3 + 1) * 4)
    with Saver(tmp_path, None, keep=2) as saving, pytest.raises(StorageError) as error:
        saving.save(1, values, {}, wait=True)
    assert f"no space left: {needed} bytes are needed and 150 are free" in str(error.value)
    assert passed == ["begin"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_recognised_however_it_is_wrapped(error):
    def work():
        try:
            raise error
        except Exception as found:
            raise ValueError("could not save") from found

    assert saver._attempt(work).kind == "storage"


def test_a_run_directory_that_another_job_took_over_is_left_alone_at_once(tmp_path, stage):
    lease = Lease(tmp_path)
    lease.file.write_text(json.dumps({"token": lease.token}))
    with Saver(tmp_path, lease, keep=2, failed_saves=5) as saving:
        stage("before-rename", None)
        stage("before-manifest", lambda: lease.file.write_text(json.dumps({"token": "other", "host": "far", "pid": 7})))
        saving.save(1, tensors(), {})
        with pytest.raises(StorageError, match="taken over by process 7 on far"):
            saving.wait()
        assert checkpoint.list_checkpoints(tmp_path) == []
        (tmp_path / "checkpoints/.tmp-step-00000009-other").mkdir()
        with pytest.raises(StorageError, match="taken over"):
            saving.save(2, tensors(), {})
        assert (tmp_path / "checkpoints/.tmp-step-00000009-other").is_dir()


def test_leftovers_of_killed_saves_are_removed_by_the_next(tmp_path):
    dead = tmp_path / "checkpoints/.tmp-step-00000007-0123abcd/tensors"
    dead.mkdir(parents=True)
    with Saver(tmp_path, None, keep=2) as saving:
        saving.save(1, tensors(), {}, wait=True)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_new_checkpoint_that_reads_back_wrong_is_a_failed_save_and_nothing_is_deleted(tmp_path, stage):
    with Saver(tmp_path, None, keep=2) as saving:
        for step in (1, 2):
            saving.save(step, tensors(), {}, wait=True)
        stage("after-parent", lambda: (tmp_path / "checkpoints/step-00000003/state.json").write_text("{}"))
        saving.save(3, tensors(), {})
        saving.wait()
        assert saving.failed == 1
    assert len(checkpoint.list_checkpoints(tmp_path)) == 3
    assert checkpoint.step_of(checkpoint.newest(tmp_path)) == 2


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_harm_the_new_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(retention, "prune", lambda *_, **__: fail())
    with Saver(tmp_path, None, keep=2) as saving:
        saving.save(1, tensors(), {}, wait=True)
        assert saving.failed == 0
    assert "could not be deleted" in capsys.readouterr().err


# ---- two ranks -----------------------------------------------------------------------------------


def two_ranks_save(run, rank, monkeypatch):
    """A save that ends well, the loop speaking meanwhile, then one that fails on rank 1 alone."""
    report, values = {}, {f"model.{i}": torch.full((64,), 1.0) for i in range(8)}
    with lease.hold(run) as held, Saver(run, held, keep=2, failed_saves=0) as saving:
        saving.save(1, values, {"position": 6})
        for value in values.values():
            value.fill_(99.0)
        for _ in range(20):
            dist.all_reduce(torch.ones(()))
        saving.wait()
        report["files"] = len(list((run / "checkpoints/step-00000001/tensors").iterdir()))
        found = {name: torch.zeros(64) for name in values}
        checkpoint.load_tensors(run / "checkpoints/step-00000001", found)
        report["values"] = sorted({value for tensor in found.values() for value in tensor.tolist()})
        if rank == 1:
            monkeypatch.setattr(save_stages, "reached", lambda name: full() if name == "within-tensors" else None)
        saving.save(2, values, {})
        try:
            while saving._save is not None:
                saving.check()
        except StorageError as error:
            report["error"] = str(error)
        dist.barrier()
        report["checkpoints"] = sorted(path.name for path in (run / "checkpoints").iterdir())
    return report


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_two_ranks_write_a_half_each_and_agree_on_a_failure_of_one(tmp_path, monkeypatch):
    first, second = forked.ranks(2, lambda rank: two_ranks_save(tmp_path / "run", rank, monkeypatch), tmp_path)
    assert first == second
    assert first["files"] == 2
    assert first["values"] == [1.0]
    assert "rank 1: No space left on device" in first["error"]
    assert first["checkpoints"] == ["step-00000001"]


def save_shards(run):
    """A tensor in two shards, one of which is smaller, beside one that both ranks hold."""
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(15.0).reshape(5, 3)
    values = {"model.sharded": distribute_tensor(whole, mesh, [Shard(0)]), "model.whole": whole + 100}
    with Saver(run, None, keep=2) as saving:
        saving.save(1, values, {})
        values["model.sharded"].zero_()
        saving.wait()
    return snapshot.num_bytes(values)


def test_shards_of_two_ranks_are_read_back_whole_by_one(tmp_path):
    sizes = forked.ranks(2, lambda _rank: save_shards(tmp_path / "run"), tmp_path)
    assert sizes == [2 * 15 * 4] * 2
    found = checkpoint.read_tensors(checkpoint.newest(tmp_path / "run"), ("model.",))
    assert found["model.sharded"].equal(torch.arange(15.0).reshape(5, 3))
    assert found["model.whole"].equal(torch.arange(15.0).reshape(5, 3) + 100)
