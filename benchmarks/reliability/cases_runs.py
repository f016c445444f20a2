"""Group A, continued: trainings that are stopped and killed anywhere, and that go on by the same command."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.reliability.bench import OURS, Bench, Case, fired
from benchmarks.reliability.fixtures import fixture
from benchmarks.reliability.training import EVERY, STEPS, Training, difference, kinds, resumed_at, was
from benchmarks.reliability.trials import Result
from benchmarks.reliability.verdicts import HANG, LOUD, PASS, SILENT, Verdict, joined, last_line, refused
from mim.saving.checkpoint import list_checkpoints, step_of, verify

KILLS = 20  # at random times
STOPPED = 75  # exit code
SOON = 10.0  # seconds from a signal to the end


def trainings(bench: Bench, reader: str, **options: object) -> Iterator[Training]:
    """The trainings of a reader; of ours, when it must be quick, the tokenizer with a codebook and MAE."""
    for kind in kinds(reader):
        if not bench.quick or kind not in ("dvae", "beit"):
            yield Training(bench, kind, **options)  # type: ignore[arg-type]


def stopped(training: Training, run: Path, step: int, do: str, **options: object) -> list[Result]:
    """Start, and be stopped in a step."""
    fault = {"at": "step", "step": step, "do": do, **options}
    results = training.start(run, fault=fault)
    fired(was(results), f"step {step} was not reached: {last_line(results[0])}")
    return results


def twice_the_same(bench: Bench, reader: str) -> Verdict:
    """A1: the same configuration twice."""
    return joined(training.judged([], training.whole()).of(training.kind) for training in trainings(bench, reader))


def stopped_at_a_step(bench: Bench, reader: str) -> Verdict:
    """A2t: SIGTERM in the first step, the middle and the last of an epoch, the first of the next, after a save.

    Ours ends at once in the first step of a start, when there is nothing to save (docs/running.md).
    """
    verdicts = []
    for training in trainings(bench, reader):
        for step in (1, 2, 3, 4, 5):
            run = training.folder()
            stopped(training, run, step, "term")
            told = json.loads((run / "status.json").read_text()) if reader == OURS else {}
            results = training.start(run)
            verdict = training.judged(results, run)
            if reader == OURS and verdict.kind == PASS:
                verdict = _went_on(told, results[0], 0 if step == 1 else step)
            verdicts.append(verdict.of(f"{training.kind}, step {step}"))
    return joined(verdicts)


def _went_on(stopped: dict[str, Any], resumed: Result, step: int) -> Verdict:
    """Judge what status.json said of the stop, and where the next start went on."""
    if (stopped["exit_code"], stopped["step"]) != (STOPPED, step):
        return Verdict(
            LOUD, f"exit code {stopped['exit_code']} at step {stopped['step']} instead of {STOPPED} at {step}"
        )
    if resumed_at(resumed) != step:
        return Verdict(LOUD, f"went on from step {resumed_at(resumed)} instead of {step}")
    return Verdict(PASS)


def killed_at_random(bench: Bench, reader: str) -> Verdict:
    """A3: SIGKILL at 20 random times of each training, and the same command after each, until it is done."""
    verdicts = []
    for training in trainings(bench, reader, steps=30):
        began = time.monotonic()
        fired(training.reference, "there is nothing to compare with")
        began = time.monotonic()
        training.whole()
        lasts = time.monotonic() - began
        times, run, kills = random.Random(f"A3 {training.kind}"), training.folder(), 0
        wanted = 5 if bench.quick else KILLS
        while kills < wanted:
            results = training.start(run, limit=times.uniform(0.25, 1.2) * lasts)
            if results[0].hung:  # its limit killed it
                kills += 1
                continue
            verdicts.append(training.judged(results, run).of(f"{training.kind}, {kills} kills"))
            run = training.folder()
        verdicts.append(training.judged(training.start(run), run).of(f"{training.kind}, {kills} kills"))
    return joined(verdicts)


def killed_while_it_reads(bench: Bench, reader: str) -> Verdict:
    """A4: SIGKILL with 2 workers and what they prefetched in flight, between two micro-batches of a step."""
    verdicts = []
    for training in trainings(bench, reader):
        ours = reader == OURS
        halves = ("train.micro_batches=2",) if ours else ()
        reference, run = training.whole(*halves), training.folder()
        workers = {} if ours else {"workers": 2}
        arguments = (*halves, "train.workers=2") if ours else ()
        for step in (4, 7):
            fault = {"at": "step", "step": step, "micro": int(ours), "do": "kill"}
            results = training.start(run, *arguments, fault=fault, **workers)  # type: ignore[arg-type]
            fired(was(results), f"step {step} was not reached: {last_line(results[0])}")
        results = training.start(run, *arguments, **workers)  # type: ignore[arg-type]
        found = difference(run, reference) if results[0].exit == 0 else None
        failed = Verdict(HANG) if results[0].hung else Verdict(LOUD, last_line(results[0]))
        verdict = failed if results[0].exit != 0 else Verdict(SILENT if found else PASS, found or "")
        verdicts.append(verdict.of(training.kind))
    return joined(verdicts)


def signalled(bench: Bench, reader: str) -> Verdict:
    """A5: SIGTERM saves at the end of its step and ends with 75 within 10 s; a second one ends at once."""
    verdicts = []
    for training in trainings(bench, reader):
        run, began = training.folder(), time.monotonic()
        results = stopped(training, run, 5, "term")
        took = time.monotonic() - began
        verdict = training.judged(training.start(run), run)
        if reader == OURS and verdict.kind == PASS:
            verdict = _answered(results[0], took)
        verdicts.append(verdict.of(f"{training.kind}, once"))
        run = training.folder()
        results = stopped(training, run, 5, "term twice")
        verdicts.append(_at_once(training, results[0], run, reader).of(f"{training.kind}, twice"))
    return joined(verdicts)


def _answered(result: Result, took: float) -> Verdict:
    if result.exit != STOPPED:
        return Verdict(LOUD, f"exit code {result.exit} instead of {STOPPED}")
    return Verdict(PASS if took < SOON else HANG, f"ended after {took:.1f} s")


def _at_once(training: Training, result: Result, run: Path, reader: str) -> Verdict:
    """The second signal ended the run in its step, before anything of it was saved, and what was saved is whole."""
    if reader == OURS:
        fired(was([result], "again"), "the second signal was not sent")
        saved = list_checkpoints(run)
        fired(saved, "nothing was saved before")
        if result.hung or step_of(saved[-1]) >= 5:
            return Verdict(HANG, "the second signal did not end it in its step")
        if reason := verify(saved[-1]):
            return Verdict(SILENT, reason)
        status = json.loads((run / "status.json").read_text())
        if status["state"] == "done":
            return Verdict(SILENT, "status.json says that it is done")
    return training.judged(training.start(run), run)


def again_and_from_before(bench: Bench, reader: str) -> Verdict:
    """A6: two starts that end before their first step, and a start from the checkpoint before the newest."""
    verdicts = []
    for training in trainings(bench, reader):
        run = training.folder()
        stopped(training, run, 6, "kill")
        for _ in range(2):
            stopped(training, run, 5, "kill")  # the first step after the checkpoint of step 4
        verdicts.append(training.judged(training.start(run), run).of(f"{training.kind}, again and again"))
        run = training.folder()
        stopped(training, run, 8, "kill")
        newest = sorted((run / "checkpoints").iterdir())[-1]
        shutil.rmtree(newest)
        results = training.start(run)
        older = resumed_at(results[0])
        fired(0 < older < 6, f"went on from step {older}, which is no older checkpoint")
        verdicts.append(training.judged(results, run).of(f"{training.kind}, from an older checkpoint"))
    return joined(verdicts)


CHANGES = {  # what is changed: the key that must be named
    "data.seed=1": "data.seed",
    "data.lanes=3": "data.lanes",
    "data.window=4": "data.window",
    "data.view.min_scale=0.5": "data.view",
    "optim.batch_size=6": "optim.batch_size",
    "optim.lr=0.002": "optim.lr",
    "mask.ratio=0.5": "mask.ratio",
    "encoder.width=48": "encoder.width",
}


def changed(bench: Bench, reader: str) -> Verdict:
    """A8: going on with another seed, order, view, mask, network, rate or other shards is refused by name."""
    (training,) = [found for found in trainings(bench, reader) if found.kind in ("mae", "usual")]
    run = training.folder()
    stopped(training, run, 6, "kill")
    other = fixture(bench.scratch(), 24, shard_size=24, first=3000)
    if reader != OURS:  # it has one thing to compare: the shards
        results = training.start(run, tars=[str(tar) for tar in other.tars])
        return refused(results, str(other.tars[0]))
    changes = {**CHANGES, f"data.path={other.path}": "dataset_id"}
    verdicts = [refused(training.start(run, change), key).of(change) for change, key in changes.items()]
    fired(len(verdicts) == len(CHANGES) + 1, "not everything was changed")
    return joined([*verdicts, training.judged(training.start(run), run)])


CASES = (
    Case("A1", "the same training twice", twice_the_same),
    Case("A2t", f"trainings stopped after steps 1 to 5 of {STEPS}", stopped_at_a_step),
    Case("A3", f"trainings killed at {KILLS} random times", killed_at_random),
    Case("A4", "killed between micro-batches, 2 workers", killed_while_it_reads),
    Case("A5", "SIGTERM once, twice", signalled),
    Case("A6", "two starts without a step; an older checkpoint", again_and_from_before),
    Case("A8", f"another experiment in the same run (saves every {EVERY})", changed),
)
