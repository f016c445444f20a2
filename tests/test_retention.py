"""Which checkpoints stay: valid ones count, pinned and n-th ones are left, and nothing is half deleted."""

import pytest
import torch

from mim.contracts import StorageError
from mim.saving import checkpoint, retention, save_stages
from mim.saving.saver import Saver


@pytest.fixture
def saved(tmp_path):
    """`saved(steps)`: a run that holds checkpoints of these steps; nothing was deleted."""

    def save(*steps):
        with Saver(tmp_path, None, keep=100) as saving:
            for step in steps:
                saving.save(step, {"model.weight": torch.ones(3)}, {}, wait=True)
        return tmp_path

    return save


def steps(run):
    return [checkpoint.step_of(folder) for folder in checkpoint.list_checkpoints(run)]


def spoil(run, step):
    (run / f"checkpoints/step-{step:08d}/state.json").write_text("{}")


def test_the_newest_stay(saved):
    run = saved(1, 2, 3, 4)
    deleted = retention.prune(run, keep=3)
    assert [folder.name for folder in deleted] == ["step-00000001"]
    assert steps(run) == [2, 3, 4]


def test_two_stay_even_if_fewer_are_asked_for(saved):
    run = saved(1, 2, 3)
    retention.prune(run, keep=0)
    assert steps(run) == [2, 3]


def test_a_checkpoint_that_is_not_valid_never_counts(saved):
    run = saved(1, 2, 3, 4)
    spoil(run, 4)
    spoil(run, 3)
    retention.prune(run, keep=2)
    assert steps(run) == [1, 2, 3, 4]  # 1 and 2 are the two valid ones


def test_a_checkpoint_that_is_not_valid_goes_when_enough_newer_ones_are(saved):
    run = saved(1, 2, 3, 4)
    spoil(run, 2)
    retention.prune(run, keep=2)
    assert steps(run) == [3, 4]


def test_a_checkpoint_that_was_valid_a_moment_ago_is_read_again_when_a_file_changed(saved):
    run = saved(1, 2, 3)
    verifier = retention.Verifier()
    assert retention.expendable(run, keep=2, verifier=verifier) == [run / "checkpoints/step-00000001"]
    spoil(run, 3)
    assert retention.expendable(run, keep=2, verifier=verifier) == []


def test_a_valid_checkpoint_is_hashed_once_by_a_process(saved, monkeypatch):
    run = saved(1, 2, 3)
    verifier, hashed = retention.Verifier(), []
    verify = checkpoint.verify
    monkeypatch.setattr(checkpoint, "verify", lambda folder: hashed.append(folder.name) or verify(folder))
    for _ in range(3):
        retention.expendable(run, keep=2, verifier=verifier)
    assert sorted(hashed) == ["step-00000002", "step-00000003"]


def test_pinned_ones_stay_until_they_are_unpinned_and_are_still_valid(saved):
    run = saved(1, 2, 3, 4)
    first = run / "checkpoints/step-00000001"
    retention.pin(first)
    assert retention.pinned(first)
    assert checkpoint.verify(first) is None
    retention.prune(run, keep=2)
    assert steps(run) == [1, 3, 4]
    retention.unpin(first)
    assert not retention.pinned(first)
    retention.prune(run, keep=2)
    assert steps(run) == [3, 4]


def test_the_first_of_every_n_steps_stays_however_saves_fall(saved):
    run = saved(4, 8, 12, 16, 20, 24, 28)
    retention.prune(run, keep=2, keep_every=10)
    assert steps(run) == [12, 20, 24, 28]


def test_what_stays_as_an_nth_stays_in_every_later_save(tmp_path):
    with Saver(tmp_path, None, keep=2, keep_every=10) as saving:
        for step in range(3, 46, 3):
            saving.save(step, {"model.weight": torch.ones(3)}, {}, wait=True)
    assert steps(tmp_path) == [12, 21, 30, 42, 45]


def test_one_that_is_being_deleted_is_none_of_the_checkpoints(saved, monkeypatch):
    run = saved(1, 2, 3)

    def killed(name):
        if name == "within-prune":
            raise KeyboardInterrupt

    monkeypatch.setattr(save_stages, "reached", killed)
    with pytest.raises(KeyboardInterrupt):
        retention.prune(run, keep=2)
    assert steps(run) == [2, 3]
    retention.remove_dead(run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("name", ["tensors/more.safetensors", "notes.txt"])
def test_a_checkpoint_with_a_foreign_file_is_not_valid(saved, name):
    """A reader of tensors takes all that lie in the folder."""
    folder = saved(1) / "checkpoints/step-00000001"
    (folder / name).write_bytes(b"x")
    assert checkpoint.verify(folder) == f"{name} is not in its manifest"


def test_a_checkpoint_whose_successor_of_the_same_step_was_killed_gets_its_name_back(saved):
    run = saved(1, 2)
    folder = run / "checkpoints/step-00000002"
    folder.rename(folder.with_name(f"{retention.REPLACED}{folder.name}"))
    retention.remove_dead(run)
    assert steps(run) == [1, 2]
    assert checkpoint.verify(folder) is None


def test_a_step_that_is_saved_again_stays_pinned_and_one_that_reads_back_wrong_gives_its_place_back(saved, monkeypatch):
    run = saved(1, 2)
    folder = run / "checkpoints/step-00000002"
    retention.pin(folder)
    saved(2)
    assert retention.pinned(folder)
    monkeypatch.setattr(retention.Verifier, "reason", lambda self, path: "the disk lies" if path == folder else None)
    with pytest.raises(StorageError, match="the disk lies"):
        saved(2)
    assert checkpoint.verify(folder) is None
