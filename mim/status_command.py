"""`mim status RUN`: how a run stands, for people and for the scripts that start it again."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--exit-code", is_flag=True, help="Exit with the run's own code; 70 while it says that it runs.")
@click.option("--since", type=float, help="Seconds since 1970: a status that is older counts as failed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(run: Path, exit_code: bool, since: float | None, as_json: bool) -> None:
    """Print how RUN stands: its state, step, reason and newest checkpoint.

    With --exit-code the command ends as `mim train` did: 0 done, 75 stopped and resumable, 65 data, 74 storage,
    2 configuration, 70 any other failure. Launchers hide those codes. A run that still says `running` when its
    launcher has ended was killed: 70.

    \b
    Examples:
      mim status runs/mae_vitb16_in1k
      began=$(date +%s); torchrun -m mim train ...; mim status RUN --exit-code --since $began
    """
    found = read(run)
    if since is not None and found["time"] < since:
        reason = f"the last start wrote no status; before it: {found['state']}"
        found |= {"state": "failed", "reason": reason, "exit_code": 70}
    click.echo(json.dumps(found, indent=1) if as_json else line(found))
    if exit_code:
        sys.exit(70 if found["exit_code"] is None else found["exit_code"])


def read(run: Path) -> dict[str, Any]:
    """The content of status.json with the newest checkpoint's step and ages in seconds. Raises ConfigError."""
    from mim import checkpoint
    from mim.config import ConfigError

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
