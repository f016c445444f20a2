"""What the log of a run says in words: how it goes, what is wrong with it, and whether to stop.

Every rule is stated in docs/health.md with its numbers. A rule speaks when its fault is larger than the noise of the
curve explains, and says nothing otherwise: slopes come with standard errors (mim/health/trends.py), levels are medians.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from mim.health.curves import Curve, Curves, Line
from mim.health.trends import NORMAL, Trend, trend

SEVERITIES = ("bad", "warning", "note", "good")
ENOUGH = 8  # points of a curve before anything is said about its course
SURE = 3.0  # standard errors
SPIKE, SHARE = 8.0, 0.05  # of a loss: above the noise, and above what has been learned
STARTS = 25  # places where a plateau is looked for
FALL = 4.0  # of RankMe from its highest value


@dataclass(frozen=True)
class Advice:
    """One sentence about a run. `rule` is its name in docs/health.md."""

    rule: str
    severity: str  # one of SEVERITIES
    text: str


def advise(lines: list[Line], recipe: dict[str, Any]) -> list[Advice]:
    """What the lines of log.jsonl say about a run of a resolved recipe; the worst first, and never nothing.

    Lines of unknown events or without the numbers that a rule reads are passed over.
    """
    curves = Curves(lines, recipe)
    found = [advice for rule in FAULTS for advice in rule(curves)]
    if len(curves.trained("loss")) < ENOUGH:
        found.append(Advice("too_early", "note", f"{len(curves.train)} log lines are too few to judge the course"))
    elif not any(advice.severity == "bad" for advice in found):
        found += outlook(curves)
        if all(advice.severity in ("note", "good") for advice in found):
            found.append(Advice("healthy", "good", f"healthy: nothing is wrong up to step {curves.last_step}"))
    return sorted(found, key=lambda advice: SEVERITIES.index(advice.severity))


# ---- faults ----------------------------------------------------------------------------------------------------------


def divergence(curves: Curves) -> list[Advice]:
    """The loss is no number, or has gone up again by a quarter of what had been learned."""
    for line in curves.train:
        if isinstance(line.get("loss"), float) and not math.isfinite(line["loss"]):
            return [Advice("divergence", "bad", f"divergence: the loss is {line['loss']} at step {line['step']}")]
    loss = curves.trained("loss")
    if len(loss) < ENOUGH:
        return []
    levels = [statistics.median(loss.values[max(i - 2, 0) : i + 1]) for i in range(2, len(loss))]
    best = min(range(len(levels)), key=levels.__getitem__)
    risen = levels[-1] - levels[best]
    if len(levels) - best < 3 or risen <= max(0.25 * (loss.values[0] - levels[best]), SPIKE * noise(loss)):
        return []
    text = f"divergence: the loss rose from {levels[best]:.4g} at step {loss.steps[best + 2]} to {levels[-1]:.4g}"
    return [Advice("divergence", "bad", f"{text}; go back to a checkpoint before that with a lower optim.lr")]


def too_high_rate(curves: Curves) -> list[Advice]:
    """Spikes of the loss, or skipped steps, after the warm-up."""
    loss = curves.trained("loss").since(curves.warmup)
    if len(loss) < ENOUGH:
        return []
    limit = max(SPIKE * noise(loss), SHARE * (max(loss.values) - min(loss.values)))
    spikes = [
        loss.steps[i]
        for i in range(3, len(loss))
        if loss.values[i] - statistics.median(loss.values[max(i - 8, 0) : i]) > limit
    ]
    apart = [
        step for i, step in enumerate(spikes) if i == 0 or loss.steps.index(step) - loss.steps.index(spikes[i - 1]) > 1
    ]
    skipped = curves.trained("skipped").since(curves.warmup)
    share = statistics.fmean(skipped.values[-len(skipped) // 2 :]) if len(skipped) else 0.0
    scaled = (curves.recipe.get("train") or {}).get("precision") == "fp16"  # its scaler skips steps by design
    signs = []
    if len(apart) >= 3:
        signs.append(f"{len(apart)} spikes of the loss, the last at step {apart[-1]}")
    if share > (0.05 if scaled else 0.01):
        signs.append(f"{share:.1%} of the steps skipped")
    if not signs:
        return []
    return [Advice("too_high_rate", "bad", f"the learning rate is too high: {' and '.join(signs)}; halve optim.lr")]


def rollbacks(curves: Curves) -> list[Advice]:
    """The guard had to return to a checkpoint."""
    told = [line for line in curves.lines if line.get("event") == "rollback"]
    if not told:
        return []
    times = "once" if len(told) == 1 else f"{len(told)} times"
    reason = f": {told[-1]['reason']}" if told[-1].get("reason") else ""
    return [Advice("rollbacks", "warning", f"the run returned to an earlier checkpoint {times}{reason}")]


def collapse(curves: Curves) -> list[Advice]:
    """Features use a small part of the directions that they used before, or are all alike."""
    rank = curves.evaluated("health", "rankme")
    if len(rank) >= 2 and rank.values[-1] * FALL < (highest := max(rank.values)):
        at = rank.steps[rank.values.index(highest)]
        text = f"collapse: RankMe fell from {highest:.0f} at step {at} to {rank.values[-1]:.0f}"
        return [Advice("collapse", "bad", f"{text}; the features lose their directions")]
    uniformity = curves.evaluated("health", "uniformity")
    spread = curves.evaluated("health", "feature_std")
    if len(spread) >= 2 and spread.values[-1] < 0.02 * max(spread.values) and uniformity.values[-1:] > [-0.02]:
        return [Advice("collapse", "bad", "collapse: the features of all images are alike (uniformity near 0)")]
    return []


def codebook(curves: Curves) -> list[Advice]:
    """The codes of a tokenizer that is trained fall out of use."""
    if (curves.recipe.get("objective") or {}).get("name") != "tokenize":
        return []
    for name, unit in (("perplexity", ".0f"), ("usage", ".0%")):
        curve = curves.trained(name)
        if len(curve) < ENOUGH:
            continue
        now, highest = statistics.median(curve.values[-3:]), max(curve.values)
        if now < 0.4 * highest:
            text = f"codebook dying: {name} fell from {highest:{unit}} to {now:{unit}}"
            return [Advice("codebook", "bad", f"{text}; lower the rate, or revive unused codes")]
        if name == "usage" and now < 0.1:
            return [Advice("codebook", "warning", f"only {now:.1%} of the codes are in use")]
    return []


def data_bound(curves: Curves) -> list[Advice]:
    """The device waits for images."""
    waits = curves.trained("data_wait").values[-10:]
    share = statistics.median(waits) if len(waits) >= 3 else 0.0
    if share < 0.1:
        return []
    if (curves.recipe.get("train") or {}).get("workers") == 0 and share < 0.5:
        text = f"{share:.0%} of the time goes by making images between the steps, as train.workers=0 asks for"
        return [Advice("data_bound", "note", f"{text}; with loader processes it would be less")]
    faster = f"up to {1 / (1 - share):.1f} times as fast" if share < 0.99 else "many times as fast"
    text = f"data-bound: {share:.0%} of the time goes by waiting for images; without it the run would be {faster}"
    return [Advice("data_bound", "warning", f"{text} (mim bench data says what to change)")]


def overfitting(curves: Curves) -> list[Advice]:
    """The held-out loss rises while that of training falls."""
    held_out, loss = curves.evaluated("health", "val_loss"), curves.trained("loss")
    if len(held_out) < ENOUGH:
        return []
    best = min(range(len(held_out)), key=held_out.values.__getitem__)
    rest, trained = held_out.part(best), loss.since(held_out.steps[best])
    if len(rest) < 5 or len(trained) < 5:
        return []
    up = trend(rest.steps, rest.values)
    learned = held_out.values[0] - held_out.values[best]
    if not up.rises(SURE) or up.change < SHARE * learned or not trend(trained.steps, trained.values).falls(SURE):
        return []
    text = f"overfitting: the held-out loss rises since step {rest.steps[0]}, from {rest.values[0]:.4g} to"
    text = f"{text} {rest.values[-1]:.4g}, while the training loss falls"
    return [Advice("overfitting", "warning", f"{text}; use more images or stop there")]


def no_skill(curves: Curves) -> list[Advice]:
    """After the warm-up the network predicts hardly better than a constant or a copy."""
    skill = curves.evaluated("health", "skill").since(2 * curves.warmup)
    if len(skill) < 2 or statistics.median(skill.values[-3:]) > 0.03:
        return []
    text = f"nearly no better than a trivial prediction at step {skill.steps[-1]}: skill {skill.values[-1]:.3f}"
    return [Advice("no_skill", "warning", f"{text}; look at the data, the rate and the mask ratio")]


def dead_neurons(curves: Curves) -> list[Advice]:
    """Many hidden units never fire."""
    dead = curves.evaluated("health", "dead_neurons")
    if not len(dead) or dead.values[-1] < 0.3:
        return []
    return [Advice("dead_neurons", "warning", f"{dead.values[-1]:.0%} of the hidden units fire in no held-out image")]


FAULTS = (
    divergence,
    too_high_rate,
    rollbacks,
    collapse,
    codebook,
    data_bound,
    overfitting,
    no_skill,
    dead_neurons,
)


# ---- outlook ---------------------------------------------------------------------------------------------------------


def outlook(curves: Curves) -> list[Advice]:
    """Whether the run still gains, by every probe and by its loss, and whether to stop."""
    held_out = curves.evaluated("health", "val_loss")
    loss = held_out if len(held_out) >= ENOUGH else curves.trained("loss")
    told = "held-out loss" if loss is held_out else "training loss"
    courses = [course(curves, name, curve, 100.0, f"{name} points") for name, curve in curves.probes.items()]
    courses.append(course(curves, told, loss, -1.0, told))
    found = [advice for advice in courses if advice is not None]
    flat = [advice for advice in found if advice.rule == "plateau"]
    total = curves.duration("length")
    if not flat or len(flat) < len(found) or (total is not None and curves.last_step >= total):
        return found
    falling = (curves.recipe.get("optim") or {}).get("schedule", "cosine") != "constant"
    if total is not None and falling:
        text = f"do not stop for it: the learning rate still falls until step {total}, and the last part mostly gains"
    else:
        text = "nothing gains any more: stop here, or let the learning rate fall to its end"
    return [*found, Advice("stop", "note", text)]


def course(curves: Curves, name: str, curve: Curve, scale: float, unit: str) -> Advice | None:
    """`still_gaining` or `plateau` of one curve, of which `scale` makes what is to grow; None where noise hides it."""
    after = curve.since(curves.warmup)
    if len(after) < ENOUGH:
        return None
    gains = Curve(after.steps, [scale * value for value in after.values])
    recent = of(gains.part(len(gains) // 2))
    learned = max(scale * value for value in curve.values) - scale * curve.values[0]
    if recent.rises(SURE) and recent.change > 0.02 * learned:
        steps, per = further(curves.steps_per_day, recent.span)
        moves = math.copysign(steps, scale) * recent.slope  # of the number as it is told: a loss goes down
        rate = f"{moves:+.2g} +- {2 * steps * recent.error:.1g} {unit} per {per}"
        return Advice("still_gaining", "good", f"still gaining: about {rate} at this rate")
    if recent.change + 2 * recent.change_error > 0.1 * learned:
        return None
    starts = range(0, len(gains) - ENOUGH + 1, -(-len(gains) // STARTS))
    start = next((i for i in starts if _is_flat(gains.part(i), learned)), len(gains) - ENOUGH)
    bound = max(recent.change + 2 * recent.change_error, 0.0)
    text = f"plateau: {name} gains nothing that stands out since step {gains.steps[start]}"
    return Advice("plateau", "note", f"{text} (at most {bound:.2g} over the last {recent.span:.0f} steps)")


def further(steps_per_day: float | None, span: float) -> tuple[float, str]:
    """The unit that a gain is told in, in steps and by name: no more than four times what was looked at."""
    for share, name in ((1.0, "further day"), (1 / 24, "further hour")):
        if steps_per_day is not None and 4 * span >= share * steps_per_day:
            return share * steps_per_day, name
    return 1000.0, "1000 steps"


def _is_flat(gains: Curve, learned: float) -> bool:
    """Whether the rest of a curve is no better than its first points, by more than noise."""
    first, rest = gains.values[: ENOUGH // 2], gains.values[ENOUGH // 2 :]
    uncertain = SURE * noise(gains) * math.sqrt(1 / len(first) + 1 / len(rest))
    return statistics.median(rest) - statistics.median(first) < max(0.02 * learned, uncertain)


def of(curve: Curve) -> Trend:
    return trend(curve.steps, curve.values)


def noise(curve: Curve) -> float:
    """Standard deviation of a point of a curve, from its second differences, which a slope does not enter."""
    y = curve.values
    bends = [y[i + 1] - 2 * y[i] + y[i - 1] for i in range(1, len(y) - 1)]
    return NORMAL * statistics.median(abs(bend) for bend in bends) / math.sqrt(6)
