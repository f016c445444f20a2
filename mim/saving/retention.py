"""Which checkpoints of a run stay: the newest valid ones, every n-th, and those that someone pinned.

Nothing is deleted before `keep` valid checkpoints (at least two) are known to exist, read and hashed by this process;
one that is not valid never counts. An old checkpoint first loses its name, which is one rename, and is deleted then: a
kill leaves no half of one among the others.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from mim.log import say
from mim.saving import checkpoint, save_stages
from mim.saving.checkpoint import PINNED

LEAST = 2  # valid checkpoints that always stay
REPLACED = ".tmp-replaced-"  # before the name of a checkpoint whose place another one of the same step takes
DEAD = ".tmp-*"  # in RUN/checkpoints: saves that are not finished, and old checkpoints that are being deleted


class Verifier:
    """Verifies checkpoints and remembers the valid ones: a file is read again when its size or time changed."""

    def __init__(self) -> None:
        self._valid: dict[Path, frozenset[tuple[str, int, int]]] = {}

    def reason(self, folder: Path) -> str | None:
        """Why a checkpoint is not valid, or None."""
        seen = _files(folder)
        if self._valid.get(folder) == seen:
            return None
        found = checkpoint.verify(folder)
        if found is None:
            self._valid[folder] = seen
        return found

    def forget(self, folder: Path) -> None:
        """Remember nothing of a checkpoint that is deleted."""
        self._valid.pop(folder, None)


def pin(folder: Path) -> None:
    """Keep a checkpoint until it is unpinned."""
    (folder / PINNED).touch()


def unpin(folder: Path) -> None:
    """Let a checkpoint go when its turn comes."""
    (folder / PINNED).unlink(missing_ok=True)


def pinned(folder: Path) -> bool:
    return (folder / PINNED).exists()


def prune(run: Path, *, keep: int, keep_every: int | None = None, verifier: Verifier | None = None) -> list[Path]:
    """Delete what `expendable` names; returns the folders. The caller holds the lease. Raises OSError."""
    verifier = verifier or Verifier()
    folders = expendable(run, keep=keep, keep_every=keep_every, verifier=verifier)
    for folder in folders:
        nameless = folder.with_name(f".tmp-deleted-{folder.name}")
        shutil.rmtree(nameless, ignore_errors=True)
        folder.rename(nameless)
        save_stages.reached("within-prune")
        shutil.rmtree(nameless)
        verifier.forget(folder)
    return folders


def expendable(run: Path, *, keep: int, keep_every: int | None = None, verifier: Verifier | None = None) -> list[Path]:
    """Checkpoints that may go, oldest first: older than the newest `keep` valid ones, not pinned, not an n-th.

    `keep_every` is in steps: of the checkpoints between two multiples of it, the first one stays if it is valid.
    """
    verifier = verifier or Verifier()
    folders = checkpoint.list_checkpoints(run)
    valid = 0
    for index in reversed(range(len(folders))):
        if (reason := verifier.reason(folders[index])) is not None:
            say(f"checkpoint {folders[index]} is not valid and counts for nothing: {reason}")
            continue
        valid += 1
        if valid == max(keep, LEAST):
            older = folders[:index]
            break
    else:
        return []
    every = set(_nth([folder for folder in older if keep_every and verifier.reason(folder) is None], keep_every or 1))
    return [folder for folder in older if folder not in every and not pinned(folder)]


def remove_dead(run: Path) -> None:
    """Delete what killed saves left. The caller holds the lease of the run and has no save in flight."""
    for folder in (run / "checkpoints").glob(DEAD):
        final = folder.with_name(folder.name.removeprefix(REPLACED))
        if folder.name.startswith(REPLACED) and not final.exists():  # killed between the two renames
            folder.rename(final)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _nth(folders: list[Path], every: int) -> Iterable[Path]:
    """The first checkpoint at or after each multiple of `every` steps; what stayed once stays again."""
    before = 0
    for folder in folders:
        step = checkpoint.step_of(folder)
        if step // every > before // every:
            yield folder
        before = step


def _files(folder: Path) -> frozenset[tuple[str, int, int]]:
    """Name, size and time of each file of a checkpoint, the pin left out."""
    found = set()
    for path in folder.rglob("*"):
        if path.is_file() and path.name != PINNED:
            status = path.stat()
            found.add((str(path.relative_to(folder)), status.st_size, status.st_mtime_ns))
    return frozenset(found)
