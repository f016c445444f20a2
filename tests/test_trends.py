"""Slopes of noisy lines: right on average, with errors that hold what they promise, and unmoved by outliers."""

import numpy as np
import pytest

from mim.health.trends import thinned, trend


def test_a_line_without_noise_has_its_slope_and_no_error():
    found = trend([0, 10, 20, 30, 40], [1, 3, 5, 7, 9])
    assert found.slope == pytest.approx(0.2)
    assert found.error == pytest.approx(0, abs=1e-12)
    assert found.change == pytest.approx(8)


@pytest.mark.parametrize(("alike", "num"), [(0.0, 60), (0.0, 400), (0.6, 400)])
def test_two_standard_errors_hold_the_slope_in_about_95_of_100_curves(alike, num):
    """Also where neighbouring points are alike (an autoregressive noise), and where points are averaged first."""
    rng, x, inside = np.random.default_rng(0), np.arange(num), 0
    for _ in range(60):
        noise = rng.standard_normal(num)
        for i in range(1, num):
            noise[i] += alike * noise[i - 1]
        found = trend(x, 0.05 * x + noise)
        inside += abs(found.slope - 0.05) < 2 * found.error
    assert inside >= 50


def test_a_few_outliers_do_not_turn_it():
    x = np.arange(40)
    y = 2.0 * x + np.random.default_rng(1).standard_normal(40)
    y[::6] += 500
    assert trend(x, y).slope == pytest.approx(2, abs=0.1)


def test_long_curves_are_averaged_in_groups_of_neighbours():
    values = np.arange(200.0)
    found = thinned(values)
    assert found[:2].tolist() == [1.0, 4.0]
    assert found[-1] == 198.5


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="3 points have no trend"):
        trend([1, 2, 3], [1, 2, 3])
