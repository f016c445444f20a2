"""Position and rate are pure functions of (step, interventions)."""

import pytest

from mim import optim
from mim.data.order import Plan
from mim.interventions import Intervention, position_at, rate_factor_at, read

TWO = (Intervention(10, 24, 0.5), Intervention(30, 60, 0.5))


def test_without_interventions_a_step_is_a_batch():
    assert position_at(7, 6) == 42
    assert rate_factor_at(7) == 1.0


def test_positions_are_left_out_from_the_step_of_the_intervention_on():
    assert [position_at(step, 6, TWO) for step in (9, 10, 11, 29, 30)] == [54, 84, 90, 198, 264]


def test_interventions_at_one_step_add_up():
    assert position_at(10, 6, (TWO[0], TWO[0])) == 60 + 48
    assert rate_factor_at(10, (TWO[0], TWO[0])) == 0.25


def test_the_rate_of_a_run_is_lowered_from_the_step_of_the_intervention_on():
    cfg = optim.Config(batch_size=6, length="100 steps", warmup="5 steps", lr=1.0)
    plain = optim.resolve(cfg, 60)
    lowered = optim.Rates(cfg, plain.lr, plain.total_steps, plain.warmup_steps, interventions=TWO)
    for step, factor in ((9, 1.0), (10, 0.5), (29, 0.5), (30, 0.25)):
        assert lowered.at(step)[0] == plain.at(step)[0] * factor
        assert lowered.at(step)[1] == plain.at(step)[1]  # weight decay stays


def test_a_run_that_goes_on_from_any_step_reads_what_the_other_reads_there():
    """The steps after an intervention, planned from its step and from a later one."""

    def plan(step):
        return Plan(1, 6, position=position_at(step, 6, TWO), num_steps=30 - step)

    whole, later = ([micro.positions.tolist() for micro in plan(step)] for step in (10, 15))
    assert whole[5:] == later
    assert whole[0] == list(range(84, 90))


def test_interventions_survive_a_checkpoint():
    assert read([one._asdict() for one in TWO]) == TWO


def test_an_entry_with_other_fields_is_not_read():
    with pytest.raises(TypeError, match="until"):
        read([{"step": 1, "skipped": 2, "rate_factor": 0.5, "until": 3}])
