"""`mim checkpoints`: what is there, what of it is valid, and what may go."""

import json

import pytest
from click.testing import CliRunner

from mim.__main__ import cli
from mim.config import ConfigError
from mim.saving import checkpoint, lease, retention
from tests.test_resume import fake


def call(*arguments):
    return CliRunner().invoke(cli, ["checkpoints", *map(str, arguments)])


def steps(run):
    return [checkpoint.step_of(folder) for folder in checkpoint.list_checkpoints(run)]


def damage(run, step):
    """Other bytes of the same size: only a hash tells."""
    (run / f"checkpoints/step-{step:08d}/tensors/1.safetensors").write_bytes(b"x" * 100)


@pytest.fixture
def a_run(tmp_path):
    return fake(tmp_path / "run", [10, 20, 30, 40])


def test_list_shows_step_size_state_and_pins_without_hashing(a_run, monkeypatch):
    monkeypatch.setattr(checkpoint, "_sha256", lambda path: pytest.fail("a file was hashed"))
    retention.pin(a_run / "checkpoints/step-00000020")
    (a_run / "checkpoints/step-00000030/tensors/0.safetensors").unlink()
    shown = call("list", a_run).output.splitlines()
    assert [line.split()[0] for line in shown[1:5]] == ["10", "20", "30", "40"]
    assert shown[1].endswith("complete")
    assert "pinned" in shown[2]
    assert shown[3].endswith("tensors/0.safetensors is missing, which its manifest lists")
    assert shown[5].endswith("; 1 would be rejected")
    rows = json.loads(call("list", a_run, "--json").output)
    assert [row["valid"] for row in rows] == [True, True, False, True]
    assert rows[1]["pinned"]
    assert rows[0]["size"] == sum(f.stat().st_size for f in (a_run / "checkpoints/step-00000010").rglob("*.*"))


def test_verify_hashes_everything_and_ends_with_65_when_one_is_not_valid(a_run):
    assert call("verify", a_run).exit_code == 0
    damage(a_run, 30)
    told = call("verify", a_run)
    assert told.exit_code == 65
    assert "step 30: NOT VALID: the content of tensors/1.safetensors does not match its hash" in told.output
    assert told.output.splitlines()[-1] == f"3 of 4 checkpoints in {a_run} are valid"
    assert call("verify", a_run, 10, 20).exit_code == 0
    rows = json.loads(call("verify", a_run, "--json").output)
    assert [row["step"] for row in rows if not row["valid"]] == [30]


def test_verify_tells_how_far_it_is_in_a_large_checkpoint(a_run, monkeypatch):
    monkeypatch.setattr("mim.log.Pace.EVERY", 0.0)
    told = call("verify", a_run, 10).stderr.splitlines()
    assert [line.partition(" bytes, ")[0].partition("/")[0] for line in told] == ["step 10: 100", "step 10: 200"]


def test_prune_keeps_the_newest_valid_and_the_pinned_ones(a_run):
    retention.pin(a_run / "checkpoints/step-00000010")
    dry = call("prune", a_run, "--keep", 2, "--dry-run")
    assert "would delete" in dry.output
    assert steps(a_run) == [10, 20, 30, 40]
    assert call("prune", a_run, "--keep", 2).output.splitlines()[-1].endswith("are deleted, 3 stay")
    assert steps(a_run) == [10, 30, 40]


def test_prune_counts_only_checkpoints_whose_hashes_are_right(a_run):
    damage(a_run, 40)
    assert call("prune", a_run, "--keep", 2).exit_code == 0
    assert steps(a_run) == [20, 30, 40]


def test_prune_deletes_nothing_where_fewer_than_two_are_valid(a_run):
    for step in (10, 20, 40):
        damage(a_run, step)
    assert json.loads(call("prune", a_run, "--keep", 2, "--json").stdout)["deleted"] == []
    assert steps(a_run) == [10, 20, 30, 40]


def test_prune_removes_what_killed_saves_left_but_not_on_a_dry_run(a_run):
    left = a_run / "checkpoints/.tmp-step-00000050"
    left.mkdir()
    call("prune", a_run, "--keep", 4, "--dry-run")
    assert left.exists()
    call("prune", a_run, "--keep", 4)
    assert not left.exists()
    assert steps(a_run) == [10, 20, 30, 40]


def test_prune_keeps_every_nth_and_asks_for_it_where_the_recipe_does(a_run):
    with (a_run / "config.yaml").open("a") as file:
        file.write("train:\n  keep_every: 2 epochs\n")
    with pytest.raises(ConfigError, match=r"train.keep_every='2 epochs'; say --keep-every STEPS"):
        CliRunner().invoke(cli, ["checkpoints", "prune", str(a_run), "--keep", "2"], catch_exceptions=False)
    assert call("prune", a_run, "--keep", 2, "--keep-every", 20).exit_code == 0
    assert steps(a_run) == [20, 30, 40]


def test_prune_leaves_a_run_alone_in_which_a_job_is_at_work(a_run):
    with lease.hold(a_run):
        refused = call("prune", a_run, "--keep", 2)
    assert isinstance(refused.exception, ConfigError)
    assert "is in use by process" in str(refused.exception)
    assert steps(a_run) == [10, 20, 30, 40]


def test_fewer_than_two_cannot_be_asked_for(a_run):
    assert call("prune", a_run, "--keep", 1).exit_code == 2


def test_a_pin_is_set_and_taken_back(a_run):
    folder = a_run / "checkpoints/step-00000020"
    assert call("pin", a_run, 20).exit_code == 0
    assert retention.pinned(folder)
    assert checkpoint.verify(folder) is None
    assert call("unpin", a_run, 20).exit_code == 0
    assert not retention.pinned(folder)


def test_a_step_that_is_not_there_is_refused_with_those_that_are(a_run):
    refused = call("pin", a_run, 25)
    assert str(refused.exception) == f"{a_run} has no checkpoint of step 25; steps it has: 10, 20, 30, 40"


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    assert "is not a run directory" in str(call("list", tmp_path).exception)
