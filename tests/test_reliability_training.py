"""The trainings of the reliability bench: their faults happen where they are told to, and differences are seen."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.reliability import bench, training, verdicts
from benchmarks.reliability.trials import Trials


@pytest.fixture(scope="module")
def mae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reliability")
    with Trials(folder / "trials") as trials:
        yield training.Training(bench.Bench(folder, trials), "mae")


def test_a_training_is_killed_where_it_was_told_and_says_so_before(mae):
    run = mae.folder()
    (result,) = mae.start(run, fault={"at": "step", "step": 6, "do": "kill"})
    assert training.was([result]) == [["fault", "kill", "step 6, micro-batch 0"]]
    assert (result.exit, result.hung) == (None, False)
    assert [entry["step"] for entry in training.log(run)] == [1, 2, 3, 4, 5]


def test_an_operation_on_a_file_fails_once_where_it_was_told(mae):
    count = mae.start(mae.folder(), fault={"at": "count", "do": "kill"})
    operations = [name for _, name, save in training.was(count, "operation") if save == "2"]
    assert any(name.startswith("os.rename .tmp-step") for name in operations)
    fault = {"at": "write", "save": 2, "number": len(operations) // 2, "do": "EIO", "once": True}
    (result,) = mae.start(mae.folder(), fault=fault)
    assert [event[:2] for event in training.was([result])] == [["fault", "EIO"]]
    assert "Input/output error" in result.output


def test_the_usual_recipe_goes_on_after_a_kill(mae):
    usual = training.Training(mae.bench, "usual", ordered=True)
    run = usual.folder()
    (killed,) = usual.start(run, fault={"at": "step", "step": 6, "do": "kill"})
    assert training.was([killed])
    (result,) = usual.start(run)
    assert (result.exit, training.resumed_at(result)) == (0, 4)
    assert usual.judged([result], run).kind == verdicts.PASS


def ended(folder, value=1.0, loss=0.5):
    """A run that ended with one weight."""
    folder.mkdir()
    save_file({"model.weight": np.array([value], np.float32)}, folder / "final.safetensors")
    line = {"event": "train", "step": 1, "loss": loss, "images_per_s": np.random.rand()}
    (folder / "log.jsonl").write_text(json.dumps(line) + "\n")
    return folder


def test_two_runs_are_the_same_whatever_the_clock_says(tmp_path):
    assert training.difference(ended(tmp_path / "a"), ended(tmp_path / "b")) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [({"value": np.nextafter(np.float32(1), np.float32(2))}, "1 of 1 tensors differ"), ({"loss": 0.6}, "from step 1")],
)
def test_two_runs_that_differ_in_one_bit_or_one_loss_are_told_apart(tmp_path, change, words):
    assert words in training.difference(ended(tmp_path / "a", **change), ended(tmp_path / "b"))
