"""RUN/report.html, which a training writes by itself."""

import re

import numpy as np
import pytest
from click.testing import CliRunner

from mim import config
from mim.commands.report import report
from mim.job import Config
from mim.report import facts
from mim.report.page import page
from mim.report.runs import read
from mim.report.writing import Writing, save
from mim.train import main
from tests.tiny import write_recipe
from tests.written_run import write_run


def test_the_command_that_trains_again_is_accepted(tmp_path, shards, monkeypatch):
    recipe = write_recipe(tmp_path / "tiny.yaml", {"path": str(shards)}, "6 steps")
    assert main(recipe, [f"train.run={tmp_path / 'run'}"]) == 0
    text = (tmp_path / "run/report.html").read_text()
    assert "6 of 6" in text
    assert "cpu" in [value for _, value in facts.about(read(tmp_path / "run"))]
    words = facts.command(read(tmp_path / "run")).split()
    again = config.typed(Config, config.read(words[2], words[3:]))
    assert again.train.run.endswith("run-again")


def test_a_report_that_cannot_be_written_costs_one_line(tmp_path, monkeypatch, capsys):
    writing = Writing(tmp_path)
    monkeypatch.setattr("mim.report.writing.page", lambda runs: 1 / 0)
    monkeypatch.setattr("mim.report.writing.SHARE", 1e9)
    for step in (1, 2):
        writing.tell({"event": "eval", "step": step})
    writing.close()
    assert len(re.findall("could not be written: division by zero; training goes on", capsys.readouterr().err)) == 1


def test_the_page_of_a_run_that_failed_says_so(tmp_path, shards, monkeypatch):
    monkeypatch.setattr("mim.train.clip", lambda *_: 1 / 0)
    recipe = write_recipe(tmp_path / "tiny.yaml", {"path": str(shards)}, "6 steps")
    with pytest.raises(ZeroDivisionError):
        main(recipe, [f"train.run={tmp_path / 'run'}"])
    assert "failed: ZeroDivisionError: division by zero" in (tmp_path / "run/report.html").read_text()


def test_a_training_and_a_user_may_write_one_report_at_once(tmp_path, monkeypatch):
    run, out = write_run(tmp_path / "mae", steps=100), tmp_path / "mae/report.html"
    whole = page([run])

    def meanwhile(runs):
        out.with_name(".report.html.tmp").write_text("of another process")
        return whole

    monkeypatch.setattr("mim.report.writing.page", meanwhile)
    save([run], out)
    assert out.read_text() == whole
    assert out.with_name(".report.html.tmp").read_text() == "of another process"


def test_a_page_that_took_long_is_not_written_again_soon(tmp_path, monkeypatch):
    now, pages = [0.0], []
    monkeypatch.setattr("mim.report.writing.time.monotonic", lambda: now[0])

    def slow(runs, out):
        now[0] += 2.0
        pages.append(now[0])

    monkeypatch.setattr("mim.report.writing.save", slow)
    writing = Writing(tmp_path)
    for step in range(400):
        now[0] += 1.0
        writing.tell({"event": "eval" if step % 10 == 0 else "train", "step": step})
    assert np.diff(pages).min() >= 200


def test_a_run_that_is_not_there_is_named_as_such(tmp_path):
    told = CliRunner().invoke(report, [str(tmp_path / "none")])
    assert "none is not a run directory" in str(told.exception)
