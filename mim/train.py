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
    checkpoint,
    config,
    experiment,
    frozen_networks,
    launching,
    lease,
    optim,
    ranks,
    sharding,
    weights,
)
from mim.contracts import Batch, DataError
from mim.data import mixture, quarantine, shuffle, stages, stream
from mim.job import Config, Job, num_workers, status
from mim.log import Averages, Progress, RunLog, say
from mim.looking import averaged, intervals, look, whole
from mim.saver import Saver
from mim.stopping import DONE, STOPPED, Stop, stop_signals


def main(recipe: str, overrides: list[str], *, dry_run: bool = False, stop: Stop | None = None) -> int:
    """Train a recipe; rerunning the same command resumes it. Returns the exit code: 0 done, 75 stopped and resumable.

    `stop(step)` is asked after optimizer steps; by default it answers yes after SIGTERM or Ctrl-C.
    """
    with contextlib.ExitStack() as at_exit:
        return prepare_and_fit(recipe, overrides, dry_run=dry_run, stop=stop, at_exit=at_exit)


def prepare_and_fit(
    recipe: str, overrides: list[str], *, dry_run: bool, stop: Stop | None, at_exit: contextlib.ExitStack
) -> int:
    """Wire everything that a recipe names, then train; what must be given back at the end goes to `at_exit`."""
    # ---- recipe ------------------------------------------------------------------------------------------------------
    cfg = config.typed(Config, config.read(recipe, overrides))
    run = Path(cfg.train.run or f"runs/{Path(recipe).stem}").expanduser()

    # ---- launch ------------------------------------------------------------------------------------------------------
    accelerator = launching.launch(cfg, run)
    main_rank = accelerator.is_main_process
    held = None if dry_run else at_exit.enter_context(lease.hold(run))

    # ---- data and networks -------------------------------------------------------------------------------------------
    with accelerator.main_process_first():
        dataset, _ = build.open_data(config.plain(cfg))
    rates = optim.resolve(cfg.optim, len(dataset))
    intervals(cfg, len(dataset))  # a mistake in them is refused here, before anything is written
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
    resumed = experiment.find_resume(run, learned, main_rank)
    with accelerator.main_process_first():  # one process downloads what encoder.init names
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
    name = Path(recipe).stem
    job = Job(cfg, run, built, rates, dataset, sequence, journal, learned, accelerator, model, optimizer, ema, name)
    job.twin = wrapped.twin
    state: dict[str, Any] = {"step": 0, "look": start.report is not None}
    optim.allocate(optimizer.optimizer)
    if start.optimizer is not None:
        checkpoint.restore_optimizer(start.optimizer, model, optimizer.optimizer)
    if resumed is not None:
        state = checkpoint.restore(resumed, model, optimizer.optimizer, ema)
        job.card = tokenizers.score_card(resumed)
        journal.restore(state.get("bad", []))
        if accelerator.scaler is not None and state.get("scaler"):
            accelerator.scaler.load_state_dict(state["scaler"])
        say(
            f"resumed at step {state['step']} of {rates.total_steps}, position {state['position']} of the stream",
            main=main_rank,
        )
    if cfg.train.trackers:
        accelerator.init_trackers("mimstream")
    keep_every = intervals(cfg, len(dataset)).get("keep")
    saver = at_exit.enter_context(
        Saver(run, held, keep=cfg.train.keep, keep_every=keep_every, failed_saves=cfg.train.failed_saves)
    )
    with stop_signals() as signalled:
        return fit(job, state, saver, stop or signalled)


def fit(job: Job, state: dict[str, Any], saver: Saver, stop: Stop) -> int:
    """Train from a saved state to the end, or until a stop is asked for. Returns the exit code.

    Raises DataError above the budget of bad samples, after the step is saved: a larger budget goes on from there;
    StorageError on all ranks when checkpoints cannot be written (mim/saver.py).
    """
    cfg, accelerator, model, optimizer = job.cfg, job.accelerator, job.model, job.optimizer
    device, world, main_rank = accelerator.device, accelerator.num_processes, accelerator.is_main_process
    start, total, batch_size = state["step"], job.rates.total_steps, cfg.optim.batch_size
    objective = job.objective
    every = intervals(cfg, len(job.dataset))
    averages = Averages(state.get("averages") if main_rank else None)
    fingerprint = state.get("fingerprint", 0) if main_rank else 0  # the ranks' shares are added when it is read
    kept = start or -1  # no checkpoint has step 0: its lines are of an earlier attempt
    log, bad_log = (RunLog(job.run / f"{n}.jsonl", kept) if main_rank else None for n in ("log", "journal"))
    progress_line = Progress(start, total, batch_size=batch_size, main=main_rank)
    saver.tell = lambda event, at, **values: tell(job, log, event, at, **values)
    waiting = stages.Waiting(num_workers(cfg.train.workers))
    excess: str | None = None
    status(job, "running", start)
    for name in cfg.evals if state.get("look") else ():  # what the weights are worth before the first step
        look(job, name, 0, log)
    if start == 0 and not state.get("look") and hasattr(objective, "start"):
        with whole(job) as plain:
            plain.start(on_device(job, batch) for batch in loader(job, 0))
        for name, value in checkpoint.averaged_tensors(objective).items() if job.ema else ():
            job.ema[name].copy_(value)
    batches = iter(loader(job, start))
    present = sharding.local(checkpoint.averaged_tensors(objective).values())  # training changes them in place
    average = sharding.local(job.ema.values())
    model.train()

    for step in range(start + 1, total + 1):  # `step` counts committed updates: 1 after the first
        lr, weight_decay = job.rates.at(step - 1)
        optim.set_rates(optimizer, lr, weight_decay, job.rates.encoder_scale(step - 1))
        progress = torch.tensor((step - 1) / total, device=device)

        # ---- gradient of one global batch ----------------------------------------------------------------------------
        for micro in range(cfg.train.micro_batches):
            began = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - began
            progress_line.waited(waited)
            waiting.batch(waited, batch["seconds"], len(batch["keys"]))
            seed_draws(cfg.optim.seed, step, accelerator.process_index, micro)
            batch = on_device(job, batch)
            last = micro == cfg.train.micro_batches - 1
            with contextlib.nullcontext() if last else sharding.adding_up(model):  # the last takes the ranks' mean
                out = model(batch, progress)
                accelerator.backward((out["loss"] * batch["weight"]).sum() * (world / batch_size))
            averages.add(out, batch["weight"])
            fingerprint = (fingerprint + batch["fingerprint"]) % stream.FINGERPRINT_MODULUS
            job.journal.add(step, batch["bad"])

        # ---- update; skipped when the gradient is not finite ---------------------------------------------------------
        norm = clip(accelerator, model, cfg.optim.clip_grad)
        finite = torch.isfinite(norm)
        optim.update(optimizer, finite, accelerator.scaler)
        optimizer.zero_grad()
        averages.add_step({"grad_norm": torch.where(finite, norm, 0.0), "skipped": ~finite}, world)
        if hasattr(objective, "after_step"):
            objective.after_step(step, progress)
        if cfg.optim.ema is not None:
            torch._foreach_lerp_(average, present, 1 - cfg.optim.ema)
        progress_line.advance()
        for line in waiting.step(time.perf_counter()):
            say(line, main=main_rank)

        # ---- log, look, save -----------------------------------------------------------------------------------------
        ending = step == total
        logging = ending or step % every["log"] == 0
        if world == 1 or logging:
            saver.check()
        stopping = ranks.agree(stop(step)) if world == 1 or logging else False
        saving = stopping or ending or step % every["save"] == 0
        if logging or saving:
            job.journal.collect(bad_log, lambda found: ranks.gather(found, device))
            excess = job.journal.excess()  # from here on all ranks agree
        if logging:
            values: dict[str, Any] = averages.read(ranks.add)
            values |= {"lr": lr, "weight_decay": weight_decay, "epoch": step * batch_size / len(job.dataset)}
            values |= {"num_bad": len(job.journal.bad), **progress_line.rates(step)}
            fingerprint = ranks.total_fingerprint(fingerprint, device, main_rank)
            progress_line.show(step, values)
            accelerator.log(values, step=step)
            if log is not None:
                log.write("train", step, **values, position=step * batch_size, fingerprint=f"{fingerprint:016x}")
        for name in cfg.evals:
            if ending or step % every[name] == 0:
                look(job, name, step, log)
        if saving or excess:
            fingerprint = ranks.total_fingerprint(fingerprint, device, main_rank)
            save(job, saver, step, fingerprint, averages, wait=bool(stopping or ending or excess))
        if excess or (stopping and not ending):
            break

    progress_line.close()
    if excess:
        status(job, "failed", step, reason=excess)
        raise DataError(f"{excess}; step {step} is saved, the same command goes on from there")
    code = DONE if start == total or step == total else STOPPED
    if code == DONE:
        backbone_file.write(job, total, again=start < total)
    status(job, "done" if code == DONE else "stopped", total if code == DONE else step)
    last_words = f"done: {job.run}" if code == DONE else f"stopped at step {step}; the same command resumes"
    say(last_words, main=main_rank)
    if cfg.train.trackers:
        accelerator.end_training()
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
        position=start * cfg.optim.batch_size,
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


def save(job: Job, saver: Saver, step: int, fingerprint: int, averages: Averages, *, wait: bool) -> None:
    """Write a checkpoint (all ranks) in the background, or `wait` for it."""
    buffers = dict(job.objective.named_buffers())
    ranks.share([*buffers.values(), *(job.ema[name] for name in buffers if name in job.ema)])  # whichever rank writes
    state = {
        "position": step * job.cfg.optim.batch_size,
        "fingerprint": fingerprint,
        "averages": averages.state(ranks.add),
        "bad": job.journal.state(),
        "order": job.sequence.identity(),
        "scaler": job.accelerator.scaler.state_dict() if job.accelerator.scaler is not None else None,  # of fp16
        "experiment": config.digest(job.experiment),
        "versions": {"mimstream": __version__, "torch": torch.__version__},
    }
    tensors = checkpoint.gather_tensors(job.model, job.optimizer.optimizer, job.ema)
    saver.save(step, tensors, state, write_extra=tokenizer_writer(job), wait=wait)
    status(job, "running", step)


def tell(job: Job, log: RunLog | None, event: str, step: int, **values: Any) -> None:
    """Put what happened to a save into log.jsonl and status.json."""
    if log is not None:
        log.write(event, step, **values)
    status(job, "failed" if values["stops"] else "running", step, reason=values["reason"])


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
