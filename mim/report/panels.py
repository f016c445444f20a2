"""The charts of a report, by section and in the order in which a reader asks: does it learn, what is it worth, how
does it run. A section without values is left out; a number that nobody here knows gets a chart all the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from mim.report import curves, words
from mim.report.charts import Chart
from mim.report.curves import Curve
from mim.report.runs import Run, number

SILENT = ("event", "step", "position", "fingerprint", "epoch", "eta_s", "num_bad", "rollback")  # of a train line
OPTIMIZER = ("lr", "weight_decay", "grad_norm", "update_ratio", "skipped")
MACHINE = ("images_per_s", "data_wait")
LEARNING = ("loss", "accuracy")
BASELINES = ("mean_patch", "copy", "unigram")  # of docs/health.md
ELSEWHERE = (
    "val_loss",
    "val_accuracy",
    "skill",
    *(f"baseline_{k}{end}" for k in BASELINES for end in ("", "_accuracy")),
)
OF_LINE = ("event", "step", "eval", "protocol", "rollback")  # of an eval line: what is no result
COLOURS = 6  # of page.css: curves that a chart can tell apart
LOG_SCALES = ("loss", "grad_norm", "lr", "update_ratio", "kl", "recon_mse", "perplexity")


@dataclass
class Section:
    """A heading, a sentence, and what stands below."""

    key: str  # anchor on the page
    title: str
    says: str
    charts: list[Chart] = field(default_factory=list)
    newest: list[Newest] = field(default_factory=list)


@dataclass
class Newest:
    """The results of one evaluation of one run: a table where few steps would make a poor chart."""

    run: int
    evaluation: str
    step: int
    rows: list[tuple[str, str, str, str]]  # name, newest value, first with its step, what it means
    details: list[tuple[str, str]]  # numbers per class or layer


def sections(runs: list[Run], letters: list[str]) -> list[Section]:
    """All sections that have anything to show; `letters` name the runs where there are several."""
    evaluations = list(dict.fromkeys(name for run in runs for name in _evaluations(run)))
    probes = [name for name in evaluations if name not in ("health", "codebook")]
    found = [
        Section("learning", "Does it learn?", "Loss, beside what learning nothing costs.", _learning(runs, letters)),
        _evaluated(runs, letters, probes, "probes", "What is it worth?", "Evaluations on held-out images."),
        _evaluated(runs, letters, ["health"], "health", "Health without labels", "On held-out images, fixed masks."),
        _evaluated(runs, letters, ["codebook"], "codebook", "Codebook", "The score card of the tokenizer's codes."),
        Section("optimizer", "Optimizer", "", [_trained(runs, letters, key) for key in OPTIMIZER]),
        Section("machine", "Machine", "", [_trained(runs, letters, key) for key in MACHINE]),
    ]  # fmt: skip
    for section in found:
        section.charts = [chart for chart in section.charts if any(len(c) or c.not_finite for c in chart.curves)]
        still = [chart for chart in section.charts if _is_constant(chart)]
        section.charts = [chart for chart in section.charts if chart not in still]
        told = [
            f"{chart.title} {chart.value(chart.curves[0].values[0])}" for chart in still if chart.curves[0].values.any()
        ]
        section.says = " ".join([section.says, f"Constant: {', '.join(told)}."] if told else [section.says]).strip()
    return [section for section in found if section.charts or section.newest]


def skills(runs: list[Run]) -> list[Curve]:
    """Skill of the training loss against the recipe's trivial loss, and what `health` logged on held-out images."""
    found = []
    for index, run in enumerate(runs):
        trivial = curves.trivial_loss(run)
        for loss in curves.logged([run], "train", "loss", "training"):
            if trivial is not None:
                found.append(replace(curves.skill(loss, trivial[1], "training"), run=index))
    return found + curves.logged(runs, "eval", "skill", "held out", evaluation="health")


def _learning(runs: list[Run], letters: list[str]) -> list[Chart]:
    loss = curves.logged(runs, "train", "loss", "training")
    steps = np.concatenate([curve.steps for curve in loss]) if loss else np.zeros(0)
    trivial = list(dict.fromkeys(found for run in runs if (found := curves.trivial_loss(run)) is not None))
    loss += _held_out(runs, "val_loss", "held out")
    accuracy = curves.logged(runs, "train", "accuracy", "training") + _held_out(runs, "val_accuracy", "held out")
    if not letters:
        loss += [c for key in BASELINES for c in _held_out(runs, f"baseline_{key}", key.replace("_", " "))]
        accuracy += [
            c for key in BASELINES for c in _held_out(runs, f"baseline_{key}_accuracy", key.replace("_", " "))
        ]  # fmt: skip
    logged = {curve.name for curve in loss}
    loss += [curves.constant(0, name, value, steps) for name, value in trivial if name not in logged]
    charts = [
        Chart("loss", words.meaning("loss"), loss, letters, may_be_log=True),
        Chart("skill", words.meaning("skill"), skills(runs), letters, percent=True, with_zero=True),
        Chart("accuracy", words.meaning("accuracy"), accuracy, letters, percent=True),
    ]
    keys = dict.fromkeys(key for run in runs for line in run.events("train")[-3:] for key in line)
    known = (*SILENT, *OPTIMIZER, *MACHINE, *LEARNING)
    return charts + [_trained(runs, letters, key) for key in keys if key not in known]


def _trained(runs: list[Run], letters: list[str], key: str) -> Chart:
    """The chart of one number of the train lines."""
    found = curves.logged(runs, "train", key, words.title(key))
    log = key in LOG_SCALES and key != "lr"
    share = words.is_share(key)
    return Chart(words.title(key), words.meaning(key), found, letters, percent=share, may_be_log=log, with_zero=share)


def _evaluated(
    runs: list[Run], letters: list[str], names: list[str], key: str, title: str, says: str
) -> Section:  # fmt: skip
    """The charts and tables of some evaluations: a chart of each number, with its variants where there is one run."""
    section = Section(key, title, says)
    for name in names:
        keys = list(
            dict.fromkeys(k for run in runs for line in run.events("eval") if line.get("eval") == name for k in line)
        )
        keys = [k for k in keys if "/" not in k and k not in OF_LINE]
        keys = [k for k in keys if not (name == "health" and k in ELSEWHERE)]
        for group in [[k] for k in keys] if letters else _alike(keys):
            found = [c for k in group for c in curves.logged(runs, "eval", k, words.title(k), evaluation=name)]
            heading, share = words.title(group[0]), words.is_share(group[0])
            chart = Chart(heading, words.meaning(group[0]), found, letters, percent=share)
            if max((len(curve) for curve in found), default=0) > 1:
                section.charts.append(chart)
        section.newest += filter(None, (_newest(i, run, name) for i, run in enumerate(runs)))
    return section


def _alike(keys: list[str]) -> list[list[str]]:
    """Variants of one number (mean, smallest, largest; several k), which share a chart, at most COLOURS of them."""
    groups: dict[tuple[str, bool], list[str]] = {}
    for key in keys:
        groups.setdefault((words.meaning(key) or key, words.is_share(key)), []).append(key)
    return [group[i : i + COLOURS] for group in groups.values() for i in range(0, len(group), COLOURS)]


def _newest(index: int, run: Run, evaluation: str) -> Newest | None:
    lines = [line for line in run.events("eval") if line.get("eval") == evaluation]
    values = {k: number(v) for k, v in lines[-1].items() if k not in OF_LINE} if lines else {}
    known = {k: v for k, v in values.items() if v is not None}
    if not known:
        return None
    shown = {k: Chart("", "", [], percent=words.is_share(k)).value for k in known}
    rows: list[tuple[str, str, str, str]] = []
    said = ""
    for key, value in known.items():
        if "/" in key:
            continue
        earlier = [(number(line.get(key)), line["step"]) for line in lines[:-1]]
        first = next((f"{shown[key](old)} at step {step:,}" for old, step in earlier if old is not None), "")
        before, said = said, words.meaning(key)
        rows.append((words.title(key), shown[key](value), first, said if said != before else ""))
    details = [(key, shown[key](value)) for key, value in known.items() if "/" in key]
    return Newest(index, evaluation, int(lines[-1]["step"]), rows, details)


def _evaluations(run: Run) -> list[str]:
    """Names of the evaluations that logged a number."""
    return [
        str(line.get("eval"))
        for line in run.events("eval")
        if any(number(v) is not None for k, v in line.items() if k not in OF_LINE)
    ]


def _held_out(runs: list[Run], key: str, name: str) -> list[Curve]:
    """A number of the evaluation `health`."""
    found = curves.logged(runs, "eval", key, name, evaluation="health")
    return [replace(curve, baseline=key.startswith("baseline_")) for curve in found]


def _is_constant(chart: Chart) -> bool:
    """Whether all values of a chart are the same one, several times: a sentence says as much."""
    values = np.concatenate([curve.values for curve in chart.curves])
    return len(values) > 1 and (values == values[0]).all() and not any(curve.not_finite for curve in chart.curves)
