"""Group B, continued: trainings on any number of ranks and with any accumulation give the weights of one process."""

from __future__ import annotations

from pathlib import Path

from benchmarks.reliability.bench import OURS, Bench, Case, fired
from benchmarks.reliability.cases_runs import trainings
from benchmarks.reliability.training import Training, distance, was
from benchmarks.reliability.trials import Result
from benchmarks.reliability.verdicts import PASS, SILENT, SKIPPED, Verdict, ended, joined, last_line

SAME = 1e-5  # of weights and losses, float32
LONG = 40  # steps
SMOOTH = {"encoder__drop_path_rate": 0.0, "optim__lr": 1e-3}  # what is dropped is drawn by layout; at a rate of 3e-3
# rounding grows until a nearest code is another one


def near(training: Training, results: list[Result], run: Path) -> Verdict:
    """Judge that a run ended well, with the weights and losses of one process."""
    if fault := ended(results):
        return fault
    apart = distance(run, training.reference)
    return Verdict(PASS if apart <= SAME else SILENT, f"up to {apart:.1e} apart")


def any_world(bench: Bench, reader: str) -> Verdict:
    """B3: 40 steps on 2, 3 and 4 ranks and on one."""
    verdicts = []
    for training in trainings(bench, reader, steps=LONG, every=10, **settings(reader)):
        for world in (2, 3, 4):
            run = training.folder()
            results = training.start(run, world=world)
            verdicts.append(near(training, results, run).of(f"{training.kind}, {world} ranks"))
    return joined(verdicts)


def settings(reader: str) -> dict[str, object]:
    """What the recipes need so that worlds can be compared: no draws by layout; of the usual one, none at all."""
    return SMOOTH if reader == OURS else {"ordered": True}


def chain(bench: Bench, reader: str) -> Verdict:
    """B4: two ranks, three, one, four: a kill ends each but the last."""
    verdicts = []
    for training in trainings(bench, reader, steps=LONG, every=5, **settings(reader)):
        run = training.folder()
        for world, step in ((2, 8), (3, 17), (1, 28)):
            results = training.start(run, world=world, fault={"at": "step", "step": step, "do": "kill", "rank": 0})
            if not was(results) and reader != OURS:  # another world: it could not go on
                break
            fired(was(results), f"{world} ranks did not reach step {step}: {last_line(results[0])}")
        results = training.start(run, world=4)
        verdicts.append(near(training, results, run).of(training.kind))
    return joined(verdicts)


def any_accumulation(bench: Bench, reader: str) -> Verdict:
    """B5: four micro-batches on one rank, two on two, one on four."""
    verdicts = []
    for training in trainings(bench, reader, steps=LONG, every=10, **settings(reader)):
        for world, micro in ((1, 4), (2, 2), (4, 1)):
            run = training.folder()
            arguments = (f"train.micro_batches={micro}",) if reader == OURS else ()
            results = training.start(run, *arguments, world=world)
            verdicts.append(near(training, results, run).of(f"{training.kind}, {world} ranks x {micro}"))
    return joined(verdicts)


def sharded(bench: Bench, reader: str) -> Verdict:
    """B6: two ranks with DDP, two with FSDP2, one process, and both again; a kill ends each but the last."""
    if reader != OURS:
        return Verdict(SKIPPED, "Accelerate does not shard on CPUs")
    verdicts = []
    for training in trainings(bench, reader, steps=LONG, every=5, **SMOOTH):
        run = training.folder()
        for world, shard, step in ((2, "false", 8), (2, "true", 17), (1, "false", 23), (2, "true", 31)):
            fault = {"at": "step", "step": step, "do": "kill", "rank": 0}
            results = training.start(run, f"train.shard={shard}", world=world, fault=fault)
            fired(was(results), f"step {step} was not reached: {last_line(results[0])}")
        results = training.start(run, "train.shard=false", world=2)
        verdicts.append(near(training, results, run).of(training.kind))
    return joined(verdicts)


CASES = (
    Case("B3", f"{LONG} steps on 1 to 4 ranks", any_world),
    Case("B4", "2, 3, 1 and 4 ranks with kills between", chain),
    Case("B6", "DDP, FSDP2, one process, and back, with kills", sharded),
    Case("B5", "accumulation of 4 on 1 rank, 2 on 2, 1 on 4", any_accumulation),
)
