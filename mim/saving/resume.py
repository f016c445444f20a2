"""Which checkpoint a run goes on from: the newest valid one, the same on every rank, and never a fresh start unnoticed.

All ranks look for themselves and compare what they see before anything is decided: a node without the shared file
system, or one whose NFS client still lists old entries, ends the launch in one sentence on all ranks instead of a hang
or of a run that mixes weights. The files of a checkpoint are hashed by the ranks together, each its share.
"""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mim import config, ranks
from mim.config import ConfigError
from mim.contracts import StorageError
from mim.log import read_log, say
from mim.saving import checkpoint

PATIENCE = 75.0  # seconds that ranks which see different things look again: NFS clients cache folders for up to 60
PAUSE = 2.5  # seconds between two looks
BEFORE_CONFIG = ("init.json",)  # what a start writes before config.yaml; names with a dot are nobody's data


@dataclass
class Found:
    """What a run directory offers to a start."""

    checkpoint: Path | None = None  # None: a fresh start
    rejected: list[dict[str, str]] = field(default_factory=list)  # newer ones: checkpoint, reason
    lost: str | None = None  # why a run that had begun starts afresh

    def account(self, state: dict[str, Any], *, ranks: int) -> dict[str, Any]:
        """What log.jsonl says of the resume: the event `resumed`, or `restarted` where there was nothing to resume."""
        if self.checkpoint is None:
            return {"event": "restarted", "reason": self.lost} if self.lost else {}
        saved_by = state.get("ranks")
        return {
            "event": "resumed",
            "checkpoint": self.checkpoint.name,
            "saved_by_ranks": saved_by,
            "ranks": ranks,
            "rejected": self.rejected,
        }


def find(run: Path, experiment: dict[str, Any], device: torch.device) -> Found:
    """The checkpoint to resume from (called on all ranks, which agree on it).

    Raises ConfigError on all ranks alike: the run is of another experiment (with a diff), its checkpoints are all
    invalid or gone, the folder holds other files, or the ranks do not see the same.
    """
    main_rank = ranks.place()[0] == 0
    view = _agreed(run, lambda: _look(run, experiment), device)
    if view["foreign"] is not None:
        raise ConfigError(
            f"train.run={run} is a folder with other files ({view['foreign']}); choose a new or empty one"
        )
    if view["config"] is None:
        return Found()
    changed = config.difference(checkpoint.read_config(run)["experiment"], experiment)
    if changed:
        raise ConfigError(
            f"{run} holds another experiment; choose another train.run, or restore what changed:\n  "
            + "\n  ".join(changed)
        )
    found = Found()
    folders = [run / "checkpoints" / name for name in view["checkpoints"]]
    found.checkpoint = checkpoint.first_valid(
        folders,
        lambda folder: verify_together(folder, device),
        report=lambda line: say(line, main=main_rank),
        rejected=found.rejected,
    )
    if found.checkpoint is not None:
        return found
    if folders:
        raise checkpoint.none_valid(run, len(folders))
    found.lost = _begun(run, device)
    if found.lost is not None:
        say(found.lost, main=main_rank)
    return found


def verify_together(folder: Path, device: torch.device) -> str | None:
    """Why a checkpoint is not valid, or None; every rank hashes its share of the files, and all get one answer."""
    try:
        reason = checkpoint.verify(folder, share=ranks.place())
    except OSError as error:
        reason = f"it cannot be read: {error.strerror}"
    return next((found for found in ranks.gather([reason], device) if found is not None), None)


def check_shared(run: Path, device: torch.device) -> None:
    """Refuse a run directory that not all ranks share, before the first step (called on all ranks).

    The main rank has written config.yaml; whoever does not see it would fail at the first save, hours later.
    """
    if ranks.place()[1] > 1:
        _agreed(run, lambda: {"config": _digest(run / "config.yaml")}, device)


def _look(run: Path, experiment: dict[str, Any]) -> dict[str, Any]:
    """What this rank sees."""
    seen = _digest(run / "config.yaml")
    others = sorted(p.name for p in run.iterdir()) if seen is None and run.is_dir() else []
    foreign = [name for name in others if not name.startswith(".") and name not in BEFORE_CONFIG]
    return {
        "config": seen,
        "foreign": foreign[0] if foreign else None,
        "checkpoints": [folder.name for folder in checkpoint.list_checkpoints(run)],
        "experiment": config.digest(experiment),
    }


def _agreed(run: Path, look: Callable[[], dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """What all ranks see; they look again for a while where they differ.

    Raises on all of them: ConfigError where they go on to differ, StorageError where none of them can read.
    """
    deadline, told = time.monotonic() + PATIENCE, False
    while True:
        rank, _ = ranks.place()
        late = time.monotonic() > deadline
        try:
            seen = look()
        except OSError as error:  # told to the others, who would wait for this rank otherwise
            seen = {"problem": f"cannot read {error.filename}: {error.strerror}"}
        views = ranks.gather([{"rank": rank, "host": socket.gethostname(), "late": late, "view": seen}], device)
        first, *others = views
        odd = next((view for view in others if view["view"] != first["view"]), None)
        if odd is None and "problem" not in first["view"]:
            return first["view"]
        if odd is None and first["late"]:
            raise StorageError(
                f"train.run={run}: {first['view']['problem']}; check its permissions and its file system"
            )
        if odd is not None and any(view["late"] for view in views):
            raise ConfigError(_difference(run, first, odd))
        if not told:
            say(f"not all ranks see the same in {run}; looking again for {PATIENCE:.0f} s", main=rank == 0)
            told = True
        time.sleep(PAUSE)


def _difference(run: Path, first: dict[str, Any], odd: dict[str, Any]) -> str:
    """The sentence on two ranks that see different things."""
    mine, theirs = first["view"], odd["view"]
    key = next(key for key in mine if mine[key] != theirs.get(key))
    who = f"rank {odd['rank']} on {odd['host']}", f"rank {first['rank']} on {first['host']}"
    for name, seen in zip(who, (theirs, mine), strict=True):
        if "problem" in seen:
            return f"{name} {seen['problem']}, other ranks can; train.run must be on a file system that all nodes share"
    if key == "experiment":
        return f"{who[0]} has other data, code or weights than {who[1]}; give all nodes the same and start again"
    if key == "checkpoints":
        here = [", ".join(str(checkpoint.step_of(Path(n))) for n in v["checkpoints"]) or "none" for v in (theirs, mine)]
        what = f"sees checkpoints of steps {here[0]}, {who[1]} sees {here[1]}"
    else:
        what = f"does not see the same files as {who[1]}"
    return (
        f"{who[0]} {what} in {run}; train.run must be on a file system that all nodes share (on NFS, wait a minute and "
        f"start again)"
    )


def _begun(run: Path, device: torch.device) -> str | None:
    """What to say of a run that has no checkpoint: None where nothing had begun. The main rank's answer counts.

    Raises ConfigError on all ranks where checkpoints must have been there.
    """
    refusal, lost = None, None
    if ranks.place()[0] == 0:
        entries = list(read_log(run / "log.jsonl"))
        saved = max((entry["step"] for entry in entries if entry["event"] == "resumed"), default=0)
        saved = max(saved, _saved_step(run))
        last = max((entry["step"] for entry in entries), default=0)
        if saved:
            refusal = (
                f"{run} was saved at step {saved}, but none of its checkpoints is there any more; restore "
                f"{run / 'checkpoints'}, or choose another train.run to start afresh"
            )
        elif last:
            lost = f"{run} had come to step {last}, but had not saved a checkpoint yet: it starts afresh at step 0"
    told = ranks.gather([refusal, lost] if ranks.place()[0] == 0 else [], device)
    if told[0] is not None:
        raise ConfigError(told[0])
    return told[1]


def _saved_step(run: Path) -> int:
    """The newest step that was saved, as status.json says; 0 if it does not say so."""
    try:
        return int(json.loads((run / "status.json").read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _digest(file: Path) -> str | None:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None
