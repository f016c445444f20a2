"""Rounds of a benchmark: the order of turns, and the arithmetic of what they took."""

import torch

from benchmarks import rounds
from benchmarks.rounds import Spread

SLOW, FAST = [6.0, 1.0, 9.0], [3.0, 1.0, 2.0]


def test_variants_take_turns_within_each_round():
    turns = []
    variants = {name: lambda name=name: float(turns.append(name) or len(turns)) for name in "ab"}
    assert rounds.interleaved(variants, 3) == {"a": [1.0, 3.0, 5.0], "b": [2.0, 4.0, 6.0]}
    assert "".join(turns) == "ababab"


def test_a_ratio_is_the_median_of_the_ratios_of_the_rounds_not_the_ratio_of_the_medians():
    assert rounds.ratio(SLOW, FAST) == Spread(2.0, 1.0, 4.5)  # the medians' would be 3


def test_images_per_second_are_those_of_each_round():
    assert rounds.throughput(FAST, 6) == Spread(3.0, 2.0, 6.0)


def test_a_share_of_the_peak_is_taken_within_the_round():
    """The same work in half the time beside a peak of twice the speed is the same share."""
    assert rounds.mfu(10.0, [2.0, 1.0], [10.0, 20.0]) == Spread(0.5, 0.5, 0.5)


def test_the_seconds_between_two_marks_belong_to_the_second(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 10.0, 14.0, 15.0])
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: next(times))
    phases = rounds.Phases(torch.device("cpu"))
    for _ in range(2):  # what passes between two steps belongs to none
        phases.begin()
        phases.mark("forward")
        phases.mark("backward")
    assert phases.read() == {"forward": 5.0, "backward": 3.0}
    assert phases.read() == {}


def test_the_peak_is_the_speed_of_the_fastest_product(monkeypatch):
    peak = rounds.Peak(torch.device("cpu"), "no", [(2, 3, 5), (4, 4, 4)])
    monkeypatch.setattr(rounds.Peak, "_seconds", lambda self, left, right, out, count: 0.5 * count)
    assert peak() == 2 * 4 * 4 * 4 / 0.5


def test_a_machine_tells_what_its_figures_depend_on():
    facts = rounds.machine(torch.device("cpu"), ("torch", "no-such-package"))
    assert facts["versions"].keys() == {"torch"}
    assert facts["threads"] == torch.get_num_threads()
    assert {"cpu", "cpus", "device", "allocator", "date"} <= facts.keys()
