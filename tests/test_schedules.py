"""Durations and rates as pure functions of the step."""

import math

import pytest

from mim.schedules import SHAPES, constant, cosine, linear, multistep, to_steps, warmup_then


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        (7, 7),
        ("7", 7),
        ("5000 steps", 5000),
        ("1 step", 1),
        ("1 epoch", 10),
        ("3 epochs", 30),
        ("0.5 epochs", 5),
        (" 2 EPOCHS ", 20),
        ("1e2 steps", 100),
        ("1_000 images", 100),
        ("25 images", 3),  # rounded up
        ("1 image", 1),
        ("0 epochs", 0),
    ],
)
def test_a_duration_becomes_optimizer_steps(duration, steps):
    assert to_steps(duration, batch_size=10, num_images=100, where="optim.length") == steps


def test_an_epoch_is_a_number_of_images_and_not_of_batches():
    assert to_steps("1 epochs", batch_size=8, num_images=23, where="optim.length") == 3
    assert to_steps("8 epochs", batch_size=8, num_images=23, where="optim.length") == 23


def test_a_whole_number_of_steps_is_not_rounded_up_by_floating_point():
    assert 1.1 * 100 > 110
    assert to_steps("1.1 epochs", batch_size=1, num_images=100, where="optim.length") == 110


@pytest.mark.parametrize("duration", ["ten epochs", "5 parsecs", "-1 epochs", "epochs", "1.2.3 steps", "", "3 epoch 2"])
def test_what_is_no_duration_is_refused_with_examples(duration):
    with pytest.raises(ValueError, match="is not a duration; write e") as error:
        to_steps(duration, batch_size=10, num_images=100, where="optim.length")
    assert str(error.value).startswith(f"optim.length={duration!r}")


def test_cosine_is_half_a_cosine():
    values = [cosine(step, start=2.0, end=1.0, steps=4) for step in range(5)]
    assert values == pytest.approx([1.5 + 0.5 * math.cos(math.pi * step / 4) for step in range(5)])


def test_linear_is_a_straight_line():
    assert [linear(step, start=2.0, end=1.0, steps=4) for step in range(5)] == [2.0, 1.75, 1.5, 1.25, 1.0]


def test_constant_stays():
    assert [constant(step, start=2.0, end=1.0, steps=4) for step in range(6)] == [2.0] * 6


@pytest.mark.parametrize("shape", [cosine, linear])
def test_a_shape_stays_at_its_end_afterwards(shape):
    assert shape(9, start=2.0, end=1.0, steps=4) == 1.0


@pytest.mark.parametrize("shape", SHAPES)
def test_a_warm_up_rises_in_equal_parts_and_the_first_update_already_moves(shape):
    rates = [warmup_then(shape, step, peak=1.0, end=0.0, warmup_steps=4, steps=10) for step in range(4)]
    assert rates == [0.25, 0.5, 0.75, 1.0]


def test_a_warm_up_may_start_above_zero():
    values = [warmup_then("constant", s, peak=1.0, end=0.0, warmup_steps=4, steps=9, start=0.2) for s in range(5)]
    assert values == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.0])


def test_multistep_falls_at_each_milestone_and_stays_between():
    values = [multistep(s, start=2.0, factor=0.1, milestones=(3, 5)) for s in range(7)]
    assert values == pytest.approx([2.0, 2.0, 2.0, 0.2, 0.2, 0.02, 0.02])


@pytest.mark.parametrize(("shape", "end"), [("cosine", 0.1), ("linear", 0.1), ("constant", 1.0)])
@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_a_run_starts_its_shape_at_the_peak_and_reaches_the_end_at_its_last_step(shape, end, warmup_steps):
    rates = [warmup_then(shape, s, peak=1.0, end=0.1, warmup_steps=warmup_steps, steps=9) for s in range(9)]
    assert rates[warmup_steps] == 1.0
    assert rates[-1] == pytest.approx(end)
    assert rates[warmup_steps:] == sorted(rates[warmup_steps:], reverse=True)


def test_a_run_may_be_nothing_but_warm_up():
    rates = [warmup_then("cosine", step, peak=1.0, end=0.0, warmup_steps=3, steps=3) for step in range(3)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0])
