"""A run directory as plain data. Files may be half-written, damaged, foreign or missing: that is said, never raised."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mim.config import ConfigError
from mim.saving.checkpoint import list_checkpoints, step_of

FILES = ("config.yaml", "log.jsonl", "status.json")  # one of them makes a folder a run
PICTURE = re.compile(r"(?P<name>.+)-(?P<step>\d{8,})\.(png|gif)")  # mim/looking.py
LARGEST_STEP = 2**53  # beyond which a float no longer counts


@dataclass
class Run:
    """What a run directory holds. `lines` and `journal` keep the order of their files."""

    path: Path
    name: str
    sections: dict[str, Any] = field(default_factory=dict)  # config.yaml
    lines: list[dict[str, Any]] = field(default_factory=list)  # log.jsonl
    journal: list[dict[str, Any]] = field(default_factory=list)  # journal.jsonl: bad samples
    status: dict[str, Any] = field(default_factory=dict)  # status.json
    saved: dict[str, Any] = field(default_factory=dict)  # state.json of the newest checkpoint
    card: dict[str, Any] = field(default_factory=dict)  # score card of the tokenizer that it trains
    checkpoints: list[int] = field(default_factory=list)  # steps
    pictures: dict[str, list[tuple[int, Path]]] = field(default_factory=dict)  # by name, oldest first
    unread: list[str] = field(default_factory=list)  # what could not be read, one sentence each

    def events(self, event: str) -> list[dict[str, Any]]:
        """The lines of a kind."""
        return [line for line in self.lines if line["event"] == event]

    def section(self, name: str) -> dict[str, Any]:
        """A section of its recipe; empty where there is none."""
        found = self.sections.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe: what a run directory adds to it is left out."""
        return {k: v for k, v in self.sections.items() if k not in ("format", "recipe", "experiment", "parent")}

    @property
    def step(self) -> int:
        """The last step that anything tells of."""
        told = [int(line["step"]) for line in self.lines[-1:]] + self.checkpoints[-1:]
        return max([*told, int(number(self.status.get("step")) or 0)])

    @property
    def total(self) -> int | None:
        """Steps of the whole run."""
        total = number(self.status.get("of"))
        return int(total) if total else None


def read(path: Path) -> Run:
    """Read a run directory. Raises ConfigError for a folder that is none."""
    if not any((path / name).is_file() for name in FILES):
        raise ConfigError(
            f"{path} is not a run directory: it holds none of {', '.join(FILES)}; name the folder of a run"
        )
    run = Run(path, path.resolve().name)
    run.sections = _mapping(run, "config.yaml", yaml.safe_load)
    run.status = _mapping(run, "status.json", json.loads)
    run.lines = list(_lines(run, "log.jsonl", needs=("step", "event")))
    run.journal = list(_lines(run, "journal.jsonl", needs=("step",)))
    run.pictures = _pictures(path / "pictures")
    for folder in list_checkpoints(path):
        run.checkpoints.append(step_of(folder))
    if run.checkpoints:
        newest = f"checkpoints/{list_checkpoints(path)[-1].name}"
        run.saved = _mapping(run, f"{newest}/state.json", json.loads)
        if (path / newest / "tokenizer.json").is_file():
            card = _mapping(run, f"{newest}/tokenizer.json", json.loads).get("card")
            run.card = card if isinstance(card, dict) else {}
    return run


def number(value: Any) -> float | None:
    """A value as a number, which may be infinite or no number at all; None where it is something else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _mapping(run: Run, name: str, parse: Any) -> dict[str, Any]:
    """A file that holds one mapping; {} with a sentence where it does not."""
    try:
        found = parse((run.path / name).read_text())
    except FileNotFoundError:
        run.unread.append(f"{name} is missing.")
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        run.unread.append(f"{name} cannot be read: {' '.join(str(error).split())[:200]}.")
        return {}
    if not isinstance(found, dict):
        run.unread.append(f"{name} holds no mapping.")
        return {}
    return found


def _lines(run: Run, name: str, *, needs: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The readable entries of a log; how many lines were not is said. A log that is not there is an empty one."""
    try:
        text = (run.path / name).read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return
    except OSError as error:
        run.unread.append(f"{name} cannot be read: {error.strerror}.")
        return
    unreadable = []
    for row, line in enumerate(text.split("\n"), start=1):
        if not line:
            continue
        try:
            entry = json.loads(line)
            good = all(key in entry for key in needs) and abs(entry["step"]) <= LARGEST_STEP
        except (ValueError, TypeError, RecursionError):
            good = False
        if good:
            yield entry
        else:
            unreadable.append(row)
    if unreadable:
        count, first = len(unreadable), unreadable[0]
        what = f"line {first}" if count == 1 else f"{count} lines, the first of them line {first},"
        run.unread.append(f"{name}: {what} cannot be read and {'is' if count == 1 else 'are'} left out.")


def _pictures(folder: Path) -> dict[str, list[tuple[int, Path]]]:
    found: dict[str, list[tuple[int, Path]]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = PICTURE.fullmatch(file.name)
        if match and file.is_file() and not file.is_symlink():
            found.setdefault(match["name"], []).append((int(match["step"]), file))
    return {name: sorted(files) for name, files in sorted(found.items())}
