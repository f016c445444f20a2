"""Trackers follow the run log: nothing twice, nothing lost but what they cannot take back, and no run dies of one."""

import importlib.util
import json
import multiprocessing
import os
import signal
import threading
import time

import pytest
from PIL import Image

from mim import trackers
from mim.config import ConfigError
from mim.log import RunLog
from mim.tracker_kinds import KINDS, Kind, flat
from mim.watch import stopping
from tests.test_train import dataset, lines, recipe, run, tensors, uninterrupted  # noqa: F401  (fixtures)

EVALS = ["evals.reconstruction.every=3 steps"]


class Recorder:
    """A tracker as Accelerate's are, which keeps what it is told in a list that outlives it."""

    def __init__(self, told, *, fails=lambda count: False):
        self.told, self.fails, self.calls = told, fails, 0

    def log(self, values, step):
        self.calls += 1
        if self.fails(self.calls):
            raise OSError(
                "no route to https://me:secret@tracker.example/api?key=secret nor https://me:secret@other.example"
            )
        self.told.append((step, values))

    def finish(self):
        self.told.append("finished")


@pytest.fixture
def recorder(monkeypatch):
    """`recorder(**options)` puts a recorder in the place of tensorboard; returns what it is told."""

    def put(*, takes_back=False, tracker=None, **options):
        told = []
        kind = Kind(
            lambda place: tracker or Recorder(told, **options),
            lambda tracker, name, file, step: told.append((step, name)),
            takes_back=takes_back,
        )
        monkeypatch.setitem(KINDS, "tensorboard", kind)
        return told

    return put


def follow(folder, cut_at, *, ended=False):
    log = RunLog(folder / "log.jsonl", cut_at)
    trackers.Trackers(folder, ["tensorboard"], {"data": {"path": "x"}}, log, ended=ended)
    return log


def steps(told):
    return [entry[0] for entry in told if entry != "finished"]


# ---- refusals ------------------------------------------------------------------------------------


def test_a_tracker_that_is_not_installed_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"names wandb, which is not installed; run: pip install wandb$"):
        trackers.check_installed(["wandb"])


def test_an_unknown_tracker_is_refused_with_the_known_ones_and_nothing_is_written(dataset, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match=r"names 'tensorbord', which is unknown; choose from tensorboard, wandb"):
        run(recipe(dataset, tmp_path), tmp_path / "run", "train.trackers=[tensorbord]")
    assert not (tmp_path / "run").exists()


# ---- following the log ---------------------------------------------------------------------------


def test_a_tracker_is_told_the_numbers_of_training_and_evaluations_and_no_others(tmp_path, recorder):
    told = recorder()
    log = follow(tmp_path, -1)
    log.write("train", 2, loss=0.5, skipped=0, fingerprint="ab", position=12)
    log.write("eval", 2, eval="knn", knn=0.25, protocol="k=3", classes={"a": 1})
    log.write("resumed", 2, ranks=4)
    log.close()
    assert told == [(2, {"loss": 0.5, "skipped": 0}), (2, {"knn/knn": 0.25}), "finished"]


def test_what_cannot_be_taken_back_is_not_told_again_after_a_resume(tmp_path, recorder):
    told = recorder()
    for cut_at, written in ((-1, (2, 4, 6)), (2, (4, 6, 8))):
        log = follow(tmp_path, cut_at)
        for step in written:
            log.write("train", step, loss=float(step))
        log.close()
    assert steps(told) == [2, 4, 6, 8]


def test_what_can_be_taken_back_is_told_again_from_the_resumed_step_on(tmp_path, recorder):
    told = recorder(takes_back=True)
    for cut_at, written in ((-1, (2, 4, 6)), (2, (4, 6, 8))):
        log = follow(tmp_path, cut_at)
        for step in written:
            log.write("train", step, loss=float(step))
        log.close()
    assert steps(told) == [2, 4, 6, 4, 6, 8]


@pytest.mark.parametrize("ended", [False, True])
def test_a_tracker_that_is_switched_on_later_is_told_what_came_before(tmp_path, recorder, ended):
    told = recorder()
    before = RunLog(tmp_path / "log.jsonl", -1)
    for step in (2, 4):
        before.write("train", step, loss=float(step))
    before.close()
    log = follow(tmp_path, 4, ended=ended)
    log.close()
    assert steps(told) == [2, 4]


def test_a_finished_run_that_is_rerun_does_not_open_its_trackers_again(tmp_path, recorder):
    told = recorder()
    log = follow(tmp_path, -1)
    log.write("train", 2, loss=0.5)
    log.close()
    follow(tmp_path, 2, ended=True).close()
    assert told == [(2, {"loss": 0.5}), "finished"]


def test_an_unreadable_mark_begins_a_new_run_of_the_tracker(tmp_path, recorder):
    told = recorder()
    (tmp_path / "trackers").mkdir()
    (tmp_path / "trackers/tensorboard.json").write_text('{"told": [')
    log = follow(tmp_path, -1)
    log.write("train", 2, loss=0.5)
    log.close()
    assert steps(told) == [2]


# ---- failures ------------------------------------------------------------------------------------


def test_a_tracker_that_fails_is_told_later_what_it_missed_and_the_line_on_it_is_said_once(tmp_path, recorder, capsys):
    told = recorder(fails=lambda count: count in (2, 3))
    log = follow(tmp_path, -1)
    for step in (2, 4, 6, 8):
        log.write("train", step, loss=float(step))
    log.close()
    assert steps(told) == [2, 4, 6, 8]
    said = capsys.readouterr().err
    assert (
        said.count(
            "tracker tensorboard failed (OSError: no route to https://tracker.example/api nor https://other.example)"
        )
        == 1
    ), said
    assert said.count("works again") == 1
    assert "secret" not in said


def test_a_tracker_that_never_works_does_not_end_the_run(dataset, tmp_path, recorder, capsys, uninterrupted):  # noqa: F811
    told = recorder(fails=lambda count: True)
    path = recipe(dataset, tmp_path)
    assert run(path, tmp_path / "run", "train.trackers=[tensorboard]") == stopping.DONE
    assert told == ["finished"]
    assert lines(tmp_path / "run") == lines(uninterrupted)
    said = capsys.readouterr().err
    assert said.count("tracker tensorboard failed") == 1
    assert "tracker tensorboard has not been told all of the log" in said


def test_a_tracker_that_hangs_holds_up_neither_the_run_nor_its_end(tmp_path, recorder, monkeypatch, capsys):
    released = threading.Event()

    class Hanging(Recorder):
        def log(self, values, step):
            released.wait(30)

    recorder(tracker=Hanging([]))
    monkeypatch.setattr(trackers, "PATIENCE", 0.1)
    log = follow(tmp_path, -1)
    began = time.monotonic()
    for step in range(100):
        log.write("train", step, loss=0.0)
    log.close()
    assert time.monotonic() - began < 20
    assert "has not been told all of the log" in capsys.readouterr().err
    released.set()


def test_a_recipe_reaches_a_tracker_without_the_secrets_of_its_addresses():
    sections = {
        "data": {"path": "https://me:secret@host/shards?sig=secret", "sources": [{"path": "s3://k:secret@b/x"}]}
    }
    kept = flat({**sections, "optim": {"lr": 0.1, "betas": [0.9, 0.95], "ema": None}})
    assert "secret" not in json.dumps(kept)
    assert kept["data.path"] == "https://host/shards"
    assert (kept["optim.lr"], kept["optim.betas"]) == (0.1, "[0.9, 0.95]")
    assert "optim.ema" not in kept


# ---- the real ones -------------------------------------------------------------------------------


def scalars(folder):
    """What TensorBoard shows: {tag: [(step, value)]}, and the steps of its pictures."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "trackers/tensorboard"), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]}
    return found, {tag: [image.step for image in events.Images(tag)] for tag in tags["images"]}


def test_tensorboard_shows_after_a_fall_back_what_the_log_says_and_training_is_the_same(
    dataset,  # noqa: F811
    tmp_path,
    uninterrupted,  # noqa: F811
):
    pytest.importorskip("tensorboard")
    path = recipe(dataset, tmp_path)
    options = ["train.trackers=[tensorboard]", f"data.val_path={dataset}", *EVALS]
    run(path, tmp_path / "run", *options, stop_at=5)
    next((tmp_path / "run/checkpoints/step-00000005/tensors").glob("*.safetensors")).write_bytes(b"")
    run(path, tmp_path / "run", *options)
    logged = [e for e in lines(tmp_path / "run") if e["event"] == "train"]
    shown, pictures = scalars(tmp_path / "run")
    assert shown["loss"] == [(e["step"], pytest.approx(e["loss"], rel=1e-6)) for e in logged]
    assert pictures == {"reconstruction/reconstruction": [3, 6, 7]}
    assert "images_per_s" in shown
    mine, theirs = tensors(tmp_path / "run"), tensors(uninterrupted)
    assert all(mine[name].equal(value) for name, value in theirs.items())


def test_tensorboard_shows_what_the_log_says_after_kills(dataset, tmp_path):  # noqa: F811
    pytest.importorskip("tensorboard")
    path = recipe(dataset, tmp_path, optim__length="16 steps", train__log_every="1 steps")
    log = tmp_path / "run/log.jsonl"
    for num_lines in (2, 7):
        start = (path, tmp_path / "run", "train.trackers=[tensorboard]")
        process = multiprocessing.get_context("fork").Process(target=run, args=start)
        process.start()
        deadline = time.monotonic() + 60
        while not log.is_file() or len(log.read_text().splitlines()) < num_lines:
            assert process.is_alive(), "the run ended before it came to that line"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    run(*start)
    logged = [entry for entry in lines(tmp_path / "run") if entry["event"] == "train"]
    assert [entry["step"] for entry in logged] == list(range(1, 17))
    assert scalars(tmp_path / "run")[0]["loss"] == [(e["step"], pytest.approx(e["loss"], rel=1e-6)) for e in logged]


@pytest.fixture
def real(tmp_path, monkeypatch):
    """`real(NAME)`: a real tracker follows a log with a picture, is resumed from step 2, and has told steps 2 to 8."""

    def told(name):
        if importlib.util.find_spec(name) is None:  # not imported: they read their environment then
            pytest.skip(f"{name} is not installed")
        for variable in ("WANDB_MODE", "MLFLOW_TRACKING_URI", "TRACKIO_DIR"):
            monkeypatch.delenv(variable, raising=False)
        (tmp_path / "pictures").mkdir()
        Image.new("RGB", (8, 6), "red").save(tmp_path / "pictures/masks-00000002.png")
        for cut_at, written in ((-1, (2, 4, 6)), (2, (4, 6, 8))):
            log = RunLog(tmp_path / "log.jsonl", cut_at)
            trackers.Trackers(tmp_path, [name], {"optim": {"lr": 0.1}}, log, ended=False)
            for step in written:
                log.write("train", step, loss=float(step))
                if step == 2:
                    log.write("eval", 2, eval="masks", masks="elsewhere/masks-00000002.png")
            log.close()
        return tmp_path / "trackers", json.loads((tmp_path / f"trackers/{name}.json").read_text())

    return told


def test_mlflow_goes_on_with_the_same_run_in_its_own_folder(real):
    folder, state = real("mlflow")
    import mlflow

    mlflow.set_tracking_uri((folder / "mlflow").as_uri())
    client = mlflow.MlflowClient()
    assert len(client.search_runs(client.get_experiment_by_name("mimstream").experiment_id)) == 1
    assert [(m.step, m.value) for m in client.get_metric_history(state["id"], "loss")] == [(s, s) for s in (2, 4, 6, 8)]
    assert client.get_run(state["id"]).data.params == {"optim.lr": "0.1"}
    assert [a.path for a in client.list_artifacts(state["id"], "pictures")] == ["pictures/masks-00000002.png"]


def test_trackio_goes_on_with_the_same_run_in_its_own_folder(real, tmp_path):
    folder, state = real("trackio")
    assert (folder / "trackio/mimstream.db").is_file()
    from trackio.sqlite_storage import SQLiteStorage

    found = SQLiteStorage.get_logs("mimstream", f"{tmp_path.name}-{state['id']}")
    assert [(e["step"], e["loss"]) for e in found if "loss" in e] == [(s, s) for s in (2, 4, 6, 8)]
    assert [e["step"] for e in found if "masks/masks" in e] == [2]


def test_wandb_stays_offline_and_goes_on_under_the_same_id(real, capfd):
    folder, state = real("wandb")
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert {file.name for file in files} == {f"run-{state['id']}.wandb"}
    assert state["told"] == [8, 0]
    assert "failed" not in capfd.readouterr().err
