"""Whether a job that has ended is to be started again: what launch scripts ask (mim/clusters/slurm.py).

torchrun and accelerate launch turn every exit code into 1, so the run directory is read: status.json tells how the run
ended, the names of its checkpoints how far it came. A run that came no further than at its last start is not started
again: what stopped it would stop it for ever.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

DONE, AGAIN, INTERNAL = 0, 75, 70  # exit codes
FINAL = (2, 65, 74)  # configuration, data, storage: the same command would end the same way


class Outcome(NamedTuple):
    """What became of a run: an exit code (75: start it again) and one sentence."""

    code: int
    sentence: str


def saved_step(run: Path) -> int:
    """Step of the newest committed checkpoint of a run; 0 without one."""
    folders = (run / "checkpoints").glob("step-*") if run.is_dir() else ()
    committed = [f.name for f in folders if re.fullmatch(r"step-\d{8,}", f.name) and (f / "manifest.json").is_file()]
    return max((int(name.removeprefix("step-")) for name in committed), default=0)


def outcome(run: Path, since: int) -> Outcome:
    """How a run ended that was saved at step `since` when it was last started."""
    try:
        status = json.loads((run / "status.json").read_text())
    except (OSError, ValueError):
        return Outcome(INTERNAL, f"{run} holds no readable status.json: the training never began; see the logs")
    step, state = saved_step(run), status.get("state")
    if state == "done":
        return Outcome(DONE, f"{run} is done: {status.get('of')} steps")
    reason = f" ({status['reason']})" if status.get("reason") else ""
    if state == "failed" and status.get("exit_code") in FINAL:
        return Outcome(status["exit_code"], f"{run} failed{reason}; it is not started again before that is mended")
    how = {"stopped": "stopped", "failed": "failed"}.get(str(state), "ended without a word")
    if step <= since:
        return Outcome(
            INTERNAL,
            f"{run} {how}{reason} and is saved at step {step} as when it was started: it is not started again before "
            f"that is understood",
        )
    return Outcome(
        AGAIN, f"{run} {how}{reason}; it is saved at step {step} of {status.get('of')} and goes on from there"
    )
