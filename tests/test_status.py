"""status.json, and `mim status`, which prints it."""

import json

import pytest
from click.testing import CliRunner

from mim.commands.status import status as command
from mim.config import ConfigError
from mim.contracts import DataError, ExportError, StorageError
from mim.watch.status import Status, exit_code


@pytest.fixture
def run(tmp_path):
    """`run(*options)` calls `mim status` on a run of which two checkpoints are saved: (exit code, output)."""
    for step in (40, 80):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)

    def call(*options):
        found = CliRunner().invoke(command, [str(tmp_path), *options])
        return found.exit_code, found.output

    return call


def test_the_command_tells_state_reason_and_newest_checkpoint(run, tmp_path):
    Status(tmp_path, "mae", 100).write("stopped", 80, reason="SIGTERM", code=75)
    text = run()[1]
    assert text.startswith("stopped at step 80 of 100: SIGTERM (0:0")
    assert "newest checkpoint step 80, 0:0" in text
    found = json.loads(run("--json")[1])
    assert {key: found[key] for key in ("state", "step", "of", "recipe", "reason", "exit_code", "checkpoint")} == {
        "state": "stopped", "step": 80, "of": 100, "recipe": "mae", "reason": "SIGTERM", "exit_code": 75,
        "checkpoint": 80,
    }  # fmt: skip


def test_the_command_says_what_the_log_says_in_words(run, tmp_path):
    Status(tmp_path, "mae", 100).write("running", 80)
    assert run()[1].splitlines()[1] == "0 log lines are too few to judge the course"
    with (tmp_path / "log.jsonl").open("w") as log:
        log.writelines(f'{{"event": "train", "step": {step}, "loss": 0.5, "data_wait": 0.4}}\n' for step in range(5))
    assert run()[1].splitlines()[1].startswith("data-bound: 40% of the time")


def test_a_status_that_cannot_be_written_is_said_and_ends_nothing(tmp_path, capsys):
    Status(tmp_path / "gone", "mae", 100).write("running", 80)
    assert "gone/status.json could not be written: No such file or directory" in capsys.readouterr().err


def test_a_folder_without_a_status_is_refused(run):
    found = CliRunner().invoke(command, ["nowhere"])
    assert isinstance(found.exception, ConfigError)
    assert "nowhere has no status.json" in str(found.exception)


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("x"), 2), (DataError("x"), 65), (StorageError("x"), 74), (ExportError("x"), 70), (KeyError("x"), 70)],
)
def test_every_error_has_its_exit_code(error, code):
    assert exit_code(error) == code
