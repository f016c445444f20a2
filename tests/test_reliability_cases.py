"""Cases of the reliability bench that ours must pass; `make bench-reliability` runs all, for both readers."""

import os

import pytest

from benchmarks.reliability import bench, fixtures, verdicts
from benchmarks.reliability.__main__ import CASES
from benchmarks.reliability.trials import Result, Trials

BY_ID = {case.id: case for case in CASES}
OF_DATA = ("B1", "C1", "C2", "C3", "F1", "F2", "F3", "F5", "F6", "F7")
OF_TRAININGS = ("A3", "E1", "E2", "E3", "E4", "F1t")
ALWAYS = (*OF_DATA, *OF_TRAININGS)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """The bench, with a server process of its own."""
    folder = tmp_path_factory.mktemp("reliability")
    with Trials(folder / "trials") as trials:
        yield bench.Bench(folder, trials, quick=True)


@pytest.mark.parametrize("case", ALWAYS)
def test_ours_passes(ours, case):
    verdict = BY_ID[case].run(ours, bench.OURS)
    assert verdict.kind == verdicts.PASS, verdict.detail


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(BY_ID.keys() - set(ALWAYS)))
def test_ours_passes_the_slower_cases(ours, case):
    verdict = BY_ID[case].run(ours, bench.OURS)
    assert verdict.kind in (verdicts.PASS, verdicts.SKIPPED), verdict.detail


def test_a_number_is_read_from_its_own_pixels_alone():
    assert fixtures.number_of(fixtures.pixels_of(4321)) == 4321
    assert fixtures.number_of(255 - fixtures.pixels_of(4321)) == 4321 ^ 0xFFFF
    assert fixtures.number_of(fixtures.pixels_of(4321)[:, ::-1]) == fixtures.NOBODY


def test_the_usual_recipe_delivers_a_whole_dataset(ours):
    results = ours.read(bench.USUAL, ours.small.path)
    assert verdicts.delivered(results, ours.small.rows).kind == verdicts.PASS


def test_a_case_whose_fault_did_not_fire_is_invalid(ours):
    case = bench.Case("X", "no fault", lambda *_: bench.fired(False, "nothing happened"))
    assert case.run(ours, bench.OURS) == (verdicts.INVALID, "nothing happened")


def test_a_reader_that_does_not_end_is_a_hang_and_is_ended(ours):
    fifo = ours.scratch()
    os.mkfifo(fifo)
    (result,) = ours.trials.run(bench.USUAL, tars=[str(fifo)], limit=2)
    assert verdicts.ended([result]).kind == verdicts.HANG


def test_processes_of_one_trial_may_be_told_different_things(ours):
    each = [{"tars": [str(tar)]} for tar in ours.whole.tars[:2]]
    results = ours.trials.run(bench.USUAL, each=each)
    assert [len(result.rows) for result in results] == [30, 30]
    assert not set(results[0].rows) & set(results[1].rows)


def test_a_process_with_a_small_disk_cannot_write_more(ours):
    command = ("shards", "make", ours.small.path.parent / "images", "--workers", 1)
    assert ours.mim(*command, ours.scratch()).exit == 0
    refused = ours.mim(*command, ours.scratch(), file_limit=100_000)
    assert refused.events[0] == ["file limit", "100000"]
    assert refused.exit == 74
    assert "File too large" in refused.output


def test_a_secret_in_any_place_is_found(tmp_path):
    (tmp_path / "log").write_text("hunter2")
    secrets, clean = {"the key": "hunter2"}, Result(output="hunter3")
    started = Result(events=[["subprocess.Popen", "curl", "hunter2"]])
    assert verdicts.leaked(secrets, [clean]) is None
    for results, files in (([Result(output="a hunter2 b")], []), ([started], []), ([clean], [tmp_path / "log"])):
        assert verdicts.leaked(secrets, results, files).kind == verdicts.SILENT


def rows(*numbers):
    return [fixtures.expected(number) for number in numbers]


@pytest.mark.parametrize(
    ("found", "words"),
    [([1, 2], "1 lost of 3"), ([1, 2, 3, 3], "1 repeated of 3"), ([1, 2, 3, 9], "1 altered or foreign of 3")],
)
def test_what_differs_from_the_wanted_rows_is_silent_unless_it_was_said(found, words):
    assert verdicts.same_rows(rows(*found), rows(1, 2, 3)) == (verdicts.SILENT, words)


def test_a_refusal_must_name_what_is_wrong():
    failed = Result(exit=65, message="a.tar, byte 5: truncated")
    assert verdicts.refused([failed], "a.tar").kind == verdicts.PASS
    assert verdicts.refused([failed], "b.tar").kind == verdicts.LOUD
    assert verdicts.refused([Result(exit=0)], "a.tar").kind == verdicts.SILENT


def test_several_verdicts_join_to_the_worst():
    found = [verdicts.Verdict(kind) for kind in ("pass", "loud", "silent", "pass")]
    assert verdicts.joined(found).kind == verdicts.SILENT
    assert verdicts.joined([]).kind == verdicts.INVALID
