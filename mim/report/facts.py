"""What stands in words on a page: the summary, what happened, in what recipes differ, and how to train it again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import yaml

from mim.report import ticks, words
from mim.report.runs import Run, number

SHOWN_EVENTS = 60
SHOWN_SAMPLES = 12
QUIET_AFTER = 3600  # seconds without a sign of life after which a running run is said to be silent


class Event(NamedTuple):
    """Something that happened to a run."""

    run: int
    step: int
    kind: str
    text: str


class Tile(NamedTuple):
    """A number that the summary shows large."""

    name: str
    value: str
    under: str


def state(run: Run, now: float) -> str:
    """How a run stands, in a sentence."""
    found = run.status.get("state")
    if not found:
        return "no status"
    age = now - (number(run.status.get("time")) or now)
    reason = f": {run.status['reason']}" if run.status.get("reason") else ""
    told = f", silent for {span(age)}" if found == "running" and age > QUIET_AFTER else ""
    return f"{found}{reason}{told}"


def tiles(run: Run) -> list[Tile]:
    """Progress, loss, the newest result of every probe, speed."""
    found = []
    if run.total:
        lines = run.events("train")
        left = number(lines[-1].get("eta_s")) if lines and run.status.get("state") == "running" else None
        under = f"{span(left)} left" if left else f"step {run.step:,} of {run.total:,}"
        found.append(Tile("progress", f"{100 * min(run.step / run.total, 1):.0f} %", under))
    for key in ("loss", "images_per_s", "data_wait"):
        values = [(v, line["step"]) for line in run.events("train") if (v := number(line.get(key))) is not None]
        if values:
            under = f"from {ticks.short(values[0][0])}" if key == "loss" else "newest"
            shown = f"{100 * values[-1][0]:.1f} %" if words.is_share(key) else ticks.short(values[-1][0])
            found.insert(1 if key == "loss" else len(found), Tile(words.title(key), shown, under))
    for name in dict.fromkeys(str(line.get("eval")) for line in run.events("eval")):
        values = [(v, line["step"]) for line in run.events("eval") if (v := number(line.get(name))) is not None]
        if values and words.is_share(name):  # an evaluation's own number has its name: knn, linear, ridge, miou
            found.append(Tile(words.title(name), f"{100 * values[-1][0]:.1f} %", f"at step {values[-1][1]:,}"))
    return found


def overview(runs: list[Run], states: list[str]) -> tuple[list[str], list[list[str]]]:
    """The tiles of several runs as a table: the names of its columns, and a row for each run."""
    mine = [{tile.name: tile.value for tile in tiles(run)} for run in runs]
    names = list(dict.fromkeys(name for one in mine for name in one if name != "progress"))
    rows = [
        [state, f"{run.step:,}", *(one.get(name, "") for name in names)]
        for run, state, one in zip(runs, states, mine, strict=True)
    ]
    return ["state", "steps", *names], rows


def about(run: Run) -> list[tuple[str, str]]:
    """Recipe, data and machine."""
    encoder, data, train, optim = (run.section(name) for name in ("encoder", "data", "train", "optim"))
    saved, experiment = run.saved, run.section("experiment")
    versions = saved.get("versions")
    order = saved.get("order") if isinstance(saved.get("order"), dict) else {}
    samples = number(order.get("num_samples")) if isinstance(order, dict) else None
    rows = [
        ("recipe", run.sections.get("recipe")),
        ("objective", run.section("objective").get("name")),
        ("encoder", encoder.get("model") or encoder.get("name")),
        ("tokenizer", run.section("tokenizer").get("name") or run.section("tokenizer").get("recipe")),
        ("data", data.get("path")),
        ("images", f"{samples:,.0f}" if samples else None),
        ("image size", data.get("image_size")),
        ("batch size", optim.get("batch_size")),
        ("length", optim.get("length")),
        ("device", saved.get("device")),
        ("processes", saved.get("ranks")),
        ("precision", {"no": "float32"}.get(str(train.get("precision")), train.get("precision"))),
        ("versions", ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else None),
        ("dataset", str(experiment.get("dataset_id") or "")[:12]),
        ("directory", run.path.resolve()),
    ]  # fmt: skip
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def events(runs: list[Run]) -> tuple[list[Event], int]:
    """What happened, newest first, and how much earlier is left out."""
    found = [event for i, run in enumerate(runs) for event in _events(i, run)]
    found.sort(key=lambda event: -event.step)
    return found[:SHOWN_EVENTS], max(len(found) - SHOWN_EVENTS, 0)


def bad_samples(run: Run) -> tuple[list[tuple[str, str, int]], int]:
    """Images that could not be decoded, (key, reason, times met), the first ones; and how many there are."""
    met: dict[tuple[str, str], int] = {}
    for entry in run.journal:
        sample = str(entry.get("key", "?")), str(entry.get("reason", ""))
        met[sample] = met.get(sample, 0) + 1
    return [(key, reason, times) for (key, reason), times in list(met.items())[:SHOWN_SAMPLES]], len(met)


def differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """The keys in which recipes differ, with the value of each run; a key that a recipe lacks has a dash."""
    flat = [dict(_flat(run.recipe)) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [(key, [one.get(key, "–") for one in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def recipe_text(run: Run) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True, default_flow_style=False)


def command(run: Run) -> str:
    """The command that trains the same from the run's own config.yaml, which holds more than a recipe."""
    more = " ".join(f"{key}=null" for key in ("format", "recipe", "experiment", "parent") if key in run.sections)
    return f"mim train {run.path / 'config.yaml'} {more} train.run={run.path.with_name(run.path.name + '-again')}"


def fingerprints(run: Run) -> list[tuple[str, str]]:
    """What tells whether another run learned the same, from the same data, with the same programs."""
    experiment, saved = run.section("experiment"), run.saved
    stream = [line["fingerprint"] for line in run.events("train") if "fingerprint" in line]
    versions = saved.get("versions")
    rows = [
        ("dataset (dataset.lock.json)", experiment.get("dataset_id")),
        ("experiment", saved.get("experiment")),
        ("tokenizer", experiment.get("tokenizer") if isinstance(experiment.get("tokenizer"), str) else None),
        ("stream at the last log step", stream[-1] if stream else None),
        ("newest checkpoint", f"step {run.checkpoints[-1]:,}" if run.checkpoints else None),
        *((f"version of {k}", v) for k, v in (versions.items() if isinstance(versions, dict) else ())),
    ]
    return [(name, str(value)) for name, value in rows if value]


def span(seconds: float) -> str:
    """A time for people: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def written(now: float) -> str:
    """The moment of a page."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))


def _events(index: int, run: Run) -> Iterator[Event]:
    others = [line for line in run.lines if line["event"] not in ("train", "eval")]
    skipped = sorted({int(line["step"]) for line in others if line["event"] == "skipped"})
    for _, group in groupby(enumerate(skipped), key=lambda pair: pair[1] - pair[0]):
        steps = [step for _, step in group]
        which = f"step {steps[0]:,}" if len(steps) == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"
        yield Event(index, steps[-1], "skipped", f"{which}: the gradient was not finite, nothing was changed")
    for line in others:
        if line["event"] not in ("skipped", "intervention"):
            yield Event(index, int(line["step"]), line["event"], _told(line))


def _told(line: dict[str, Any]) -> str:
    """An event in words; of one that nobody here knows, what its line holds."""
    kind = line["event"]
    if kind == "rollback" and "found_at" in line:
        return f"returned from step {line['found_at']}: {line.get('reason')} ({line.get('report')})"
    if kind == "resumed":
        rejected = line.get("rejected") or []
        bad = "".join(f"; rejected {r.get('checkpoint')}: {r.get('reason')}" for r in rejected if isinstance(r, dict))
        ranks = f"saved by {line.get('saved_by_ranks')} processes, now {line.get('ranks')}"
        return f"from {line.get('checkpoint')}, {ranks}{bad}"
    if kind in ("restarted", "save_failed", "failed"):
        return str(line.get("reason"))
    return ", ".join(f"{key} {value}" for key, value in line.items() if key not in ("event", "step"))[:400]


def _flat(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inside in value.items():
            yield from _flat(inside, f"{where}.{key}" if where else str(key))
    else:
        yield where, str(value)
