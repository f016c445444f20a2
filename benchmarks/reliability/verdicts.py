"""What a case ends with, and how trials of a reader are judged.

pass      exactly what must be delivered was delivered, or the refusal that the case asks for was given
loud      it ended with an error where delivery was possible, or with an error that does not say what it must
silent    it ended well, but samples were lost, altered, repeated or moved, or foreign code ran: the worst
hang      it did not end within its limit, or processes stayed behind
invalid   the fault did not fire, so nothing was shown
skipped   a part that the case needs is not installed, or the case does not apply
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.reliability.fixtures import Row
from benchmarks.reliability.trials import Result

PASS, LOUD, SILENT, HANG, INVALID, SKIPPED = "pass", "loud", "silent", "hang", "invalid", "skipped"
WORST_FIRST = (INVALID, SILENT, HANG, LOUD, PASS, SKIPPED)


class Verdict(NamedTuple):
    kind: str
    detail: str = ""

    def of(self, name: object) -> Verdict:
        """The same verdict, its detail saying of what."""
        return Verdict(self.kind, f"{name}: {self.detail}")


def joined(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of several verdicts; the detail counts them and shows the first of the worst."""
    found = list(verdicts)
    if not found:
        return Verdict(INVALID, "no trial was made")
    counts = Counter(one.kind for one in found)
    worst = next(kind for kind in WORST_FIRST if counts[kind])
    shown = next(one.detail for one in found if one.kind == worst)
    if len(found) == 1:
        return found[0]
    tally = ", ".join(f"{counts[kind]} {kind}" for kind in WORST_FIRST if counts[kind])
    return Verdict(worst, f"{tally}; {shown}" if shown else tally)


def ended(results: Sequence[Result]) -> Verdict | None:
    """Judge how ranks ended: a hang, or an error, of any of them; None when all ended well."""
    if any(result.hung for result in results):
        return Verdict(HANG, f"no end within its limit, after {sum(len(r.rows) for r in results)} samples")
    if any(result.orphans for result in results):
        return Verdict(HANG, "processes stayed behind")
    for result in results:
        if result.exit != 0:
            return Verdict(LOUD, last_line(result))
    return None


def delivered(results: Sequence[Result], wanted: Collection[Row]) -> Verdict:
    """Judge that every wanted row was delivered exactly once, and nothing else."""
    return ended(results) or same_rows([row for result in results for row in result.rows], wanted)


def same_rows(rows: Sequence[Row], wanted: Collection[Row]) -> Verdict:
    """Judge a multiset of rows against the wanted set."""
    counts = Counter(rows)
    lost = sum(1 for row in wanted if not counts[row])
    foreign = sum(count for row, count in counts.items() if row not in wanted)
    repeated = sum(count - 1 for row, count in counts.items() if row in wanted and count > 1)
    if not (lost or foreign or repeated):
        return Verdict(PASS, f"{len(rows)} samples")
    parts = [f"{lost} lost"] * bool(lost) + [f"{foreign} altered or foreign"] * bool(foreign)
    parts += [f"{repeated} repeated"] * bool(repeated)
    return Verdict(SILENT, f"{', '.join(parts)} of {len(wanted)}")


def refused(results: Sequence[Result], *naming: str, wanted: Collection[Row] | None = None) -> Verdict:
    """Judge that a run ended with an error that names what is wrong.

    wanted: rows whose exact delivery is as good, where a fault may be without effect.
    """
    if any(result.hung or result.orphans for result in results):
        return ended(results) or Verdict(HANG)
    failed = [result for result in results if result.exit != 0]
    if not failed:
        found = [row for result in results for row in result.rows]
        if wanted is None:
            return Verdict(SILENT, f"no error; {len(found)} samples delivered")
        return same_rows(found, wanted)
    if missing := [word for word in naming if not any(word in result.text for result in failed)]:
        return Verdict(LOUD, f"the error does not name {missing[0]!r}: {last_line(failed[0])}")
    return Verdict(PASS, last_line(failed[0]))


def leaked(secrets: Mapping[str, str], results: Sequence[Result], written: Iterable[Path] = ()) -> Verdict | None:
    """Judge that no secret stands in an output, on a command line or in a file; None when none does."""
    places = {
        "the output": "".join(result.text for result in results),
        "a command line": "".join(line for result in results for line in result.started()),
        "a file": "".join(file.read_bytes().decode(errors="replace") for file in written),
    }
    for place, text in places.items():
        for name, secret in secrets.items():
            if secret in text:
                return Verdict(SILENT, f"the secret of {name} stands in {place}")
    return None


def last_line(result: Result) -> str:
    """The sentence that a run ended with."""
    lines = [line for line in result.text.splitlines() if line.strip()]
    final = result.message.strip().splitlines()[-1:] or lines[-1:]
    return " ".join(final)[:300] or f"exit code {result.exit}"
