"""Evaluations inside the loop: when they are due, on which weights they run, and where their answers go."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mim import config, ranks, sharding
from mim.config import ConfigError
from mim.contracts import LoadedRun
from mim.data.write import storing
from mim.interruption import Left, leavable
from mim.job import Config, Job
from mim.log import RunLog, aside, heard, say
from mim.probing.features import protocol
from mim.saving import checkpoint
from mim.schedules import to_steps


def intervals(cfg: Config, num_images: int) -> dict[str, int]:
    """Steps between logs, saves, checkpoints that stay (where the recipe says so) and each evaluation."""
    durations = {"log": cfg.train.log_every, "save": cfg.train.save_every}
    for name, section in cfg.evals.items():
        config.component("mim.evals", eval_section(name, section), f"evals.{name}")
        durations[name] = section["every"]
    if cfg.train.keep_every is not None:
        durations["keep"] = cfg.train.keep_every
    where = {"log": "train.log_every", "save": "train.save_every", "keep": "train.keep_every"}
    steps = {}
    for name, duration in durations.items():
        key = where.get(name, f"evals.{name}.every")
        try:
            num = to_steps(duration, batch_size=cfg.optim.batch_size, num_images=num_images, where=key)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        steps[name] = max(num, 1)
    return steps


def eval_section(name: str, section: Any) -> dict[str, Any]:
    """The component section of `evals: {NAME: {every: DURATION, option: value}}`."""
    if not isinstance(section, dict) or "every" not in section:
        raise ConfigError(f"evals.{name}.every is missing; write e.g. evals.{name}.every='10 epochs'")
    return {"name": name, **{key: value for key, value in section.items() if key != "every"}}


def look_through(job: Job, names: list[str], step: int, log: RunLog | None) -> list[str]:
    """Run evaluations one after the other. Returns those that are left to do because the run has to stop."""
    for number, name in enumerate(names):
        try:
            look(job, name, step, log)
        except Left:
            left = names[number:]
            say(f"step {step}: {', '.join(left)} at the next start", main=job.accelerator.is_main_process)
            return left
    return []


def look(job: Job, name: str, step: int, log: RunLog | None) -> None:
    """Run one evaluation on all ranks, with averaged weights if there are any; the main rank logs what it yields.

    An evaluation that deals its work out (mim/ranks.py) is shared; any other is computed by every rank alike, which
    takes no longer than by one. None of them waits for another longer than their shares differ. Raises Left on all of
    them when the run has to stop; nothing is logged then.
    """
    main_rank, stopping = job.accelerator.is_main_process, job.attendant.stopping
    job.attendant.at("evaluation", step)

    def meet() -> None:
        stopping.meet(step)

    def between() -> None:
        job.attendant.watchdog.moves()
        if stopping.now(step):  # leave, together with the others
            meet()

    module, cfg = config.component("mim.evals", eval_section(name, job.cfg.evals[name]), f"evals.{name}")
    with averaged(job) as objective, heard(main_rank), leavable(between, meet):
        ranks.share(objective.buffers())
        loaded = LoadedRun(
            objective, objective.encoder, job.built.at_hand, job.built.views, job.built.sections, step, job.run
        )
        numbers, pictures = record(module.run(loaded, cfg), job.run / "pictures", step, main=main_rank)
    meet()  # from here on it is done, on all ranks
    if name == "codebook":
        job.card = numbers
    shown = "  ".join(f"{key} {value:.4g}" for key, value in numbers.items() if "/" not in key)  # not of every class
    say(f"step {step}/{job.rates.total_steps}  {name}: {shown or ', '.join(pictures.values())}", main=main_rank)
    if log is not None:
        log.write("eval", step, eval=name, protocol=protocol(loaded, cfg), **numbers, **pictures)


def record(
    values: Any, folder: Path, step: int, *, main: bool = True, replace: bool = True
) -> tuple[dict[str, float], dict[str, str]]:
    """Split what an evaluation yields into numbers and pictures; the main rank writes pictures as PNG or GIF.

    Not to `replace` them, another picture of the same name is ConfigError.
    """
    numbers, pictures = {}, {}
    for key, value in values:
        if hasattr(value, "save"):
            path = folder / f"{key}-{step:08d}{getattr(value, 'suffix', '.png')}"
            if main:
                write_picture(path, value, replace=replace)
            pictures[key] = str(path)
        else:
            numbers[key] = float(value)
    return numbers, pictures


def write_picture(path: Path, picture: Any, *, replace: bool) -> None:
    """Write a picture; one that lies there already is left or replaced."""
    buffer = io.BytesIO()
    picture.save(buffer, path.suffix[1:].upper())
    if not replace and path.exists() and path.read_bytes() != buffer.getvalue():
        raise ConfigError(
            f"{path} is another picture; write to another folder with --out, or add --force to replace it"
        )
    with storing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside(path, "wb") as file:
            file.write(buffer.getvalue())


@contextlib.contextmanager
def averaged(job: Job) -> Iterator[Any]:
    """The objective in evaluation mode, with the averaged weights in place while the block runs (all ranks).

    Its blocks run uncompiled: evaluations come with shapes of their own, each of which would be compiled anew, and
    look inside of blocks.
    """
    if job.twin is not None:
        sharding.fill(job.twin, job.objective, job.ema)
        try:
            with torch.no_grad():
                yield job.twin.eval()
        finally:
            sharding.empty(job.twin)
        return
    objective = job.objective
    swapped = checkpoint.averaged_tensors(objective) if job.ema else {}
    kept = {name: value.clone() for name, value in swapped.items()}
    for name, value in swapped.items():
        value.copy_(job.ema[name])
    job.model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield objective
    finally:
        for name, value in swapped.items():
            value.copy_(kept[name])
        job.model.train()


@contextlib.contextmanager
def whole(job: Job) -> Iterator[Any]:
    """The objective in training mode, uncompiled, to call any method of; what the block changes stays (all ranks)."""
    if job.twin is None:
        with torch.compiler.set_stance("force_eager"):
            yield job.objective
        return
    sharding.fill(job.twin, job.objective, {})
    try:
        yield job.twin.train()
        sharding.put_back(job.objective, job.twin)
    finally:
        sharding.empty(job.twin)
