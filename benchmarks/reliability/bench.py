"""What a case is given: fixtures, a place to write, and the readers under test."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reliability.fixtures import Fixture, fixture
from benchmarks.reliability.trials import LIMIT, Result, Trials
from benchmarks.reliability.verdicts import INVALID, Verdict

OURS, USUAL = "ours", "usual"
READERS = (OURS, USUAL)


class Bench:
    """Fixtures are made once; a case asks for copies, and for folders of its own. quick: seconds, for the tests."""

    def __init__(self, folder: Path, trials: Trials, *, quick: bool = False):
        self.folder = folder
        self.trials = trials
        self.quick = quick
        self.count = 0

    @functools.cached_property
    def whole(self) -> Fixture:
        """8 shards, 240 samples."""
        return fixture(self.folder / "whole", 240, shard_size=30)

    @functools.cached_property
    def small(self) -> Fixture:
        """1 shard, 24 samples."""
        return fixture(self.folder / "small", 24, shard_size=24, first=1000)

    def scratch(self) -> Path:
        """A path in an empty folder; nothing is there yet."""
        self.count += 1
        folder = self.folder / f"scratch-{self.count:05d}"
        folder.mkdir()
        return folder / "x"

    def read(self, reader: str, path: Path, *, world: int = 1, **options: Any) -> list[Result]:
        """Read a dataset folder (the usual recipe: its tars) on `world` ranks."""
        tars = sorted(map(str, path.glob("*.tar")))
        return self.trials.run(reader, processes=world, world=world, path=str(path), tars=tars, **options)

    def read_each(self, reader: str, copy: Fixture, contents: Sequence[bytes]) -> list[Result]:
        """Read a dataset of one shard once with each of several contents of that shard."""
        (tar,) = copy.tars
        return self.trials.run_each(reader, tar, contents, path=str(copy.path), tars=[str(tar)])

    def mim(self, *arguments: object, **options: Any) -> Result:
        """Run a `mim` command."""
        return self.trials.run("cli", arguments=[str(argument) for argument in arguments], **options)[0]

    def read_tars(
        self, reader: str, tars: Sequence[Path | str], *, flags: Sequence[str] = (), **options: Any
    ) -> list[Result]:
        """Read a stranger's tars: ours indexes them first, with `flags`, and a failing index is the result."""
        if reader == USUAL:
            return self.trials.run(reader, tars=[str(tar) for tar in tars], **options)
        arguments = ("shards", "index", *tars, out := self.scratch(), "--labels", "cls", "--workers", 1, *flags)
        indexed = self.mim(*arguments, limit=options.get("limit", LIMIT))
        if indexed.hung or indexed.exit != 0:
            return [indexed]
        results = self.read(reader, out, **options)
        results[0].events += indexed.events
        results[0].output = indexed.output + results[0].output
        results[0].grown = max(results[0].grown, indexed.grown)
        return results


@dataclass(frozen=True)
class Case:
    """A fault, and what must come of it."""

    id: str
    title: str
    judge: Callable[[Bench, str], Verdict]  # (bench, reader)

    def run(self, bench: Bench, reader: str) -> Verdict:
        """Judge one reader; a fault that did not fire shows nothing."""
        try:
            return self.judge(bench, reader)
        except NotFired as error:
            return Verdict(INVALID, str(error))


class NotFired(AssertionError):
    """The fault of a case did not happen."""


def fired(fact: object, what: str) -> None:
    """Prove that a fault happened. Raises NotFired."""
    if not fact:
        raise NotFired(what)
