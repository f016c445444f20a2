"""What a start goes on from: the newest valid checkpoint, agreed on by all ranks, told in the log, restored whole."""

import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from mim.config import ConfigError
from mim.contracts import StorageError
from mim.log import RunLog, read_log, write_json
from mim.saving import checkpoint, resume
from mim.watch import stopping
from mim.watch.status import Status
from tests.test_train import dataset, lines, recipe, run, uninterrupted  # noqa: F401  (fixtures)

CPU = torch.device("cpu")
EXPERIMENT = {"optim": {"lr": 0.1}}


def events(folder, name):
    return [entry for entry in read_log(folder / "log.jsonl") if entry["event"] == name]


def fake(folder: Path, steps, *, files=2) -> Path:
    """A run directory whose checkpoints hold a few bytes."""
    folder.mkdir()
    (folder / "config.yaml").write_text("format: 1\nexperiment:\n  optim:\n    lr: 0.1\n")
    for step in steps:
        inside = folder / f"checkpoints/step-{step:08d}"
        (inside / "tensors").mkdir(parents=True)
        for number in range(files):
            (inside / f"tensors/{number}.safetensors").write_bytes(bytes([step % 256, number]) * 50)
        entries = {
            f"tensors/{n}.safetensors": {"size": 100, "sha256": checkpoint._sha256(inside / f"tensors/{n}.safetensors")}
            for n in range(files)
        }
        write_json(inside / "manifest.json", {"format": 1, "files": entries})
    return folder


def together(folder: Path, function, *, num_ranks=2) -> list:
    """What `function(rank)` gives, or the ConfigError that it ends in, in processes that form a group."""

    def work(rank):
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks)
        try:
            answer = function(rank)
        except ConfigError as error:
            answer = f"refused: {error}"
        (folder / f"answer-{rank}.json").write_text(json.dumps(answer))
        os._exit(0)

    processes = [multiprocessing.get_context("fork").Process(target=work, args=(rank,)) for rank in range(num_ranks)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 60
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
        if process.is_alive():
            process.kill()
            pytest.fail("a rank hangs")
    return [json.loads((folder / f"answer-{rank}.json").read_text()) for rank in range(num_ranks)]


def found_by(folder: Path):
    found = resume.find(folder, EXPERIMENT, CPU)
    return found.checkpoint and found.checkpoint.name


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(resume, "PATIENCE", 0.0)
    monkeypatch.setattr(resume, "PAUSE", 0.05)


# ---- which checkpoint ----------------------------------------------------------------------------


def test_the_log_tells_where_a_run_was_resumed_and_what_was_rejected_and_why(dataset, tmp_path):  # noqa: F811
    path = recipe(dataset, tmp_path)
    run(path, tmp_path / "run", stop_at=5)
    (tmp_path / "run/checkpoints/step-00000005/state.json").write_text("{}")
    run(path, tmp_path / "run")
    (told,) = events(tmp_path / "run", "resumed")
    assert (told["step"], told["checkpoint"]) == (3, "step-00000003")
    assert (told["saved_by_ranks"], told["ranks"]) == (1, 1)
    (rejected,) = told["rejected"]
    assert rejected["checkpoint"] == "step-00000005"
    assert rejected["reason"].startswith("state.json has 2 bytes instead of ")


def test_foreign_folders_and_what_a_kill_left_are_no_checkpoints(dataset, tmp_path, uninterrupted):  # noqa: F811
    path = recipe(dataset, tmp_path)
    run(path, tmp_path / "run", stop_at=3)
    folder = tmp_path / "run/checkpoints"
    shutil.copytree(folder / "step-00000003", folder / ".tmp-step-00000006")
    for name in ("step-abc", "step-9", "notes"):
        (folder / name).mkdir()
    (folder / "README.txt").write_text("mine")
    run(path, tmp_path / "run")
    assert events(tmp_path / "run", "resumed")[0]["checkpoint"] == "step-00000003"
    assert lines(tmp_path / "run") == lines(uninterrupted)
    assert (folder / "step-abc").is_dir()
    assert (folder / "README.txt").read_text() == "mine"


def test_a_flipped_bit_anywhere_in_a_manifest_is_detected(tmp_path):
    """One bit of every byte, and all of those of a digit; white space between values changes nothing that is read."""
    folder = fake(tmp_path / "run", [1], files=1) / "checkpoints/step-00000001"
    manifest = folder / "manifest.json"
    whole = manifest.read_bytes()
    for position, byte in enumerate(whole):
        for bit in range(8) if chr(byte).isdigit() else (position % 8,):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            manifest.write_bytes(damaged)
            accepted = checkpoint.verify(folder) is None
            assert not accepted or chr(byte).isspace(), (position, bit, bytes(damaged))


def test_a_run_killed_before_its_first_checkpoint_starts_afresh_and_says_so(dataset, tmp_path, capsys):  # noqa: F811
    path = recipe(dataset, tmp_path)
    run(path, tmp_path / "run", stop_at=3)
    shutil.rmtree(tmp_path / "run/checkpoints")
    write_json(tmp_path / "run/status.json", {"state": "running", "step": 0})
    capsys.readouterr()
    run(path, tmp_path / "run", stop_at=3)
    assert (
        "had come to step 2, but had not saved a checkpoint yet: it starts afresh at step 0" in capsys.readouterr().err
    )
    assert [entry["step"] for entry in events(tmp_path / "run", "restarted")] == [0]
    assert [entry["step"] for entry in lines(tmp_path / "run")] == [2]


def test_a_run_whose_checkpoints_are_gone_is_refused_instead_of_started_afresh(dataset, tmp_path):  # noqa: F811
    path = recipe(dataset, tmp_path)
    run(path, tmp_path / "run", stop_at=3)
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(ConfigError, match="was saved at step 3, but none of its checkpoints is there any more"):
        run(path, tmp_path / "run")


def test_a_run_that_was_killed_after_a_save_had_checkpoints(tmp_path):
    folder = fake(tmp_path / "run", [])
    RunLog(folder / "log.jsonl", -1).write("train", 5010)
    Status(folder, "mae", 9000).write("running", 5000)
    with pytest.raises(ConfigError, match="was saved at step 5000, but none"):
        found_by(folder)


def test_a_run_that_was_resumed_once_had_checkpoints_whatever_its_status_says(tmp_path):
    folder = fake(tmp_path / "run", [])
    log = RunLog(folder / "log.jsonl", -1)
    log.write("resumed", 40, checkpoint="step-00000040")
    log.close()
    with pytest.raises(ConfigError, match="was saved at step 40, but none"):
        found_by(folder)


def test_a_start_killed_before_its_recipe_was_written_leaves_no_foreign_folder(dataset, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (".config.yaml.tmp", "init.json"):
        (folder / name).write_text("")
    assert run(recipe(dataset, tmp_path), folder, stop_at=1) == stopping.STOPPED


@pytest.mark.parametrize("where", ["replace", "fsync"])
def test_a_kill_while_the_log_is_cut_leaves_it_whole_and_the_next_start_cuts_it(tmp_path, monkeypatch, where):
    path = tmp_path / "log.jsonl"
    log = RunLog(path, -1)
    for step in (2, 4, 6):
        log.write("train", step)
    log.close()
    whole = path.read_bytes()

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Path if where == "replace" else os, where, die)
        with pytest.raises(Killed):
            RunLog(path, 4)
    assert path.read_bytes() == whole
    RunLog(path, 4).close()
    assert [entry["step"] for entry in read_log(path)] == [2, 4]


# ---- restore -------------------------------------------------------------------------------------


class TornDisk(Exception):
    pass


@pytest.mark.parametrize("damage", ["missing", "torn"])
def test_a_restore_that_fails_leaves_the_weights_as_they_were(dataset, tmp_path, monkeypatch, damage):  # noqa: F811
    """A tensor that the checkpoint lacks, and a disk that fails when half of the tensors are read."""
    path = recipe(dataset, tmp_path)
    run(path, tmp_path / "run", stop_at=3)
    seen = {}
    honest = checkpoint.restore

    def halfway(folder, state, **options):
        names = list(state)
        load(folder, {name: state[name] for name in names[: len(names) // 2]})
        raise TornDisk

    def watched(folder, model, optimizer, ema):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        if damage == "missing":
            ema = {**ema, "no.such.tensor": torch.zeros(3)}
        try:
            return honest(folder, model, optimizer, ema)
        except (ConfigError, TornDisk):
            seen["changed"] = [name for name, value in model.state_dict().items() if not value.equal(before[name])]
            raise

    load = checkpoint.load_tensors
    if damage == "torn":
        monkeypatch.setattr(checkpoint, "load_tensors", halfway)
    monkeypatch.setattr(checkpoint, "restore", watched)
    with pytest.raises((ConfigError, TornDisk)):
        run(path, tmp_path / "run")
    assert seen["changed"] == []


# ---- several ranks -------------------------------------------------------------------------------


def test_ranks_share_the_hashing_and_agree_on_the_newest_valid_checkpoint(tmp_path, monkeypatch):
    """The last file is hashed by the second rank alone; the first one must hear of its damage."""
    folder = fake(tmp_path / "run", [10, 20], files=4)
    (folder / "checkpoints/step-00000020/tensors/3.safetensors").write_bytes(b"x" * 100)
    hashed = []
    honest = checkpoint._sha256
    monkeypatch.setattr(checkpoint, "_sha256", lambda path: hashed.append(path.name[0]) or honest(path))
    answers = together(tmp_path, lambda rank: [found_by(folder), hashed])
    assert [answer[0] for answer in answers] == ["step-00000010"] * 2
    assert sorted(answers[0][1] + answers[1][1]) == sorted("0123" * 2)
    assert all(len(answer[1]) == 4 for answer in answers)


def test_ranks_that_see_other_checkpoints_end_in_the_same_sentence(tmp_path, impatient):
    for name, steps in (("a", [10, 20]), ("b", [10])):
        fake(tmp_path / name, steps)
    answers = together(tmp_path, lambda rank: found_by(tmp_path / "ab"[rank]))
    assert answers[0].partition(" in /")[0] == answers[1].partition(" in /")[0]
    assert "rank 1 on " in answers[0]
    assert "sees checkpoints of steps 10, rank 0 on " in answers[0]
    assert "sees 10, 20 in " in answers[0]
    assert "must be on a file system that all nodes share" in answers[0]


def test_a_listing_that_lags_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "PAUSE", 0.05)
    folder = fake(tmp_path / "run", [10, 20])
    honest = checkpoint.list_checkpoints
    looks = []

    def lagging(run):
        looks.append(None)
        return honest(run)[: None if len(looks) > 3 else 1]

    def look(rank):
        if rank == 1:
            monkeypatch.setattr(checkpoint, "list_checkpoints", lagging)
        return found_by(folder)

    assert together(tmp_path, look) == ["step-00000020"] * 2


def test_a_rank_without_the_run_directory_is_named_before_the_first_step(tmp_path, impatient):
    folder = fake(tmp_path / "run", [])
    answers = together(tmp_path, lambda rank: resume.check_shared(folder if rank == 0 else tmp_path / "gone", CPU))
    assert all("rank 1 on " in answer for answer in answers)
    assert all("does not see the same files as rank 0" in answer for answer in answers)


def test_ranks_with_another_dataset_or_code_end_in_the_same_sentence(tmp_path, impatient):
    folder = fake(tmp_path / "run", [10])
    answers = together(tmp_path, lambda rank: resume.find(folder, {"optim": {"lr": 0.1 + rank}}, CPU).checkpoint)
    assert answers[0] == answers[1]
    assert "has other data, code or weights than rank 0" in answers[0]


def test_a_rank_that_cannot_read_is_named_on_all_ranks(tmp_path, impatient, monkeypatch):
    folder = fake(tmp_path / "run", [10])

    def stale(_):
        raise OSError(116, "Stale file handle", str(folder))

    def look(rank):
        if rank == 1:
            monkeypatch.setattr(checkpoint, "list_checkpoints", stale)
        return found_by(folder)

    answers = together(tmp_path, look)
    assert answers[0] == answers[1]
    assert f"cannot read {folder}: Stale file handle, other ranks can" in answers[0]
    monkeypatch.setattr(checkpoint, "list_checkpoints", stale)
    with pytest.raises(StorageError, match="Stale file handle; check its permissions"):
        found_by(folder)


def test_all_ranks_refuse_a_run_whose_checkpoints_are_gone(tmp_path):
    folder = fake(tmp_path / "run", [])
    write_json(folder / "status.json", {"state": "stopped", "step": 30})
    answers = together(tmp_path, lambda rank: found_by(folder))
    assert answers[0] == answers[1]
    assert "was saved at step 30" in answers[0]


def test_a_checkpoint_whose_weights_are_not_finite_is_refused_in_one_sentence(tmp_path):
    """A save does not ask what the numbers are, and its hashes are right: who reads them asks."""
    tensors = {"model.head": torch.tensor([1.0, float("nan")]), "model.count": torch.tensor(3)}
    (tmp_path / "tensors").mkdir()
    save_file(tensors, tmp_path / "tensors/shard-00001-model-00001-of-00001.safetensors")
    with pytest.raises(ConfigError, match=r"holds values that are not finite, first in model\.head"):
        checkpoint.read_tensors(tmp_path, ("model.",))


def test_a_file_of_tensors_whose_header_lies_is_refused_in_one_sentence(tmp_path, caplog):
    (tmp_path / "tensors").mkdir()
    (tmp_path / "tensors/shard-00001-model-00001-of-00001.safetensors").write_bytes((1 << 60).to_bytes(8, "little"))
    with pytest.raises(ConfigError, match=r"does not fit the recipe: .*header too large"):
        checkpoint.load_tensors(tmp_path, {"model.head": torch.zeros(2)})
    assert not caplog.records
