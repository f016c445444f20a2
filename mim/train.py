"""The one program: wiring, then the one loop. Every recipe runs through it, whatever its objective.

Accelerate does launch, device, mixed precision, DDP and `backward` (`mim/launching.py`). It never sees the loader: a
prepared one reads everything on rank 0 or drops (R-1)/R of the data. Accumulation is ours too: the loss is divided by
the global batch, which makes the gradient independent of ranks and micro-batches.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import tokenizer as tokenizers
from mim import (
    __version__,
    backbone_file,
    build,
    config,
    experiment,
    frozen_networks,
    interventions,
    launching,
    optim,
    ranks,
    sharding,
)
from mim.contracts import Batch, DataError
from mim.data import mixture, quarantine, shuffle, stages, stream
from mim.data.ahead import Ahead
from mim.guard import Average, Guard, Held
from mim.job import Config, Job, num_workers, restore, status
from mim.log import Averages, Progress, RunLog, say
from mim.looking import averaged, intervals, look_through, whole
from mim.movement import update_ratio
from mim.planning import out_of_memory
from mim.pretrained import weights
from mim.report.writing import Writing, after_failure
from mim.rollback import roll_back
from mim.saving import checkpoint, lease, resume
from mim.saving.saver import Saver
from mim.trackers import Trackers, check_installed
from mim.watch import watchdog
from mim.watch.attendant import Attendant
from mim.watch.board import Board
from mim.watch.status import Status
from mim.watch.stopping import DONE, STOPPED, Stop, deadline, either, seconds


def main(recipe: str, overrides: list[str], *, dry_run: bool = False, stop: Stop | None = None) -> int:
    """Train a recipe; rerunning the same command resumes it. Returns the exit code: 0 done, 75 stopped and resumable.

    `stop(step)` is asked after optimizer steps, on all ranks alike, besides signals and the time limit.
    """
    with contextlib.ExitStack() as at_exit:
        return prepare_and_fit(recipe, overrides, dry_run=dry_run, stop=stop, at_exit=at_exit)


def prepare_and_fit(
    recipe: str, overrides: list[str], *, dry_run: bool, stop: Stop | None, at_exit: contextlib.ExitStack
) -> int:
    """Wire everything that a recipe names, then train; what must be given back at the end goes to `at_exit`."""
    # ---- recipe ------------------------------------------------------------------------------------------------------
    cfg = config.typed(Config, config.read(recipe, overrides))
    patience = None if cfg.train.timeout is None else seconds(cfg.train.timeout, "train.timeout")
    limit = deadline(cfg.train.time_limit, cfg.train.stop_before, began=time.time())
    run = Path(cfg.train.run or f"runs/{Path(recipe).stem}").expanduser()

    # ---- launch ------------------------------------------------------------------------------------------------------
    accelerator = launching.launch(cfg, *watchdog.group_options(patience))
    main_rank = accelerator.is_main_process
    board = Board.open()
    if main_rank:
        check_installed(cfg.train.trackers)
    held = None if dry_run else at_exit.enter_context(lease.hold(run))

    # ---- data and networks -------------------------------------------------------------------------------------------
    with board.main_first("data"):
        dataset, _ = build.open_data(config.plain(cfg))
    rates = optim.resolve(cfg.optim, len(dataset))
    every = intervals(cfg, len(dataset))  # a mistake in them is refused here, before anything is written
    torch.manual_seed(cfg.optim.seed)
    read = cfg.init.run or cfg.teacher or (cfg.encoder or {}).get("init")  # other weights, which a dry run checks too
    with torch.device("meta") if dry_run and not read else contextlib.nullcontext():
        built = build.build(config.plain(cfg), dataset=dataset)
    data, cache = built.views.data, built.views.cache
    tokenizer = built.frozen.get("tokenizer") if cache is None else cache.tokenizer
    verdict = frozen_networks.check_tokenizer(built.sections.get("tokenizer"), tokenizer, cache)
    sequence = mixture.order_of(dataset, seed=data.seed, lanes=data.lanes, window=data.window, repeats=data.repeats)
    journal = quarantine.Journal(mixture.bad_samples(dataset), dataset.counts, budget=data.bad_budget)

    # ---- run directory -----------------------------------------------------------------------------------------------
    learned = experiment.identity(built.sections, dataset)
    found = resume.find(run, learned, accelerator.device)
    resumed = found.checkpoint
    with board.main_first("weights"):  # one process downloads what encoder.init names
        start = weights.start(built, cfg.init.run, optimizer=cfg.init.optimizer, resumed=resumed is not None)
    for line in (*start.lines(), *verdict):
        say(line, main=main_rank)
    workers, micro_batches = num_workers(cfg.train.workers), cfg.train.micro_batches
    for line in experiment.describe(
        run, built, rates, dataset, accelerator, micro_batches=micro_batches, workers=workers
    ):
        say(line, main=main_rank)
    if main_rank:
        world = accelerator.num_processes
        for line in shuffle.report(sequence, dataset, batch_size=cfg.optim.batch_size, world=world).lines():
            say(line)
    if dry_run:
        return DONE
    accelerator.wait_for_everyone()
    if main_rank:
        experiment.open_run(run, recipe, built.sections, learned, start)
    accelerator.wait_for_everyone()
    resume.check_shared(run, accelerator.device)
    name = Path(recipe).stem
    begins = checkpoint.step_of(resumed) if resumed is not None else 0
    attendant = Attendant(board, Status(run, name, rates.total_steps, begins), patience=patience, deadline=limit)
    if main_rank:
        at_exit.enter_context(after_failure(run))  # status.json is written before
    at_exit.enter_context(attendant.attending())
    sharded, watch = launching.is_sharded(accelerator, cfg.train), attendant.watchdog
    at_exit.enter_context(out_of_memory.explained(cfg, dataset, sharded=sharded, where=lambda: watch.where))

    # ---- model and optimizer -----------------------------------------------------------------------------------------
    wrapped = launching.wrap(accelerator, built.objective, cfg)
    model, optimizer = wrapped.model, wrapped.optimizer
    if wrapped.how:
        say(wrapped.how, main=main_rank)
    for network in built.at_hand.values():
        network.to(accelerator.device)
    objective = accelerator.unwrap_model(model)
    moved = checkpoint.averaged_tensors(objective) if cfg.optim.ema is not None else {}
    ema = {name: value.clone() for name, value in moved.items()}
    job = Job(
        cfg, run, built, rates, dataset, sequence, journal, learned, accelerator, model, optimizer, ema, attendant, name
    )
    job.twin, job.every = wrapped.twin, every
    state: dict[str, Any] = {"step": 0, "look": start.report is not None}
    optim.allocate(optimizer.optimizer)
    if start.optimizer is not None:
        checkpoint.restore_optimizer(start.optimizer, model, optimizer.optimizer)
    if resumed is not None:
        state = restore(job, resumed)
        say(
            f"resumed at step {state['step']} of {rates.total_steps}, position {state['position']} of the stream, from "
            f"{resumed.name} of {state.get('ranks', '?')} ranks",
            main=main_rank,
        )
    state["start"] = found.account(state, ranks=accelerator.num_processes)
    saver = at_exit.enter_context(
        Saver(run, held, keep=cfg.train.keep, keep_every=every.get("keep"), failed_saves=cfg.train.failed_saves)
    )
    return fit(job, state, saver, either(stop, attendant.stopping))


def fit(job: Job, state: dict[str, Any], saver: Saver, stop: Stop) -> int:
    """Train from a saved state to the end, or until a stop is asked for. Returns the exit code.

    When the guard finds the training gone wrong it goes on from an earlier checkpoint, by calling itself.
    Raises DataError above the budget of bad samples, after the step is saved: a larger budget goes on from there;
    StorageError on all ranks when checkpoints cannot be written (mim/saving/saver.py); and NumericsError when no return
    to a checkpoint helps.
    """
    cfg, accelerator, model, optimizer = job.cfg, job.accelerator, job.model, job.optimizer
    device, world, main_rank = accelerator.device, accelerator.num_processes, accelerator.is_main_process
    start, total, batch_size = state["step"], job.rates.total_steps, cfg.optim.batch_size
    objective = job.objective
    every = job.every
    averages = Averages(state.get("averages") if main_rank else None)
    fingerprint = state.get("fingerprint", 0) if main_rank else 0  # the ranks' shares are added when it is read
    kept = start or -1  # no checkpoint has step 0: its lines are of an earlier attempt
    pending = state.get("looks", [])  # evaluations that a stop left undone
    job.rates = replace(job.rates, interventions=interventions.read(state.get("interventions", ())))
    rollbacks = len(job.rates.interventions)
    log, bad_log = (
        RunLog(job.run / f"{name}.jsonl", kept, again=pending, rollbacks=rollbacks) if main_rank else None
        for name in ("log", "journal")
    )
    if log is not None:
        Trackers(job.run, cfg.train.trackers, job.built.sections, log, ended=start == total)
        log.followers.append(Writing(job.run))
        if state.get("start") and start < total:
            log.write(step=start, **state["start"])
    guard = Guard(cfg.train.guard, quiet_until=job.rates.warmup_steps, scaled=accelerator.scaler is not None)
    guard.restore(state.get("guard", {}))
    incident = None
    progress_line = Progress(start, total, batch_size=batch_size, main=main_rank)
    saver.tell = lambda event, at, **values: tell(job, log, event, at, **values)
    saver.committed = lambda at: status(job, "running", at)
    waiting = stages.Waiting(num_workers(cfg.train.workers))
    excess: str | None = None
    if state.get("look"):  # what the weights are worth before the first step
        pending = list(cfg.evals)
    look_through(job, [name for name in pending if name in cfg.evals], start, log)
    if pending and start == total:  # the last ones: from now on they are done
        going_on = {name: state[name] for name in ("fingerprint", "averages", "guard")}
        save(job, saver, start, going_on | {"looks": []}, wait=True)
    if start == 0 and not state.get("look") and hasattr(objective, "start"):
        with whole(job) as plain:
            plain.start(on_device(job, batch) for batch in loader(job, 0))
        for name, value in checkpoint.averaged_tensors(objective).items() if job.ema else ():
            job.ema[name].copy_(value)
    batches = iter(loader(job, start))
    ahead = Ahead(device)
    means = None
    if cfg.optim.ema is not None:
        present = sharding.local(checkpoint.averaged_tensors(objective).values())  # training changes them in place
        means = Average(sharding.local(job.ema.values()), present, 1 - cfg.optim.ema)
    held = Held(objective)
    model.train()
    at = job.attendant.at
    job.attendant.stopping.begin(start + 1)
    pending = []

    for step in range(start + 1, total + 1):  # `step` counts committed updates: 1 after the first
        lr, weight_decay = job.rates.at(step - 1)
        optim.set_rates(optimizer, lr, weight_decay, job.rates.encoder_scale(step - 1))
        progress = torch.full((), (step - 1) / total, device=device)  # torch.tensor would wait for the device
        held.hold()

        # ---- gradient of one global batch ----------------------------------------------------------------------------
        for micro in range(cfg.train.micro_batches):
            at("data", step)
            began = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - began
            progress_line.waited(waited)
            waiting.batch(waited, batch["seconds"], len(batch["keys"]))
            seed_draws(cfg.optim.seed, step, accelerator.process_index, micro)
            batch = on_device(job, ahead(batch))
            last = micro == cfg.train.micro_batches - 1
            with contextlib.nullcontext() if last else sharding.adding_up(model):  # the last takes the ranks' mean
                at("forward", step)
                out = model(batch, progress)
                at("backward", step)
                accelerator.backward((out["loss"] * batch["weight"]).sum() * (world / batch_size))
            averages.add(out, batch["weight"])
            guard.see(step, batch["keys"])
            fingerprint = (fingerprint + batch["fingerprint"]) % stream.FINGERPRINT_MODULUS
            job.journal.add(step, batch["bad"])

        # ---- update; skipped when the gradient is not finite ---------------------------------------------------------
        at("update", step)
        norm = clip(accelerator, model, cfg.optim.clip_grad)
        finite = torch.isfinite(norm)
        optim.update(optimizer, finite, accelerator.scaler)
        optimizer.zero_grad()
        averages.add_step({"grad_norm": norm.masked_fill(~finite, 0.0), "skipped": ~finite}, world, finite=finite)
        guard.close(finite, norm)
        if hasattr(objective, "after_step"):
            objective.after_step(step, progress)
        held.put_back(finite)
        if means is not None:
            means.move(finite)
        progress_line.advance()
        for line in waiting.step(time.perf_counter()):
            say(line, main=main_rank)

        # ---- log, look, save -----------------------------------------------------------------------------------------
        at("log", step)
        ending = step == total
        logging = ending or step % every["log"] == 0
        saving = ending or step % every["save"] == 0
        if world == 1 or logging:
            saver.check()
        if logging or saving:
            job.journal.collect(bad_log, lambda found: ranks.gather(found, device))
            excess = job.journal.excess()  # from here on all ranks agree
        if logging:
            values: dict[str, Any] = averages.read(ranks.add)
            loss, position = values.get("loss"), job.position(step)
            values |= {"lr": lr, "weight_decay": weight_decay, "epoch": position / len(job.dataset)}
            values |= {"num_bad": len(job.journal.bad), **progress_line.rates(step)}
            if cfg.optim.name == "adamw":
                values["update_ratio"] = update_ratio(optimizer.optimizer)
            fingerprint = ranks.total_fingerprint(fingerprint, device, main_rank)
            progress_line.show(step, values)
            skipped = guard.skipped()
            if log is not None:
                for number in skipped:
                    log.write("skipped", number)
                log.write("train", step, **values, position=position, fingerprint=f"{fingerprint:016x}")
            incident = guard.judge(step, loss)
            if incident is not None:
                break
        began = time.perf_counter()
        pending = look_through(job, [name for name in cfg.evals if ending or step % every[name] == 0], step, log)
        progress_line.looked(time.perf_counter() - began)
        at("decision", step)
        stopping = stop(step)
        if stopping and not (logging or saving):
            job.journal.collect(bad_log, lambda found: ranks.gather(found, device))
            excess = job.journal.excess()
        if saving or stopping or excess:
            at("save", step)
            fingerprint = ranks.total_fingerprint(fingerprint, device, main_rank)
            going_on = {"fingerprint": fingerprint, "averages": averages.state(ranks.add), "guard": guard.state()}
            save(job, saver, step, going_on | {"looks": pending}, wait=bool(stopping or ending or excess))
        if excess or stopping:
            break

    progress_line.close()
    if incident is not None:
        at("rollback", step)
        saver.wait()
        del batches  # its workers end
        for file in filter(None, (log, bad_log)):
            file.close()
        return fit(job, roll_back(job, saver, guard, incident, batch), saver, stop)
    if excess:
        raise DataError(f"{excess}; step {step} is saved, the same command goes on from there")
    code = DONE if (start == total or step == total) and not pending else STOPPED
    if code == DONE:
        backbone_file.write(job, total, again=start < total)
    reason = job.attendant.stopping.reason if code == STOPPED else None
    status(job, "done" if code == DONE else "stopped", total if code == DONE else step, reason=reason, code=code)
    last_words = f"done: {job.run}" if code == DONE else f"stopped at step {step}; the same command resumes"
    say(last_words, main=main_rank)
    if log is not None:
        log.close()
    return code


# ---- data and draws ------------------------------------------------------------------------------


def loader(job: Job, start: int) -> Any:
    """Micro-batches of this rank from a step on, in order, `micro_batches` per step."""
    cfg, accelerator, built = job.cfg, job.accelerator, job.built
    return stream.loader(
        job.dataset,
        order=job.sequence,
        view=built.views.train,
        sizes=built.views.train_sizes,
        mask=built.views.mask,
        channels=built.views.data.channels,
        jitter=built.views.data.jitter,
        batch_size=cfg.optim.batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        micro_batches=cfg.train.micro_batches,
        position=job.position(start),
        num_steps=job.rates.total_steps - start,
        known=job.journal.bad,
        views=built.views.data.views,
        codes=built.views.cache.codes if built.views.cache is not None else None,
        label_maps=built.views.label_maps,
        workers=num_workers(cfg.train.workers),
        pin_memory=accelerator.device.type == "cuda",
    )


def on_device(job: Job, batch: Batch) -> Batch:
    """A batch on the device as the objective wants it, with what the frozen networks write into it."""
    batch = stream.to_device(batch, job.accelerator.device)
    if hasattr(job.objective, "prepare"):
        batch = job.objective.prepare(batch)
    with frozen_networks.computing(job.cfg.train.precision, job.accelerator.device):
        frozen_networks.write_targets(job.built.frozen, batch)
    return batch


def seed_draws(seed: int, step: int, rank: int, micro: int) -> None:
    """Seed the default generators of torch, numpy and python by name: resume needs no generator state.

    Drop path, dropout, erasing and mixing draw from them.
    """
    name = f"draws/{seed}/{step}/{rank}/{micro}".encode()
    number = int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "big")
    torch.manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)


# ---- update --------------------------------------------------------------------------------------


def clip(accelerator: Accelerator, model: nn.Module, max_norm: float | None) -> Tensor:
    """Clip the gradient to a norm, if one is given; return its norm before that (0-d)."""
    accelerator.unscale_gradients()
    norm = sharding.gathered(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm


# ---- log, look, save -----------------------------------------------------------------------------


def save(job: Job, saver: Saver, step: int, going_on: dict[str, Any], *, wait: bool) -> None:
    """Write a checkpoint (all ranks) in the background, or `wait` for it; `going_on` is what the loop goes on with."""
    buffers = dict(job.objective.named_buffers())
    ranks.share([*buffers.values(), *(job.ema[name] for name in buffers if name in job.ema)])  # whichever rank writes
    state = {
        "position": job.position(step),
        "interventions": [one._asdict() for one in job.rates.interventions],
        **going_on,
        "bad": job.journal.state(),
        "ranks": ranks.place()[1],
        "order": job.sequence.identity(),
        "scaler": job.accelerator.scaler.state_dict() if job.accelerator.scaler is not None else None,  # of fp16
        "experiment": config.digest(job.experiment),
        "device": experiment.device_name(job.accelerator.device),
        "versions": {"mimstream": __version__, "torch": torch.__version__},
    }
    tensors = checkpoint.gather_tensors(job.model, job.optimizer.optimizer, job.ema)
    saver.save(step, tensors, state, write_extra=tokenizer_writer(job), wait=wait)


def tell(job: Job, log: RunLog | None, event: str, step: int, **values: Any) -> None:
    """Put what happened to a save into log.jsonl and status.json."""
    if log is not None:
        log.write(event, step, **values)
    saved = job.attendant.status.step
    status(job, "failed" if values["stops"] else "running", saved, reason=values["reason"])


def tokenizer_writer(job: Job) -> Callable[[Path], None] | None:
    """What adds the tokenizer's own files to a checkpoint of its run (all ranks); None for any other run."""
    if getattr(job.objective, "tokenizer", None) is None:
        return None
    with averaged(job) as objective:
        saved = copy.deepcopy(objective.tokenizer)
        card = job.card or objective.card()  # held-out images, if the recipe evaluates them
    section = job.built.sections["tokenizer"]
    options = {key: value for key, value in section.items() if key != "name"}
    return lambda folder: tokenizers.save(saved, folder, name=section["name"], config=options, card=card)
