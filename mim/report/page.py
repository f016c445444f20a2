"""Everything on one page: an HTML file that loads nothing, works without JavaScript, and runs no other than its own.

Text of files is escaped by the template. The policy in the page allows the one script by its hash and images within the
page; a live page may ask its own server for a newer one.
"""

from __future__ import annotations

import base64
import hashlib
import string
import time
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from mim.health.advice import Advice, advise
from mim.report import facts, panels, pictures, words
from mim.report.charts import Table
from mim.report.runs import Run, read

MARK = "<!-- mimstream report -->"  # in the first line: a file that may be written over


def page(paths: list[Path], *, live: bool = False, now: float | None = None) -> str:
    """The report of one run, or of several beside each other. Raises ConfigError for a folder that is no run."""
    now = time.time() if now is None else now
    runs = [read(path) for path in paths]
    letters = list(string.ascii_uppercase[: len(runs)]) if len(runs) > 1 else []
    happened, earlier = facts.events(runs)
    text = _template().render(
        mark=MARK,
        runs=runs,
        letters=letters,
        live=live,
        written=facts.written(now),
        state=[facts.state(run, now) for run in runs],
        advice=[_advice(run) for run in runs],
        sections=panels.sections(runs, letters),
        strips=pictures.strips(runs),
        events=happened,
        earlier=earlier,
        differences=facts.differences(runs) if letters else [],
        facts=facts,
        words=words,
        table=Table.of,
        css=_asset("page.css"),
        script=_asset("page.js"),
        hash=base64.b64encode(hashlib.sha256(_asset("page.js").encode()).digest()).decode(),
    )
    return str(text)


def _advice(run: Run) -> list[Advice]:
    """What to think of a run; lines that no rule can read lead to a sentence instead."""
    try:
        return advise(run.lines, run.recipe)
    except Exception as error:  # of any line that another version or a damage left
        return [Advice("advice", "note", f"No advice: the log holds what the rules cannot read ({error!r}).")]


@cache
def _template() -> Template:
    loader = PackageLoader("mim.report", ".")
    return Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template("page.html.j2")


@cache
def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text()
