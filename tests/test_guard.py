"""What a skipped step leaves alone, and when the training has gone wrong."""

import json
import weakref

import pytest
import torch
from torch import nn

from mim.config import ConfigError
from mim.guard import REMEMBERED, SCALE_SEARCH, Average, Config, Guard, Held

GOOD, BAD = torch.tensor(True), torch.tensor(False)


def guard(state=None, *, scaled=False, quiet_until=0, **options):
    found = Guard(Config(**options), quiet_until=quiet_until, scaled=scaled)
    found.restore(state or {})
    return found


def take(watched, first, *outcomes):
    """Steps from `first` on, finite or not."""
    for number, finite in enumerate(outcomes, start=first):
        watched.see(number, [f"a.tar/{number}"])
        watched.close(torch.tensor(finite), torch.tensor(1.0))


def verdicts(watched, losses, every=10):
    """What it says of each loss, logged every so many steps."""
    return [watched.judge(number * every, loss) for number, loss in enumerate(losses, start=1)]


# ---- skipped steps in a row ----------------------------------------------------------------------


def test_skipped_steps_are_told_once_in_their_order():
    watched = guard()
    take(watched, 1, True, False, True, False, False)
    assert watched.skipped() == [2, 4, 5]
    assert watched.skipped() == []


def test_enough_skipped_steps_in_a_row_are_an_incident_that_names_the_first():
    watched = guard(bad_steps=3)
    take(watched, 1, False, True, False, False)
    assert watched.judge(4, 1.0) is None
    take(watched, 5, False)
    incident = watched.judge(5, None)
    assert (incident.step, incident.first) == (5, 3)
    assert incident.reason == "the gradient of 3 steps in a row is not finite"


def test_a_run_that_recovers_by_itself_goes_on():
    watched = guard(bad_steps=3)
    take(watched, 1, False, False, False, False, True)
    assert watched.judge(5, 1.0) is None


def test_steps_that_a_gradient_scaler_skips_to_find_its_scale_are_no_incident():
    watched = guard(bad_steps=2, scaled=True)
    take(watched, 1, *[False] * (SCALE_SEARCH + 1))
    assert watched.judge(SCALE_SEARCH + 1, None) is None
    take(watched, SCALE_SEARCH + 2, False)
    assert watched.judge(SCALE_SEARCH + 2, None).first == 1


def test_in_a_long_log_interval_the_samples_of_few_steps_are_remembered_and_every_outcome():
    watched = guard()
    take(watched, 1, False)
    first = weakref.ref(watched.steps[0])
    take(watched, 2, *[True] * REMEMBERED)
    assert first() is None
    assert watched.skipped() == [1]


# ---- spikes --------------------------------------------------------------------------------------


def falling(count, start=2.0, end=1.0, noise=0.01):
    draws = torch.randn(count, generator=torch.Generator().manual_seed(0)).tolist()
    return [end + (start - end) * 0.9**i + noise * draw for i, draw in enumerate(draws)]


def test_a_loss_far_above_its_window_is_a_spike_since_the_last_log():
    watched = guard()
    assert verdicts(watched, falling(40)) == [None] * 40
    incident = watched.judge(410, 1.9)
    assert (incident.step, incident.first) == (410, 401)
    assert "the loss is 1.9, after a median of 1.0" in incident.reason


@pytest.mark.parametrize(
    "losses",
    [
        falling(60),
        [-2.0 - 0.01 * i for i in range(60)],  # a likelihood has no floor at 0
        [1.0 + 0.02 * i for i in range(60)],  # the weight of a term rises
        [0.5] * 40 + [0.52] * 20,  # no spread at all, then a change of 4 %
        [4.6 * 0.7**i + 1e-4 * (1 + 60 * (i % 13 == 12)) for i in range(60)],  # memorised; outliers of next to nothing
        falling(60, noise=0.1),  # small batches
    ],
)  # fmt: skip
def test_what_a_healthy_run_shows_is_no_spike(losses):
    assert verdicts(guard(), losses) == [None] * len(losses)


def test_no_spike_is_found_before_the_window_is_full_nor_in_the_warm_up():
    assert verdicts(guard(window=10), [*falling(9), 50.0])[-1] is None
    assert verdicts(guard(window=10, quiet_until=110), [*falling(10), 50.0])[-1] is None
    assert verdicts(guard(window=10, quiet_until=100), [*falling(10), 50.0])[-1] is not None


def test_without_a_number_for_spikes_none_is_looked_for():
    assert verdicts(guard(spike=None), [*falling(40), 50.0])[-1] is None


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_an_incident_at_once(loss):
    incident = guard(spike=None).judge(10, loss)
    assert incident.reason == f"the loss is {loss}"
    assert incident.first == 1


def test_a_spike_does_not_enter_the_window():
    watched = guard()
    verdicts(watched, falling(40))
    before = list(watched.losses)
    watched.judge(410, 9.0)
    assert list(watched.losses) == before


def test_a_guard_that_is_saved_at_any_step_finds_what_it_would_have_found():
    def script(watched, first, last):
        """One log every two steps; a streak over steps 7 to 10; a spike at 40."""
        found = []
        for step in range(first, last):
            take(watched, step, not 7 <= step <= 10)
            if step % 2 == 0:
                skipped, loss = watched.skipped(), 1.0 + 0.01 * (step % 4) if step != 40 else 3.0
                incident = watched.judge(step, None if 7 <= step <= 10 else loss)
                found.append((step, skipped, incident and incident.reason))
        return found

    whole = script(guard(window=5, bad_steps=9), 1, 41)
    assert whole[-1][2] is not None
    for stop in range(2, 41):
        first = guard(window=5, bad_steps=9)
        before = script(first, 1, stop)
        second = guard(json.loads(json.dumps(first.state())), window=5, bad_steps=9)
        assert before + script(second, stop, 41) == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bad_steps": 0}, "train.guard.bad_steps=0 must be at least 1"),
        ({"spike": -1.0}, "train.guard.spike=-1.0 must be above 0, or null to look for no spike"),
        ({"window": 2}, "train.guard.window=2 must be at least 3 log intervals"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError) as error:
        Config(**options)
    assert str(error.value) == message


# ---- what a skipped step leaves alone ------------------------------------------------------------


def test_buffers_that_a_skipped_step_moved_are_put_back_bit_for_bit():
    network = nn.BatchNorm1d(3)
    held = Held(network)
    network(torch.randn(8, 3))
    before = {name: value.clone() for name, value in network.named_buffers()}
    held.hold()
    network(torch.full((8, 3), float("nan")))
    assert network.running_mean.isnan().all()
    held.put_back(BAD)
    assert all(value.equal(before[name]) for name, value in network.named_buffers())


def test_buffers_of_a_step_that_counts_stay_as_it_left_them():
    network = nn.BatchNorm1d(3)
    held = Held(network)
    held.hold()
    network(torch.randn(8, 3))
    after = {name: value.clone() for name, value in network.named_buffers()}
    held.put_back(GOOD)
    assert all(value.equal(after[name]) for name, value in network.named_buffers())


def test_buffers_that_no_checkpoint_has_are_constants_and_not_copied():
    network = nn.Module()
    network.register_buffer("table", torch.zeros(1).expand(4), persistent=False)
    assert Held(network).buffers == []


def test_an_average_moves_in_a_step_that_counts_and_in_no_other():
    means, values = ([torch.randn(5), torch.randn(2, 3, dtype=torch.float64)] for _ in range(2))
    before, average = [mean.clone() for mean in means], Average(means, values, 0.1)
    average.move(BAD)
    assert all(mean.equal(old) for mean, old in zip(means, before, strict=True))
    for value in values:  # as training does, in place
        value.mul_(2)
    average.move(GOOD)
    for mean, old, value in zip(means, before, values, strict=True):
        assert mean.allclose(old.lerp(value, 0.1), rtol=1e-6)
        assert mean.grad is None
