"""`mim status RUN`: how a run stands. Scripts that start it again ask `mim launch outcome` (mim/watch/requeue.py)."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(run: Path, as_json: bool) -> None:
    """Print how RUN stands: its state, step, reason and newest checkpoint, and what its log says in words.

    A run that says `running` although its launcher has ended was killed. Scripts that start a run again ask
    `mim launch outcome`.

    \b
    Examples:
      mim status runs/mae_vitb16_in1k
      mim status runs/mae_vitb16_in1k --json
    """
    found = read(run)
    click.echo(json.dumps(found, indent=1) if as_json else f"{line(found)}\n{verdict(run)}")


def read(run: Path) -> dict[str, Any]:
    """The content of status.json with the newest checkpoint's step and ages in seconds. Raises ConfigError."""
    from mim.config import ConfigError
    from mim.saving import checkpoint

    try:
        found = json.loads((run / "status.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{run} has no status.json that can be read; name the directory of a run") from error
    saved = checkpoint.list_checkpoints(run)
    newest = saved[-1].stat().st_mtime if saved else None
    return {
        **found,
        "age": round(time.time() - found["time"]),
        "checkpoint": checkpoint.step_of(saved[-1]) if saved else None,
        "checkpoint_age": None if newest is None else round(time.time() - newest),
    }


def line(found: dict[str, Any]) -> str:
    """One line for people."""
    from mim.log import clock

    saved = "no checkpoint"
    if found["checkpoint"] is not None:
        saved = f"newest checkpoint step {found['checkpoint']}, {clock(found['checkpoint_age'])} ago"
    reason = f": {found['reason']}" if found["reason"] else ""
    return f"{found['state']} at step {found['step']} of {found['of']}{reason} ({clock(found['age'])} ago); {saved}"


def verdict(run: Path) -> str:
    """The first advice about a run (mim/health/advice.py)."""
    from mim.config import ConfigError
    from mim.health.advice import advise
    from mim.log import read_log
    from mim.saving.checkpoint import read_config

    try:
        recipe = read_config(run)
    except ConfigError:  # a run that ended before it had one
        recipe = {}
    return advise(list(read_log(run / "log.jsonl")), recipe)[0].text
