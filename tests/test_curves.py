"""Curves of a log, whatever is missing in it."""

import pytest

from mim.health.curves import Curves


def test_values_that_are_no_finite_numbers_are_left_out_and_the_last_of_a_step_counts():
    lines = [
        {"event": "train", "step": 2, "loss": 3.0},
        {"event": "train", "step": 1, "loss": 4.0},
        {"event": "train", "step": 2, "loss": 2.0},
        {"event": "train", "step": 3, "loss": float("nan")},
        {"event": "train", "step": 4},
        {"event": "eval", "step": 4, "eval": "knn", "knn": 0.5, "knn_k1": 0.4},
        {"event": "eval", "step": 4, "eval": "reconstruction", "reconstruction": "picture.png"},
    ]
    curves = Curves(lines, {})
    assert (curves.trained("loss").steps, curves.trained("loss").values) == ([1, 2], [4.0, 2.0])
    assert {name: curve.values for name, curve in curves.probes.items()} == {"knn": [0.5]}
    assert (curves.warmup, curves.steps_per_day) == (0, None)


def test_durations_are_known_from_positions_and_epochs():
    line = {"event": "train", "step": 10, "position": 1000, "epoch": 0.5, "images_per_s": 50.0}
    curves = Curves([line], {"optim": {"batch_size": 100, "length": "3 epochs", "warmup": "40 steps"}})
    assert (curves.duration("length"), curves.warmup) == (60, 40)
    assert curves.steps_per_day == pytest.approx(43200)
