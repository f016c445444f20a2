"""Advice names the fault that a curve was given, whatever the noise, and finds none in a curve that has none."""

import json
from pathlib import Path

import numpy as np
import pytest

from mim.health.advice import SEVERITIES, advise

RECORDED = Path(__file__).parent / "recorded"
RECIPE = {
    "objective": {"name": "mae"},
    "optim": {"batch_size": 256, "length": "400 epochs", "warmup": "5 epochs", "schedule": "cosine"},
}
SEEDS = range(3)
NOISES = (0.002, 0.01, 0.03)  # standard deviation of a logged loss whose fall is about 0.5


def log(seed, noise, *, num=200, every=50, loss=None, val=None, knn=None, **train):
    """The lines of a run: losses and probes as functions of the fraction of the run, with noise."""
    rng = np.random.default_rng(seed)
    loss = loss or (lambda t: 0.4 + 0.5 / (1 + 40 * t))
    lines = []
    for i in range(1, num + 1):
        step, t = i * every, i / num
        values = {name: value(t, rng) if callable(value) else value for name, value in train.items()}
        lines.append({
            "event": "train", "step": step, "loss": loss(t) + noise * rng.standard_normal(), "grad_norm": 0.5,
            "skipped": 0.0, "images_per_s": 1000.0 * (1 + 0.05 * rng.standard_normal()), "data_wait": 0.01,
            "epoch": step * 256 / 50000, "position": step * 256, **values,
        })  # fmt: skip
        if i % 10 == 0:
            if val:
                held_out = {name: float(value(t) + noise / 3 * rng.standard_normal()) for name, value in val.items()}
                lines.append({"event": "eval", "step": step, "eval": "health", **held_out})
            if knn:
                lines.append({"event": "eval", "step": step, "eval": "knn",
                              "knn": float(knn(t) + noise / 10 * rng.standard_normal())})  # fmt: skip
    return lines


def rules(lines, recipe=RECIPE):
    return {advice.rule: advice for advice in advise(lines, recipe)}


def alarms(lines, recipe=RECIPE):
    return {advice.rule for advice in advise(lines, recipe) if advice.severity in ("bad", "warning")}


def healthy_val(t):
    return 0.42 + 0.5 / (1 + 40 * t)


def rank(t):
    return 180 * (0.3 + 0.7 * min(3 * t, 1))


FAULTY = {
    "divergence": {"loss": lambda t: 0.4 + 0.5 / (1 + 40 * t) + (2 * (t - 0.7) if t > 0.7 else 0)},
    "collapse": {"val": {"rankme": lambda t: rank(t) if t < 0.6 else max(180 * (1 - 4 * (t - 0.6)), 9)}},
    "data_bound": {"data_wait": lambda t, rng: 0.35 + 0.05 * rng.standard_normal()},
    "overfitting": {
        "val": {"val_loss": lambda t: healthy_val(t) + (0.3 * (t - 0.4) if t > 0.4 else 0)},
        "loss": lambda t: 0.4 + 0.5 / (1 + 40 * t) - 0.1 * t,
    },
    "no_skill": {"val": {"skill": lambda t: 0.005}},
    "dead_neurons": {"val": {"dead_neurons": lambda t: min(t, 0.6)}},
}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("fault", FAULTY)
def test_a_planted_fault_is_named_and_no_other(fault, noise):
    for seed in SEEDS:
        assert alarms(log(seed, noise, **FAULTY[fault])) == {fault}, seed


@pytest.mark.parametrize("noise", NOISES)
def test_spikes_are_of_a_rate_that_is_too_high(noise):
    for seed in SEEDS:
        lines = log(seed, noise)
        for number in (90, 120, 121, 155, 180):
            lines[number]["loss"] += 0.6
        assert set(alarms(lines)) == {"too_high_rate"}
        assert "4 spikes" in rules(lines)["too_high_rate"].text


def test_skipped_steps_are_of_a_rate_that_is_too_high_but_not_of_the_search_for_a_scale():
    lines = log(0, 0.01, skipped=lambda t, rng: 0.03)
    assert alarms(lines) == {"too_high_rate"}
    assert alarms(lines, {**RECIPE, "train": {"precision": "fp16"}}) == set()


@pytest.mark.parametrize("noise", NOISES)
def test_a_codebook_that_dies_is_named(noise):
    recipe = {**RECIPE, "objective": {"name": "tokenize"}}
    for seed in SEEDS:
        dying = log(
            seed, noise, perplexity=lambda t, rng: 20 + 380 * min(8 * t, 1) * (1 if t < 0.5 else 2 * (1 - t)) ** 2
        )
        assert alarms(dying, recipe) == {"codebook"}
        alive = log(seed, noise, perplexity=lambda t, rng: 380 * min(8 * t, 1) * (1 + 0.05 * rng.standard_normal()))
        assert alarms(alive, recipe) == set()


@pytest.mark.parametrize("noise", NOISES)
def test_a_healthy_run_raises_no_alarm(noise):
    val = {"val_loss": healthy_val, "rankme": rank, "skill": lambda t: 0.5, "dead_neurons": lambda t: 0.01}
    for seed in range(8):
        lines = log(seed, noise, val=val, knn=lambda t: 0.3 + 0.1 * t)
        assert alarms(lines) == set(), seed
        assert {"healthy", "still_gaining"} <= rules(lines).keys()


@pytest.mark.parametrize("noise", NOISES)
def test_a_plateau_is_told_with_the_step_that_it_began_at(noise):
    """Everything is learned in the first three tenths: the plateau begins at about step 3000 of 10000."""
    for seed in SEEDS:
        lines = log(seed, noise, loss=lambda t: 0.9 - 0.5 * min(t / 0.3, 1))
        found = rules(lines)
        assert "plateau" in found, seed
        assert "still_gaining" not in found
        begins = int(found["plateau"].text.split("since step ")[1].split()[0])
        assert 2000 <= begins <= 5000, found["plateau"]


def test_a_plateau_under_a_falling_rate_is_no_reason_to_stop_and_under_a_constant_one_is():
    lines = log(0, 0.01, loss=lambda t: 0.9 - 0.5 * min(t / 0.3, 1))
    assert rules(lines)["stop"].text.startswith("do not stop")
    constant = {**RECIPE, "optim": {**RECIPE["optim"], "schedule": "constant"}}
    assert "stop here" in rules(lines, constant)["stop"].text


@pytest.mark.parametrize(
    ("speed", "gain", "unit"),
    [(20, 6.75, "knn points per further day"), (1000, 14.06, "knn points per further hour"),
     (100000, 1.0, "knn points per 1000 steps")],
)  # fmt: skip
def test_a_gain_is_told_in_a_unit_of_time_that_the_run_has_seen(speed, gain, unit):
    """kNN rises by 10 points in 10,000 steps of 256 images."""
    lines = log(0, 0.002, knn=lambda t: 0.3 + 0.1 * t, images_per_s=speed)
    (told,) = [advice.text for advice in advise(lines, RECIPE) if "knn points" in advice.text]
    assert unit in told
    assert float(told.split("about ")[1].split()[0]) == pytest.approx(gain, rel=0.1)


def test_a_loss_that_gains_is_told_as_going_down():
    lines = log(0, 0.002, loss=lambda t: 0.9 - 0.4 * t)
    (told,) = [advice.text for advice in advise(lines, RECIPE) if advice.rule == "still_gaining"]
    assert told.startswith("still gaining: about -")
    assert "training loss per" in told


def test_images_that_are_made_between_the_steps_on_purpose_are_no_alarm_but_half_of_the_time_is():
    in_the_loop = {**RECIPE, "train": {"workers": 0}}
    quarter, half = log(0, 0.01, data_wait=0.25), log(0, 0.01, data_wait=0.5)
    assert rules(quarter, in_the_loop)["data_bound"].severity == "note"
    assert rules(quarter)["data_bound"].severity == rules(half, in_the_loop)["data_bound"].severity == "warning"


def test_a_loss_that_is_no_number_is_divergence_at_its_step():
    lines = log(0, 0.01)
    lines[50]["loss"] = float("nan")
    assert "step 2550" in rules(lines)["divergence"].text


def test_rollbacks_are_counted_with_their_last_reason():
    lines = [*log(0, 0.01), {"event": "rollback", "step": 3000, "rollback": 1, "reason": "the loss is 9"}]
    assert "once: the loss is 9" in rules(lines)["rollbacks"].text


@pytest.mark.parametrize("lines", [[], log(0, 0.01)[:5], [{"event": "train", "step": 1}], [{"event": "?", "step": 2}]])
def test_few_lines_are_no_verdict(lines):
    (found,) = advise(lines, {})
    assert (found.rule, found.severity) == ("too_early", "note")


def test_the_worst_comes_first():
    lines = log(0, 0.01, **FAULTY["collapse"], **FAULTY["data_bound"])
    order = [SEVERITIES.index(advice.severity) for advice in advise(lines, RECIPE)]
    assert order == sorted(order)
    assert len(set(order)) > 1


# ---- recorded runs -----------------------------------------------------------------------------------


def recorded(name):
    return [json.loads(line) for line in (RECORDED / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", sorted(path.stem for path in RECORDED.glob("*.jsonl")))
def test_recorded_runs_that_went_well_raise_no_alarm(name):
    objective = "tokenize" if name.startswith("dvae") else name.split("_")[0]
    optim = {"batch_size": 64, "length": "3000 steps", "warmup": "120 steps", "schedule": "cosine"}
    assert alarms(recorded(name), {"objective": {"name": objective}, "optim": optim}) == set()


def test_faults_planted_into_a_recorded_run_are_named():
    recipe = {"objective": {"name": "tokenize"}, "optim": {"batch_size": 64, "warmup": "120 steps"}}
    slow, dying, broken = (recorded("dvae_cifar10_2400") for _ in range(3))
    for number, (one, two, three) in enumerate(zip(slow, dying, broken, strict=True)):
        if one["event"] == "train":
            one["data_wait"] += 0.3
            two["perplexity"] *= max(1 - number / 48, 0.02)
            three["loss"] += 3.0 * max(number / 48 - 0.7, 0)
    assert alarms(slow, recipe) == {"data_bound"}
    assert alarms(dying, recipe) == {"codebook"}
    assert alarms(broken, recipe) == {"divergence"}
