"""The model card of an export: README.md with the front matter that the Hugging Face hub reads.

It tells what a user of the weights must know and cannot see: data, recipe, objective, normalisation, where the weights
started and under which licence, how good they were found, and how to load them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mim.config import ConfigError
from mim.contracts import LoadedRun
from mim.saving import checkpoint

CARD = """---
{front}---

# {title}

{title} pretrained with {objective} by mimstream. {check}

## How to load it

{usage}

## What it expects

Images of {size} pixels and {channels} channels, pixels in [0, 1], normalised per channel with

    mean {mean}
    std  {std}

## Where it comes from

{origin}

## How good it was found

{metrics}
"""


def text(
    loaded: LoadedRun, report: dict[str, Any], *, library: str, tags: Sequence[str], usage: str, notes: Sequence[str]
) -> str:
    """The whole card; `report` is that of the export, `usage` and `notes` are the target's."""
    encoder, objective = loaded.encoder, loaded.config["objective"]["name"]
    classes = loaded.config["objective"].get("num_classes")
    task = "image-feature-extraction" if classes is None else "image-classification"
    front = {
        "library_name": library,
        "license": report["license"],
        "pipeline_tag": task,
        "tags": list(dict.fromkeys((*tags, task, "mimstream", objective))),
    }
    found = metrics(loaded.path, loaded.step)
    return CARD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        title=loaded.config["encoder"].get("model", loaded.config["encoder"]["name"]),
        objective=objective,
        check=f"Read back with {library}, its features differ from the run's by {report['max_difference']:.2g}.",
        usage=usage.strip(),
        size="x".join(map(str, loaded.views.sizes[0])),
        channels=encoder.channels,
        mean=[round(v, 6) for v in encoder.mean.flatten().tolist()],
        std=[round(v, 6) for v in encoder.std.flatten().tolist()],
        origin="\n".join(f"- {line}" for line in (*_origin(loaded, report), *notes)),
        metrics="\n".join(f"- {line}" for line in found) or "No evaluation is in the log of the run.",
    )


def _origin(loaded: LoadedRun, report: dict[str, Any]) -> list[str]:
    """Data, recipe, weights and licences, a line each."""
    data = loaded.config["data"]
    images = Path(str(data.get("path") or "a mixture")).name if not data.get("sources") else "a mixture of datasets"
    lines = [
        f"Data: {images}, dataset id {report['dataset_id'] or 'unknown'}.",
        f"Objective: {loaded.config['objective']['name']}; the whole recipe is in `recipe.json`.",
        f"Weights: {report['weights']}, after {report['step']} optimizer steps"
        + (f"; experiment {report['experiment'][:16]}." if report["experiment"] else "."),
    ]
    if data.get("range") is not None:
        lines.append(f"Raw values {data['range']} became the pixels 0 and 1.")
    started = report["initial_weights"]
    if started:
        names = ", which started from ".join(started)
        lines.append(f"Initial weights: {names}; their licence: {report['initial_license']}.")
    else:
        lines.append("Initial weights: none, the run started afresh.")
    return [*lines, f"Licence of these weights: {report['license']}."]


def lineage(loaded: LoadedRun) -> list[str]:
    """Where the first weights came from: the run's parents, nearest first, and the file at the end, if any."""
    found: list[str] = []
    run, parent = loaded.path, loaded.config.get("parent")
    while len(found) < 100:
        init = run / "init.json"
        if parent is None:
            if init.is_file():
                report = json.loads(init.read_text())
                found.append(f"{report['source']} ({report['family']})")
            break
        found.append(f"run {Path(parent['run']).name} at step {parent['step']}")
        run = Path(parent["run"])
        try:
            parent = checkpoint.read_config(run).get("parent")
        except ConfigError:
            found.append("weights that are not known here")  # the parent has moved: what it started from, too
            break
    return found


def metrics(run: Path, step: int) -> list[str]:
    """The last result of every evaluation in the run's log up to a step, a line each."""
    log = run / "log.jsonl"
    last: dict[str, dict[str, Any]] = {}
    for line in log.read_text().splitlines() if log.is_file() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break  # the torn last line of a killed run
        if entry["event"] == "eval" and entry["step"] <= step:
            last[entry["eval"]] = entry
    lines = []
    for name, entry in last.items():
        numbers = {k: v for k, v in entry.items() if k not in ("event", "step", "eval") and isinstance(v, int | float)}
        if numbers:
            values = ", ".join(f"{key} {value:.4g}" for key, value in numbers.items())
            lines.append(f"{name}: {values} (step {entry['step']}, the run's own held-out data)")
    return lines
