"""The run log, and averages that lose nothing when a run is interrupted."""

import json

import pytest
import torch

from mim.log import Averages, Pace, Progress, RunLog, clock, heard, say, write_json


def alone(value):
    """One rank: nothing to add."""
    return value


def entries(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- log.jsonl -----------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "log.jsonl"
    log = RunLog(path, 0)
    for step in (2, 4, 6):
        log.write("train", step, loss=step / 2)
    log.write("eval", 6, eval="knn", knn=0.5)
    log.close()
    return path


def test_each_line_is_an_object_with_its_event_and_step(written):
    assert entries(written)[0] == {"event": "train", "step": 2, "loss": 1.0}
    assert entries(written)[3] == {"event": "eval", "step": 6, "eval": "knn", "knn": 0.5}


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path):
    log = RunLog(tmp_path / "log.jsonl", 0)
    log.write("train", 1, loss=0.5)
    assert len(entries(tmp_path / "log.jsonl")) == 1


@pytest.mark.parametrize(("step", "kept"), [(0, []), (3, [2]), (4, [2, 4]), (6, [2, 4, 6, 6]), (9, [2, 4, 6, 6])])
def test_a_resume_drops_the_lines_after_its_step_and_goes_on(written, step, kept):
    log = RunLog(written, step)
    assert [entry["step"] for entry in entries(written)] == kept
    log.write("train", 10)
    assert [entry["step"] for entry in entries(written)] == [*kept, 10]


def test_the_torn_last_line_of_a_killed_run_is_dropped(written):
    with written.open("a") as file:
        file.write('{"event": "train", "step": 8, "lo')
    RunLog(written, 8).write("train", 8, loss=4.0)
    assert [entry["step"] for entry in entries(written)] == [2, 4, 6, 6, 8]
    assert entries(written)[-1]["loss"] == 4.0


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "status.json"
    write_json(path, {"state": "running"})
    with pytest.raises(TypeError):
        write_json(path, {"state": object()})
    assert json.loads(path.read_text()) == {"state": "running"}


def test_lines_that_a_full_disk_does_not_take_wait_for_space(tmp_path, capsys):
    log = RunLog(tmp_path / "log.jsonl", 0)
    file, log._file = log._file, open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    log.write("train", 1)
    log.write("train", 2)
    log._file = file
    log.write("train", 3)
    assert [entry["step"] for entry in entries(tmp_path / "log.jsonl")] == [1, 2, 3]
    assert capsys.readouterr().err.count("/dev/full takes no more lines: No space left on device") == 1


def test_lines_of_a_rollback_that_the_state_does_not_know_are_dropped(tmp_path):
    log = RunLog(tmp_path / "log.jsonl", 0)
    log.write("train", 2, loss=1.0)
    log.write("rollback", 2, rollback=1)
    log.write("rollback", 2, rollback=2)
    log.close()
    RunLog(tmp_path / "log.jsonl", 2, rollbacks=1).close()
    assert [entry.get("rollback") for entry in entries(tmp_path / "log.jsonl")] == [None, 1]


# ---- averages ------------------------------------------------------------------------------------


def micro_batches(num, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num):
        loss = torch.randn(5, generator=generator, dtype=torch.float32)
        weight = (torch.rand(5, generator=generator) < 0.7).float()
        yield {"loss": loss, "accuracy": loss.square()}, weight


def fill(averages, batches):
    for i, (values, weight) in enumerate(batches):
        averages.add(values, weight)
        averages.add_step({"grad_norm": values["loss"].norm(), "skipped": torch.tensor(i % 3 == 0)}, ranks=1)


def test_the_mean_is_that_of_all_rows_that_count():
    averages, batches = Averages(), list(micro_batches(7))
    fill(averages, batches)
    means = averages.read(alone)
    loss = torch.cat([values["loss"] for values, _ in batches]).double()
    weight = torch.cat([weight for _, weight in batches]).double()
    assert means["loss"] == pytest.approx(float((loss * weight).sum() / weight.sum()), rel=1e-12)
    assert means["accuracy"] == pytest.approx(float((loss.square() * weight).sum() / weight.sum()), rel=1e-6)


def test_a_step_that_was_skipped_is_left_out_of_the_means_per_image():
    averages, honest = Averages(), Averages()
    for finite in (True, False, True):
        for some in (averages, honest) if finite else (averages,):
            some.add({"loss": torch.arange(3.0) if finite else torch.full((3,), float("nan"))}, torch.ones(3))
            skipped = {"skipped": torch.tensor(not finite)}
            some.add_step(skipped, ranks=1, finite=torch.tensor(finite))
    assert averages.read(alone) == honest.read(alone) | {"skipped": 1 / 3}


def test_an_interval_of_skipped_steps_alone_has_no_means_per_image():
    averages = Averages()
    averages.add({"loss": torch.full((3,), float("nan"))}, torch.ones(3))
    averages.add_step({"skipped": torch.tensor(True)}, ranks=1, finite=torch.tensor(False))
    assert averages.read(alone) == {"skipped": 1.0}


def test_values_of_a_step_are_averaged_over_steps():
    averages, batches = Averages(), list(micro_batches(6))
    fill(averages, batches)
    means = averages.read(alone)
    norms = torch.stack([values["loss"].norm() for values, _ in batches]).double()
    assert means["grad_norm"] == pytest.approx(float(norms.mean()), rel=1e-12)
    assert means["skipped"] == pytest.approx(2 / 6)


def test_a_value_without_rows_is_logged_as_it_was_last():
    averages = Averages()
    for usage in (0.1, 0.7):
        averages.add({"loss": torch.ones(2), "usage": torch.tensor(usage)}, torch.ones(2))
    averages.add_step({"grad_norm": torch.tensor(1.0)}, ranks=1)
    assert averages.read(alone)["usage"] == pytest.approx(0.7)


def test_an_interval_in_which_no_row_counts_has_means_of_zero():
    averages = Averages()
    averages.add({"loss": torch.zeros(2)}, torch.zeros(2))
    averages.add_step({"grad_norm": torch.tensor(1.0)}, ranks=1)
    assert averages.read(alone) == {"loss": 0.0, "grad_norm": 1.0}


def test_the_loss_is_shown_first():
    averages = Averages()
    averages.add({"accuracy": torch.ones(2), "loss": torch.ones(2)}, torch.ones(2))
    averages.add_step({"a": torch.tensor(1.0)}, ranks=1)
    assert next(iter(averages.read(alone))) == "loss"


def test_reading_starts_a_new_interval():
    averages = Averages()
    fill(averages, micro_batches(3, seed=1))
    averages.read(alone)
    fill(averages, micro_batches(4, seed=2))
    fresh = Averages()
    fill(fresh, micro_batches(4, seed=2))
    assert averages.read(alone) == fresh.read(alone)


@pytest.mark.parametrize("stop", [0, 1, 4, 9])
def test_an_interrupted_interval_has_bit_for_bit_the_means_of_an_uninterrupted_one(stop):
    whole, first = Averages(), Averages()
    batches = list(micro_batches(9))
    fill(whole, batches)
    fill(first, batches[:stop])
    second = Averages(json.loads(json.dumps(first.state(alone))))  # as a checkpoint keeps it
    for i, (values, weight) in enumerate(batches[stop:], start=stop):
        second.add(values, weight)
        second.add_step({"grad_norm": values["loss"].norm(), "skipped": torch.tensor(i % 3 == 0)}, ranks=1)
    assert second.read(alone) == whole.read(alone)


def test_an_interval_that_was_restored_and_read_is_over():
    first, fresh = Averages(), Averages()
    fill(first, micro_batches(3, seed=1))
    second = Averages(first.state(alone))
    assert second.read(alone) == first.read(alone)
    for averages in (second, fresh):
        fill(averages, micro_batches(4, seed=2))
    assert second.read(alone) == fresh.read(alone)


def test_saving_does_not_disturb_the_interval():
    saved, untouched = Averages(), Averages()
    for averages in (saved, untouched):
        fill(averages, micro_batches(3, seed=1))
        if averages is saved:
            averages.state(alone)
        fill(averages, micro_batches(3, seed=2))
    assert saved.read(alone) == untouched.read(alone)


def test_ranks_are_added_up():
    ranks = [Averages(), Averages()]
    batches = list(micro_batches(4))
    for rank, averages in enumerate(ranks):
        for values, weight in batches[2 * rank : 2 * rank + 2]:
            averages.add(values, weight)
        averages.add_step({"grad_norm": torch.tensor(3.0)}, ranks=2)
    states = [averages.state(alone) for averages in ranks]
    names = sorted(states[0])

    def reduce(value):
        return value + torch.tensor([states[1][name] for name in names], dtype=torch.float64)

    whole = Averages()
    for values, weight in batches:
        whole.add(values, weight)
    whole.add_step({"grad_norm": torch.tensor(3.0)}, ranks=1)
    assert ranks[0].read(reduce) == pytest.approx(whole.read(alone), rel=1e-12)


# ---- progress ------------------------------------------------------------------------------------


def test_rates_are_those_since_the_last_look(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    progress = Progress(10, 50, batch_size=8, main=True)
    now[0] = 102.0
    progress.waited(0.5)
    assert progress.rates(20) == {"images_per_s": 40.0, "data_wait": 0.25, "eta_s": 6.0}
    now[0] = 106.0
    assert progress.rates(30) == {"images_per_s": 20.0, "data_wait": 0.0, "eta_s": 6.0}


def test_the_time_of_evaluations_is_no_time_of_training(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    progress = Progress(10, 50, batch_size=8, main=True)
    now[0] = 112.0
    progress.looked(10.0)
    progress.waited(0.5)
    assert progress.rates(20) == {"images_per_s": 40.0, "data_wait": 0.25, "eta_s": 36.0}


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (61, "1:01"), (3723, "1:02:03"), (59.6, "1:00")])
def test_a_clock_shows_hours_only_when_there_are_any(seconds, shown):
    assert clock(seconds) == shown


def test_only_the_main_rank_is_heard_while_all_ranks_run_a_block_and_all_are_afterwards(capsys):
    with heard(False):
        say("of another rank")
        with heard(True):
            say("of the main rank")
    with pytest.raises(ValueError, match="of a block"), heard(False):
        raise ValueError("of a block")
    say("afterwards")
    assert capsys.readouterr().err.split("\n") == ["of the main rank", "afterwards", ""]


def test_long_work_tells_now_and_then_how_far_it_is(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    pace = Pace("features of stripes", 100)
    for seconds, count in ((10.0, 10), (20.0, 30), (21.0, 10)):
        now[0] = seconds
        pace.advance(count)
    assert capsys.readouterr().err == "features of stripes: 40/100 images, 2.0 a second, left 0:30\n"
