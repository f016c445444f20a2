"""Group E, continued: checkpoints that were damaged, run directories that two jobs share, exports that are killed."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.reliability.bench import OURS, Bench, Case, fired
from benchmarks.reliability.cases_runs import stopped
from benchmarks.reliability.cases_saves import ordered
from benchmarks.reliability.fixtures import flip
from benchmarks.reliability.training import Training, resumed_at, was
from benchmarks.reliability.verdicts import HANG, LOUD, PASS, SILENT, SKIPPED, Verdict, joined, last_line, refused
from mim.saving.checkpoint import list_checkpoints, step_of, verify

BITS = 60  # flipped in each checkpoint
KILLED = 10  # step before which a run is killed; a save may have been in flight


def left(training: Training) -> Path:
    """A run that was killed and has two checkpoints; copies of it are damaged."""
    run = training.folder()
    stopped(training, run, KILLED, "kill")
    fired(training.kind == "usual" or len(list_checkpoints(run)) > 1, "there are no two checkpoints")
    return run


def newest(run: Path) -> Path:
    """The newest checkpoint by name."""
    return sorted(path for path in (run / "checkpoints").iterdir() if not path.name.startswith("."))[-1]


def files(checkpoint: Path) -> list[Path]:
    """Every file of a checkpoint, by its place in it."""
    return sorted(path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file())


def damages(path: Path, bits: list[int]) -> Iterator[tuple[str, Path, bytes | None]]:
    """What may have become of each file of a checkpoint: (name of the damage, file, content or None for missing)."""
    for file in files(path):
        data = (path / file).read_bytes()
        yield "cut", file, data[: len(data) // 2]
        yield "missing", file, None
        yield "empty", file, b""
        for bit in bits:
            yield f"bit {bit % (8 * len(data))}", file, flip(data, bit % (8 * len(data)))


def damaged(bench: Bench, reader: str) -> Verdict:
    """E4: bits, cuts, missing and empty files of the newest checkpoint, each of them; and what does not belong there.

    60 flipped bits in each checkpoint are looked for without a start; a start follows one flip, cut and loss of each.
    """
    verdicts, draws = [], random.Random("E4")
    for training in ordered(bench, reader):
        run = left(training)
        bits = [draws.getrandbits(40)]
        for what, file, content in damages(newest(run), bits):
            if bench.quick and what in ("empty", "missing"):
                continue
            verdicts.append(_fallen_back(training, run, what, file, content).of(f"{training.kind}, {what} {file}"))
        if reader != OURS:
            continue
        verdicts.append(_every_flip(newest(run), draws).of(f"{training.kind}, {BITS} bits"))
        verdicts.append(_foreign(training, run).of(f"{training.kind}, foreign files"))
        verdicts.append(_nothing_left(training, run).of(f"{training.kind}, all damaged"))
    return joined(verdicts)


def _fallen_back(training: Training, run: Path, what: str, file: Path, content: bytes | None) -> Verdict:
    """Damage one file of a copy and go on: the one before is taken, with a line that names the damage."""
    copy = training.folder()
    shutil.copytree(run, copy)
    target = newest(copy) / file
    before = target.read_bytes()
    if content is None:
        target.unlink()
    else:
        target.write_bytes(content)
    fired(content != before, "nothing was damaged")
    results = training.start(copy)
    verdict = training.judged(results, copy)
    if verdict.kind != PASS or training.kind == "usual":
        return verdict
    text = results[0].text
    if resumed_at(results[0]) != step_of(list_checkpoints(run)[-2]):
        return Verdict(SILENT, f"went on from step {resumed_at(results[0])}")
    named = str(file) in text or (file.name == "manifest.json" and "manifest" in text)
    return verdict if "rejected" in text and named else Verdict(LOUD, f"does not name {file}: {text[-300:]}")


def _every_flip(checkpoint: Path, draws: random.Random) -> Verdict:
    """Flip bits all over a checkpoint, one at a time, and ask `verify`."""
    missed = []
    for _ in range(BITS):
        file = checkpoint / draws.choice(files(checkpoint))
        whole = file.read_bytes()
        bit = draws.randrange(8 * len(whole))
        file.write_bytes(flip(whole, bit))
        if verify(checkpoint) is None:
            missed.append(f"{file.name} bit {bit}")
        file.write_bytes(whole)
    fired(verify(checkpoint) is None, "the checkpoint did not become whole again")
    return Verdict(SILENT, f"{len(missed)} of {BITS} were not seen: {missed[0]}") if missed else Verdict(PASS)


def _foreign(training: Training, run: Path) -> Verdict:
    """Folders and files that are no checkpoints, leftovers of a killed save, and a folder that only has the name."""
    copy = training.folder()
    shutil.copytree(run, copy)
    folder = copy / "checkpoints"
    for name in ("step-abc", "step-", "step-00000010.bak", ".tmp-step-00000010", ".tmp-step-00000010-deadbeef"):
        shutil.copytree(newest(run), folder / name)
    (folder / "step-00000099").mkdir()
    (folder / "step-00000098").write_text("a file")
    (folder / "notes.txt").write_text("mine")
    (folder / newest(run).name / "notes.txt").write_text("mine")
    results = training.start(copy)
    verdict = training.judged(results, copy)
    if verdict.kind != PASS:
        return verdict
    if not (folder / "notes.txt").exists() or not (folder / "step-abc").exists():
        return Verdict(SILENT, "files that are not its own were deleted")
    return verdict if "step-00000099" in results[0].text else Verdict(LOUD, "says nothing of the empty step-00000099")


def _nothing_left(training: Training, run: Path) -> Verdict:
    """All checkpoints are damaged: an error, never a fresh start."""
    copy = training.folder()
    shutil.copytree(run, copy)
    for checkpoint in list_checkpoints(copy):
        (checkpoint / "state.json").write_text("{}")
    fired(not any(verify(found) is None for found in list_checkpoints(copy)), "one is whole")
    return refused(training.start(copy), str(copy), "state.json")


# ---- two jobs ------------------------------------------------------------------------------------


def two_jobs(bench: Bench, reader: str) -> Verdict:
    """E6: a second job is started on the run directory of one that lives, and on that of one that was killed."""
    verdicts = []
    for training in ordered(bench, reader):
        run = training.folder()
        name, told = training.told(run)
        fault = {"at": "stage", "stage": "begin", "do": "wait", "folder": str(run / "checkpoints")}
        each = [{**told, "fault": fault}, {**told, "fault": fault}]
        results = training.bench.trials.run(name, limit=120, each=each, **told)
        fired(was(results), "neither of them saved")
        ended = [result.exit for result in results]
        if any(result.hung for result in results):
            verdicts.append(Verdict(HANG, f"{training.kind}: exit codes {ended}"))
        elif sorted(ended, key=lambda code: code != 0)[1] == 0:
            verdict = training.judged(results, run)
            both = Verdict(SILENT, f"both trained in one folder ({verdict.detail})")
            verdicts.append(both.of(training.kind))
        else:
            winner = [result for result in results if result.exit == 0]
            loser = [result for result in results if result.exit != 0]
            verdict = training.judged(winner, run) if winner else Verdict(LOUD, "neither of them ended well")
            verdicts.append(verdict.of(f"{training.kind}, the first"))
            verdicts.append(refused(loser, str(run)).of(f"{training.kind}, the second"))
        run = left(training)
        verdicts.append(training.judged(training.start(run), run).of(f"{training.kind}, after a kill"))
    return joined(verdicts)


# ---- exports -------------------------------------------------------------------------------------


def exports(bench: Bench, reader: str) -> Verdict:
    """E8: an export that is killed before each operation on files leaves nothing under its name, or all of it."""
    if reader != OURS:
        return Verdict(SKIPPED, "it has no export")
    training, verdicts = Training(bench, "mae"), []
    run = training.reference

    def export(out: Path, **fault: Any) -> Any:
        told = {"fault": {"folder": str(out.parent), "save": 0, **fault}} if fault else {}
        return bench.trials.run("train", limit=90, arguments=["export", "timm", str(run), str(out)], **told)

    counted = export(bench.scratch(), at="count", do="kill")
    number = len(was(counted, "operation"))
    fired(counted[0].exit == 0 and number > 5, f"{number} operations were counted: {last_line(counted[0])}")
    for at in range(1, number + 1, 5 if bench.quick else 1):
        out = bench.scratch()
        results = export(out, at="write", number=at, do="kill")
        fired(was(results), f"operation {at} of {number} was not reached")
        if out.exists() and (reason := _incomplete(out)):
            verdicts.append(Verdict(SILENT, f"killed at {was(results)[0][2]}: {reason}"))
            continue
        if not out.exists() and (again := export(out)[0]).exit != 0:
            verdicts.append(Verdict(LOUD, last_line(again)))
            continue
        reason = _incomplete(out)
        verdicts.append(Verdict(SILENT, reason) if reason else Verdict(PASS, "all of it or nothing"))
    return joined(verdicts)


def _incomplete(out: Path) -> str | None:
    """What an export lacks by its own report, or a pickle in it; None when it is whole."""
    if not (out / "report.json").exists():
        return "no report.json"
    found = json.loads((out / "report.json").read_text())["files"]
    for name, digest in found.items():
        digest = digest["sha256"] if isinstance(digest, dict) else digest
        if hashlib.sha256((out / name).read_bytes()).hexdigest() != digest:
            return f"{name} is not what the report says"
    for path in out.rglob("*"):
        if path.is_file() and path.read_bytes()[:2] in (b"PK", b"\x80\x02"):
            return f"{path.name} is a pickle"
    return None


CASES = (
    Case("E4", "every file of a checkpoint damaged; foreign files", damaged),
    Case("E6", "a second job on the same run directory", two_jobs),
    Case("E8", "an export that is killed", exports),
)
