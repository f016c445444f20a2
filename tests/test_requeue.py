"""What launch scripts are told about a run that has ended."""

import json

import pytest

from mim.watch.requeue import outcome, saved_step


@pytest.fixture
def ended(tmp_path):
    """`ended(state, step, ...)`: a run directory that ended so, saved at that step."""

    def write(state, step, **more):
        run = tmp_path / "run"
        for number in (step, 1):
            folder = run / "checkpoints" / f"step-{number:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "manifest.json").write_text("{}")
        (run / "status.json").write_text(json.dumps({"state": state, "step": step, "of": 100, "recipe": "x"} | more))
        return run

    return write


def test_a_run_that_is_done_is_not_started_again(ended):
    assert outcome(ended("done", 100), 50).code == 0


@pytest.mark.parametrize("state", ["stopped", "running", "failed"])
def test_a_run_that_ended_early_goes_on_if_it_was_saved_further_than_at_its_start(ended, state):
    assert outcome(ended(state, 60), 50).code == 75


@pytest.mark.parametrize("state", ["stopped", "running", "failed"])
def test_a_run_that_came_no_further_is_not_started_again(ended, state):
    code, sentence = outcome(ended(state, 50), 50)
    assert code == 70
    assert "saved at step 50 as when it was started" in sentence


@pytest.mark.parametrize("code", [2, 65, 74])
def test_what_would_fail_in_the_same_way_again_keeps_its_code_and_reason(ended, code):
    found = outcome(ended("failed", 60, exit_code=code, reason="shard x is damaged"), 50)
    assert found.code == code
    assert "shard x is damaged" in found.sentence


def test_a_training_that_never_began_is_not_started_again(tmp_path):
    code, sentence = outcome(tmp_path / "run", 0)
    assert code == 70
    assert "the training never began" in sentence


def test_only_committed_checkpoints_count(ended):
    run = ended("running", 60)
    (run / "checkpoints" / "step-00000080").mkdir()
    (run / "checkpoints" / ".tmp-step-00000090").mkdir()
    (run / "checkpoints" / "step-abc").mkdir()
    assert saved_step(run) == 60
    assert saved_step(run / "nowhere") == 0
