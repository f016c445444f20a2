"""The commands `mim checkpoints ...`: what they take and print. Nothing heavy is imported before one runs."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

run_argument = click.argument("run", type=click.Path(path_type=Path))
steps_argument = click.argument("steps", nargs=-1, type=int, metavar="STEP...")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def checkpoints() -> None:
    """List, verify, prune and pin the checkpoints of a run.

    \b
    Examples:
      mim checkpoints list runs/mae
      mim checkpoints verify runs/mae
      mim checkpoints prune runs/mae --keep 2 --dry-run
    """


@checkpoints.command("list")
@run_argument
@json_option
def checkpoints_list(run: Path, as_json: bool) -> None:
    """Show step, age, size and state of each checkpoint of RUN, oldest first.

    It compares names and sizes with the manifests and is quick; `mim checkpoints verify` hashes every byte.

    \b
    Examples:
      mim checkpoints list runs/mae
      mim checkpoints list runs/mae --json
    """
    rows = [row(folder, share=None) for folder in folders_of(run)]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    click.echo(f"{'step':>10}  {'age':>10}  {'size':>10}  {'pinned':6}  state")
    for found in rows:
        state = "complete" if found["valid"] else found["reason"]
        age = "?" if found["age_s"] is None else clock(found["age_s"])
        pinned = "pinned" if found["pinned"] else ""
        click.echo(f"{found['step']:>10}  {age:>10}  {size_text(found['size']):>10}  {pinned:6}  {state}")
    num_bad = sum(not found["valid"] for found in rows)
    total = size_text(sum(found["size"] for found in rows))
    click.echo(f"{len(rows)} checkpoints in {run}, {total}" + (f"; {num_bad} would be rejected" if num_bad else ""))


@checkpoints.command("verify")
@run_argument
@steps_argument
@json_option
def checkpoints_verify(run: Path, steps: tuple[int, ...], as_json: bool) -> None:
    """Hash every file of the checkpoints of RUN (or of some STEPs) and compare with their manifests.

    Exit code 0 when all are valid, 65 when one is not. A resume does the same and skips the bad ones by itself.

    \b
    Examples:
      mim checkpoints verify runs/mae
      mim checkpoints verify runs/mae 12000 --json
    """
    rows = []
    for folder in chosen(run, steps) if steps else folders_of(run):
        began = time.monotonic()
        found = row(folder, share=(0, 1))
        rows.append(found)
        if not as_json:
            state = "valid" if found["valid"] else f"NOT VALID: {found['reason']}"
            seconds = time.monotonic() - began
            click.echo(f"step {found['step']}: {state} ({size_text(found['size'])} read in {seconds:.1f} s)")
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    num_bad = sum(not found["valid"] for found in rows)
    if not as_json:
        click.echo(f"{len(rows) - num_bad} of {len(rows)} checkpoints in {run} are valid")
    if num_bad:
        sys.exit(65)


@checkpoints.command("prune")
@run_argument
@click.option("--keep", required=True, type=click.IntRange(min=2), help="Newest valid checkpoints that stay.")
@click.option("--keep-every", type=click.IntRange(min=0), metavar="STEPS", help="One per so many steps stays; 0: none.")
@click.option("--dry-run", is_flag=True, help="Say what would go, and delete nothing.")
@json_option
def checkpoints_prune(run: Path, keep: int, keep_every: int | None, dry_run: bool, as_json: bool) -> None:
    """Delete the checkpoints of RUN that are older than the newest --keep valid ones, and what killed saves left.

    Valid means hashed now: at least two valid checkpoints always stay, and so do pinned ones. What is newer than them
    stays too, and what is not valid is named. A run in which a job is at work is left alone.

    \b
    Examples:
      mim checkpoints prune runs/mae --keep 2 --dry-run
      mim checkpoints prune runs/mae --keep 3 --keep-every 10000
    """
    from mim.saving import lease, retention

    folders_of(run)
    every = steps_between(run, keep_every)
    if dry_run:
        expendable = retention.expendable(run, keep=keep, keep_every=every)
        sizes = {folder: size_of(folder) for folder in expendable}
    else:
        with lease.hold(run):
            sizes = {folder: size_of(folder) for folder in folders_of(run)}
            expendable = retention.prune(run, keep=keep, keep_every=every)
            retention.remove_dead(run)
    freed = sum(sizes[folder] for folder in expendable)
    if as_json:
        names = [str(folder) for folder in expendable]
        click.echo(json.dumps({"deleted": names, "bytes": freed, "dry_run": dry_run}, indent=1))
        return
    for folder in expendable:
        click.echo(f"{'would delete' if dry_run else 'deleted'} {folder} ({size_text(sizes[folder])})")
    left = len(folders_of(run)) - (len(expendable) if dry_run else 0)
    verb = "would go" if dry_run else "are deleted"
    click.echo(f"{len(expendable)} checkpoints ({size_text(freed)}) {verb}, {left} stay")


@checkpoints.command("pin")
@run_argument
@steps_argument
def checkpoints_pin(run: Path, steps: tuple[int, ...]) -> None:
    """Keep the checkpoints of these STEPs of RUN until they are unpinned; neither a run nor `prune` deletes them.

    \b
    Example:
      mim checkpoints pin runs/mae 12000 24000
    """
    from mim.saving import retention

    for folder in chosen(run, steps):
        retention.pin(folder)
        click.echo(f"{folder} is pinned")


@checkpoints.command("unpin")
@run_argument
@steps_argument
def checkpoints_unpin(run: Path, steps: tuple[int, ...]) -> None:
    """Let the checkpoints of these STEPs of RUN go when their turn comes.

    \b
    Example:
      mim checkpoints unpin runs/mae 12000
    """
    from mim.saving import retention

    for folder in chosen(run, steps):
        retention.unpin(folder)
        click.echo(f"{folder} is no longer pinned")


# ---- a run's checkpoints -------------------------------------------------------------------------


def folders_of(run: Path) -> list[Path]:
    """Checkpoints of a run directory, oldest first; refuses a folder that is none."""
    from mim.saving import checkpoint

    checkpoint.read_config(run)
    return checkpoint.list_checkpoints(run)


def chosen(run: Path, steps: tuple[int, ...]) -> list[Path]:
    """The checkpoints of these steps, each of which must be there."""
    from mim.config import ConfigError
    from mim.saving import checkpoint

    by_step = {checkpoint.step_of(folder): folder for folder in folders_of(run)}
    known = ", ".join(map(str, by_step)) or "none"
    if not steps:
        raise ConfigError(f"no step is given; steps of {run}: {known}")
    for step in steps:
        if step not in by_step:
            raise ConfigError(f"{run} has no checkpoint of step {step}; steps it has: {known}")
    return [by_step[step] for step in steps]


def row(folder: Path, *, share: tuple[int, int] | None) -> dict[str, Any]:
    """What is known of a checkpoint; `share` None compares sizes alone. What cannot be read is a reason, no failure."""
    from mim.log import Pace
    from mim.saving import checkpoint, retention

    size, age = 0, None
    try:
        size = size_of(folder)
        pace = Pace(f"step {checkpoint.step_of(folder)}", size, unit="bytes")
        reason = checkpoint.verify(folder, share=share, advance=pace.advance)
        written = (folder / "manifest.json").stat().st_mtime  # it was written last
        age = round(max(time.time() - written, 0.0))
    except OSError as error:  # a run that is at work may prune it at this moment
        reason = f"it cannot be read: {error.strerror}"
    return {
        "step": checkpoint.step_of(folder),
        "folder": str(folder),
        "age_s": age,
        "size": size,
        "pinned": retention.pinned(folder),
        "valid": reason is None,
        "reason": reason,
        "hashed": share is not None,
    }


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def steps_between(run: Path, keep_every: int | None) -> int | None:
    """`--keep-every`; it may not be left out where the recipe keeps every n-th one, in epochs perhaps."""
    from mim.config import ConfigError
    from mim.saving import checkpoint

    recipe = (checkpoint.read_config(run).get("train") or {}).get("keep_every")
    if keep_every is None and recipe is not None:
        raise ConfigError(
            f"{run} keeps a checkpoint per train.keep_every={recipe!r}; say --keep-every STEPS, so that they stay, or "
            f"--keep-every 0"
        )
    return keep_every or None


def size_text(size: int) -> str:
    """Bytes for people."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"


def clock(seconds: float) -> str:
    """An age as 1:02:03 or 3 days."""
    from mim.log import clock as hours

    return f"{seconds / 86400:.1f} days" if seconds >= 2 * 86400 else hours(seconds)
