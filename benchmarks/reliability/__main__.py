"""Which faults are passed, refused loudly, passed over silently, or hang: for ours and for the usual recipe.

python -m benchmarks.reliability                     all cases, as a table
python -m benchmarks.reliability C1 C2 --json out.json
python -m benchmarks.reliability F --reader ours     a whole group, for one reader
python -m benchmarks.reliability E --quick           fewer places and trainings, as in the tests
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.reliability import (
    cases_bucket,
    cases_cache,
    cases_checkpoints,
    cases_damage,
    cases_doors,
    cases_elastic,
    cases_hostile,
    cases_pixels,
    cases_remote,
    cases_resume,
    cases_runs,
    cases_saves,
    cases_weights,
    cases_worlds,
)
from benchmarks.reliability.bench import OURS, READERS, Bench, Case
from benchmarks.reliability.trials import Trials, temporary_folder
from benchmarks.reliability.verdicts import PASS, SKIPPED, Verdict

PARTS = (
    cases_bucket,
    cases_cache,
    cases_checkpoints,
    cases_damage,
    cases_doors,
    cases_elastic,
    cases_hostile,
    cases_pixels,
    cases_remote,
    cases_resume,
    cases_runs,
    cases_saves,
    cases_weights,
    cases_worlds,
)
CASES: tuple[Case, ...] = tuple(sorted((case for part in PARTS for case in part.CASES), key=lambda case: case.id))
WIDTH = 64  # characters of a detail in the table


def main() -> int:
    """Run the chosen cases. Returns 1 when ours does not pass one of them, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="cases (C1) or groups (C); default: all")
    parser.add_argument("--reader", choices=READERS, action="append", help="default: both")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all verdicts with their details")
    parser.add_argument("--quick", action="store_true", help="fewer places and trainings, as in the tests")
    arguments = parser.parse_args()
    chosen = [case for case in CASES if not arguments.cases or {case.id, case.id[0]} & set(arguments.cases)]
    if not chosen:
        parser.error(f"no such case; known are {', '.join(case.id for case in CASES)}")
    rows = []
    with temporary_folder() as folder, Trials(Path(folder) / "trials") as trials:
        bench = Bench(Path(folder), trials, quick=arguments.quick)
        for case in chosen:
            row = run(case, bench, arguments.reader or READERS)
            rows.append(row)
            show(row)
    counts = {reader: Counter(row[reader]["verdict"] for row in rows) for reader in arguments.reader or READERS}
    for reader, found in counts.items():
        print(f"{reader}: " + ", ".join(f"{count} {kind}" for kind, count in found.most_common()))
    if arguments.json:
        content = {"versions": versions(), "cases": rows, "counts": counts}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
        print(f"wrote {arguments.json}")
    return int(any(row[OURS]["verdict"] not in (PASS, SKIPPED) for row in rows if OURS in row))


def run(case: Case, bench: Bench, readers: Any) -> dict[str, Any]:
    """Judge a case for each reader."""
    row: dict[str, Any] = {"case": case.id, "title": case.title}
    for reader in readers:
        began = time.monotonic()
        verdict: Verdict = case.run(bench, reader)
        row[reader] = {"verdict": verdict.kind, "detail": verdict.detail, "seconds": round(time.monotonic() - began, 1)}
    return row


def show(row: dict[str, Any]) -> None:
    """Print a line per reader."""
    name = f"{row['case']:4}{row['title']}"
    for reader in READERS:
        if reader in row:
            found = row[reader]
            print(
                f"{name:58.58} {reader:6}{found['verdict']:8} {found['seconds']:5.1f} s  {found['detail'][:WIDTH]}",
                flush=True,
            )
            name = ""


def versions() -> dict[str, str | None]:
    """What was compared."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("mimstream", "webdataset", "accelerate", "torch", "pillow", "moto"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


if __name__ == "__main__":
    sys.exit(main())
