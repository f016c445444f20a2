"""Group E: a save that is killed, or for which there is no room, at every place that it passes."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.reliability.bench import OURS, Bench, Case, fired
from benchmarks.reliability.cases_runs import stopped, trainings
from benchmarks.reliability.training import EVERY, Training, log, resumed_at, saved, tensors, was
from benchmarks.reliability.trials import Result
from benchmarks.reliability.verdicts import HANG, LOUD, PASS, SILENT, SKIPPED, Verdict, ended, joined, last_line
from mim.saving.checkpoint import list_checkpoints, step_of, verify
from mim.saving.save_stages import STAGES

THIRD = 3  # save: the first one that deletes an older checkpoint
STORAGE = 74  # exit code
DISK = 6 << 20  # bytes
KILLS = 50  # under an observer
USUAL_FILES = {"model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"}


def ordered(bench: Bench, reader: str, **options: Any) -> Iterator[Training]:
    """The trainings of a reader; the usual one draws nothing in its loader, so that checkpoints alone are judged."""
    yield from trainings(bench, reader, **options, **({} if reader == OURS else {"ordered": True}))


def valid(run: Path) -> list[int]:
    """Steps of our checkpoints that are whole."""
    return [step_of(found) for found in list_checkpoints(run) if verify(found) is None]


def goes_on(training: Training, run: Path, interval: tuple[int, int], **options: Any) -> Verdict:
    """Judge that the next start goes on from the newest checkpoint that is whole, and ends as if nothing happened.

    interval: the step of the save that was hit, and the one before: nothing older may be gone on from.
    """
    newest = max(valid(run), default=0)
    results = training.start(run, **options)
    verdict = training.judged(results, run)
    if verdict.kind != PASS or training.kind == "usual":
        return verdict
    if resumed_at(results[0]) != newest:
        return Verdict(SILENT, f"went on from step {resumed_at(results[0])}, and {newest} is the newest that is whole")
    low = interval[0]
    return verdict if newest >= low else Verdict(SILENT, f"step {newest} is all that is left, not {low}")


def places(training: Training, save: int = THIRD) -> list[tuple[int, str]]:
    """The operations on files of one save, by number counted from its beginning."""
    results = training.start(training.folder(), fault={"at": "count", "save": save, "do": "kill"})
    found = [event for event in was(results, "operation") if event[2] == str(save)]
    fired(len(found) > 5, f"only {len(found)} operations were counted: {last_line(results[0])}")
    return [(number, event[1]) for number, event in enumerate(found, 1)]


def killed_at_every_place(bench: Bench, reader: str) -> Verdict:
    """E1: SIGKILL at each stage of the first and the third save, and before each operation on files of the third."""
    verdicts = []
    for training in ordered(bench, reader):
        faults: list[dict[str, Any]] = []
        if reader == OURS:
            saves = (1, THIRD) if training.kind == "mae" else (THIRD,)
            faults = [{"at": "stage", "save": n, "stage": stage} for n in saves for stage in STAGES]
        if reader != OURS or training.kind == "vqkd":
            faults += [{"at": "write", "save": THIRD, "number": number} for number, _ in places(training)]
        for fault in faults[:: 6 if bench.quick else 1]:
            run = training.folder()
            results = training.start(run, fault={**fault, "do": "kill"})
            if fault.get("save") == 1 and fault.get("stage") == "within-prune" and not was(results):
                continue  # there was nothing to delete
            fired(was(results), f"{fault} did not happen: {last_line(results[0])}")
            save = fault["save"]
            verdict = goes_on(training, run, ((save - 1) * EVERY, save * EVERY))
            verdicts.append(verdict.of(f"{training.kind}, killed at {was(results)[0][2]} of save {save}"))
    return joined(verdicts)


def one_rank_of_two(bench: Bench, reader: str) -> Verdict:
    """E2: SIGKILL of one rank of two at each stage that it passes, or at each file that it writes."""
    verdicts = []
    for training in ordered(bench, reader):
        if bench.quick and training.kind == "mae":
            continue
        reference = training.whole(world=2)
        training.__dict__["reference"] = reference  # bit for bit on the same layout
        if reader == OURS:
            sites = [{"at": "stage", "stage": stage} for stage in STAGES]
        else:
            sites = [{"at": "write", "number": number} for number, _ in places(training)]
        happened = 0
        for rank, site in itertools.product((0, 1), sites[:: 5 if bench.quick else 1]):
            run = training.folder()
            results = training.start(run, world=2, fault={**site, "save": THIRD, "rank": rank, "do": "kill"})
            if not was(results) and rank:
                continue  # the main rank alone passes it
            fired(was(results), f"{site} did not happen: {last_line(results[0])}")
            happened += rank
            verdict = goes_on(training, run, ((THIRD - 1) * EVERY, THIRD * EVERY), world=2)
            verdicts.append(verdict.of(f"{training.kind}, rank {rank} killed at {was(results)[0][2]}"))
        fired(happened, "rank 1 was killed nowhere")
    return joined(verdicts)


# ---- no room -------------------------------------------------------------------------------------


def no_room(bench: Bench, reader: str) -> Verdict:
    """E3: a disk (tmpfs) that becomes full at each stage; operations that fail once (ENOSPC, EIO) or from then on."""
    verdicts = []
    for training in ordered(bench, reader):
        full = [stage for stage in STAGES if reader == OURS or stage == "begin"]
        for stage in full[:: 6 if bench.quick else 1]:
            verdicts.append(_full(training, stage).of(f"{training.kind}, full at {stage}"))
        if reader == OURS and training.kind != "vqkd":
            continue
        for number, name in places(training)[:: 8 if bench.quick else 1]:
            for error, once in (("ENOSPC", True), ("EIO", True), ("EROFS", False)):
                fault = {"at": "write", "save": THIRD, "number": number, "do": error, "once": once}
                verdicts.append(_failing(training, fault).of(f"{training.kind}, {error} at {name}"))
    return joined(verdicts)


def _full(training: Training, stage: str) -> Verdict:
    disk = training.bench.scratch().with_name("disk")
    disk.mkdir()
    run = disk / "run"
    reader, told = training.told(run)
    fault = {"at": "stage", "stage": stage, "save": THIRD, "do": "fill", "folder": str(run / "checkpoints")}
    starts = [{"fault": fault}, {"make_room": True}]
    (result,) = training.bench.trials.run(
        "starts", trainer=reader, starts=starts, disk=[str(disk), DISK], limit=180, **{"run": str(run), **told}
    )
    if ["no disk", "Operation not permitted"] in result.events:
        return Verdict(SKIPPED, "mounting is not permitted here")
    if result.hung or len(result.facts) < 2:
        return ended([result]) or Verdict(LOUD, last_line(result))
    fired(was([result]), f"{stage} was not reached: {last_line(result)}")
    first, last = result.facts
    if verdict := _told(first["exit"], result.output, Path(first["run"]), training):
        return verdict
    if last["exit"] != 0:
        return Verdict(LOUD, f"with room again: {last_line(result)}")
    return training.judged([], Path(last["run"]))


def _failing(training: Training, fault: dict[str, Any]) -> Verdict:
    run = training.folder()
    results = training.start(run, fault=fault)
    fired(was(results), f"{fault} did not happen: {last_line(results[0])}")
    if results[0].hung:
        return Verdict(HANG)
    if verdict := _told(results[0].exit, results[0].text, run, training):
        return verdict
    return training.judged(training.start(run), run)


def _told(code: int | None, text: str, run: Path, training: Training) -> Verdict | None:
    """Judge a run whose disk failed: it went on, or ended as `storage` and said why; what was saved is whole."""
    if training.kind == "usual":
        return None
    if code not in (0, STORAGE):
        return Verdict(LOUD, f"exit code {code}: {text.strip().splitlines()[-1:]}")
    if code == STORAGE and not any(word in text for word in ("space", "Input/output", "Read-only", "No room")):
        return Verdict(LOUD, f"does not say that the disk failed: {text.strip().splitlines()[-1:]}")
    damaged = {found.name: reason for found in list_checkpoints(run) if (reason := verify(found))}
    if damaged:
        return Verdict(SILENT, f"left under the name of a checkpoint: {damaged}")
    if max(valid(run), default=0) < (THIRD - 1) * EVERY:
        return Verdict(SILENT, f"checkpoints of before are gone; left are {valid(run)}")
    return None


# ---- what is there at every instant --------------------------------------------------------------


class Observer(threading.Thread):
    """Looks at a run again and again; `empty` are instants at which nothing whole was there, once there had been."""

    def __init__(self, run: Path, training: Training) -> None:
        super().__init__(daemon=True)
        self.run_folder, self.usual = run, training.kind == "usual"
        self.seen = self.looks = 0
        self.empty: list[str] = []
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            before = self._names()
            whole = self._whole(before)
            if not whole and self.seen and before == self._names():  # what was deleted meanwhile left another whole
                self.empty.append(f"only {before} after {self.seen} looks that found one")
            self.seen += bool(whole)
            self.looks += 1
            time.sleep(0.002)

    def _names(self) -> list[str]:
        folder = self.run_folder / "checkpoints"
        try:
            return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        except FileNotFoundError:
            return []

    def _whole(self, names: list[str]) -> bool:
        folders = [self.run_folder / "checkpoints" / name for name in reversed(names)]
        if self.usual:
            return any(_files(folder) >= USUAL_FILES for folder in folders)
        return any(verify(folder) is None for folder in folders)


def _files(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return set()


def always_one(bench: Bench, reader: str) -> Verdict:
    """E5: saves at every step and 50 kills at random times, while an observer looks for a checkpoint that is whole."""
    (training,) = [found for found in ordered(bench, reader, steps=30, every=1) if found.kind in ("mae", "usual")]
    began = time.monotonic()
    training.whole()
    lasts, times = time.monotonic() - began, random.Random("E5")
    verdicts, kills, looks = [], 0, 0
    while kills < (6 if bench.quick else KILLS):
        run = training.folder()
        observer = Observer(run, training)
        observer.start()
        results: list[Result] = []
        for _ in range(6):
            results = training.start(run, limit=times.uniform(0.4, 1.0) * lasts)
            kills += results[0].hung
            if not results[0].hung:
                break
        else:
            results = training.start(run)
        observer.over.set()
        observer.join()
        looks += observer.looks
        if observer.empty:
            verdicts.append(Verdict(SILENT, observer.empty[0]))
        verdicts.append(training.judged(results, run).of(f"{kills} kills, {looks} looks"))
    return joined(verdicts)


def what_is_saved_is_the_snapshot(bench: Bench, reader: str) -> Verdict:
    """E7: on a slow disk, training goes on during a save; the checkpoint of a step holds that step's tensors.

    What a step's tensors are is known from runs that end at it, and wait for their save.
    """
    if reader != OURS:
        return Verdict(SKIPPED, "it saves while training waits")
    verdicts = []
    for training in ordered(bench, reader):
        run = training.folder()
        results = training.start(run, "train.keep=100", fault={"at": "stage", "stage": "before-tensors", "do": "wait"})
        fired(was(results), f"the disk was not slow: {last_line(results[0])}")
        for step in (2, 6):
            alone = training.folder()
            stopped(training, alone, step, "term")
            mine, theirs = saved(run / "checkpoints" / f"step-{step:08d}"), tensors(alone)
            fired(theirs and step_of(list_checkpoints(alone)[-1]) == step, f"no run ended at step {step}")
            unlike = [name for name in theirs if mine[name].tobytes() != theirs[name].tobytes()]
            verdict = Verdict(SILENT if unlike else PASS, f"{len(unlike)} tensors are not of step {step}")
            verdicts.append(verdict.of(training.kind))
        verdicts.append(training.judged(results, run))
        fired(len(log(run)) == training.steps, "the run is not whole")
    return joined(verdicts)


CASES = (
    Case("E1", "SIGKILL at every stage and operation of a save", killed_at_every_place),
    Case("E2", "SIGKILL of one rank of two at every stage", one_rank_of_two),
    Case("E3", "a full, failing or read-only disk at every stage", no_room),
    Case("E5", f"a whole checkpoint at every instant, {KILLS} kills", always_one),
    Case("E7", "training goes on while a slow disk is written", what_is_saved_is_the_snapshot),
)
