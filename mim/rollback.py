"""After an incident of the guard: what was going on is written down, and the run returns to its last good checkpoint.

    RUN/incidents/step-00012300.json   why and where, the keys of the last steps' samples, statistics of every weight,
                                       buffer and average, gradients and outputs of every layer on the last
                                       micro-batch of each rank, and the lines that the log loses

The log is cut back to that checkpoint, as at a resume, and gets the lines `rollback` and `intervention` at its step:
later resumes keep them. Checkpoints after it are deleted, or a resume would take them.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import shutil
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from mim import ranks
from mim.contracts import Batch, NumericsError, StorageError
from mim.guard import MAX_ROLLBACKS, RATE_FACTOR, Guard, Incident
from mim.interventions import Intervention, position_at
from mim.job import Job, restore, status
from mim.log import RunLog, read_log, say, write_json
from mim.saving import checkpoint, resume, retention
from mim.saving.saver import Saver


def roll_back(job: Job, saver: Saver, guard: Guard, incident: Incident, batch: Batch) -> dict[str, Any]:
    """Return the run to its newest good checkpoint (called on all ranks); returns the state to go on from.

    `batch` is the last micro-batch; no save is in flight. Raises NumericsError when the run was rolled back too often,
    or cannot be; StorageError when its directory is another job's by now.
    """
    before = job.rates.interventions
    good = last_good(job.run, incident, job.accelerator.device)
    refused = None
    if len(before) >= MAX_ROLLBACKS:
        refused = f"{MAX_ROLLBACKS} returns to a checkpoint did not help"
    elif good is None:
        refused = f"there is no valid checkpoint of a step before {incident.first} to return to"
    intervention = None
    if refused is None and good is not None:
        to = checkpoint.step_of(good)
        read = job.position(incident.step)
        before = tuple(one._replace(step=min(one.step, to)) for one in before)  # they hold from here on, too
        intervention = Intervention(to, read - position_at(to, job.cfg.optim.batch_size, before), RATE_FACTOR)
    file = write_incident(job, guard, incident, batch, intervention)
    if refused is not None or good is None or intervention is None:
        _give_up(job, incident, f"step {incident.step}: {incident.reason}, and {refused}; see {file}, and try")
    check_lease(saver)
    to = intervention.step
    said = (
        f"step {incident.step}: {incident.reason}; returning to {good}, leaving out {intervention.skipped} images, "
        f"at {intervention.rate_factor:g} times the rate (rollback {len(before) + 1} of {MAX_ROLLBACKS}; {file})"
    )
    say(said, main=job.accelerator.is_main_process)
    if job.accelerator.is_main_process:
        forget(job.run, to)
        told = {"rollback": len(before) + 1, "found_at": incident.step, "first_bad": incident.first}
        try:
            log = RunLog(job.run / "log.jsonl", to, rollbacks=len(before))
            log.write("rollback", to, **told, reason=incident.reason, report=str(file.relative_to(job.run)))
            log.write("intervention", rollback=len(before) + 1, **intervention._asdict())
            log.close()
        except OSError as error:
            raise StorageError(f"{job.run / 'log.jsonl'} cannot be cut back to step {to}: {error.strerror}") from error
    ranks.wait()
    status(job, "running", to)
    state = restore(job, good)
    kept = [one._asdict() for one in (*before, intervention)]
    return {**state, "interventions": kept}


def _give_up(job: Job, incident: Incident, sentence: str) -> NoReturn:
    remedy = "a lower optim.lr, a longer optim.warmup, optim.clip_grad or train.precision=bf16 (or no) in a new run"
    reason = f"{sentence} {remedy}"
    if job.accelerator.is_main_process:
        entry = {"event": "failed", "step": incident.step, "reason": incident.reason}
        with contextlib.suppress(OSError), (job.run / "log.jsonl").open("a") as log:  # the error says it, too
            log.write(json.dumps(entry) + "\n")
    raise NumericsError(reason)


def last_good(run: Path, incident: Incident, device: torch.device) -> Path | None:
    """The newest valid checkpoint of a step before the first bad one (called on all ranks); None if there is none.

    A checkpoint is written before the next log finds out, so one of a later step may hold what went wrong.
    """
    main_rank = ranks.place()[0] == 0
    names = [folder.name for folder in checkpoint.list_checkpoints(run)] if main_rank else []
    folders = [run / "checkpoints" / name for name in ranks.gather(names, device)]
    return checkpoint.first_valid(
        [folder for folder in folders if checkpoint.step_of(folder) < incident.first],
        lambda folder: resume.verify_together(folder, device),
        report=lambda line: say(line, main=main_rank),
    )


def check_lease(saver: Saver) -> None:
    """Raise StorageError on all ranks when another job has taken the run directory over: nothing is deleted then."""
    taken = []
    try:
        if saver.lease is not None:
            saver.lease.check()
    except OSError as error:
        taken = [str(error)]
    if told := ranks.gather(taken):
        raise StorageError(told[0])


def forget(run: Path, step: int) -> None:
    """Delete the checkpoints after a step; a rename takes each of them back first, so a kill leaves none by halves.

    A pinned one loses its name alone, so that no resume takes it.
    """
    for folder in checkpoint.list_checkpoints(run):
        if checkpoint.step_of(folder) > step:
            if retention.pinned(folder):
                left = folder.rename(folder.with_name(f"left-{folder.name}-{secrets.token_hex(4)}"))
                say(f"{folder} was pinned: it stays as {left}, and no resume takes it")
                continue
            aside = folder.with_name(f".tmp-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            shutil.rmtree(aside)


# ---- the report ----------------------------------------------------------------------------------


def write_incident(job: Job, guard: Guard, incident: Incident, batch: Batch, intervention: Intervention | None) -> Path:
    """Write what is known about an incident (called on all ranks). Returns the file."""
    file = job.run / "incidents" / f"step-{incident.step:08d}.json"
    number = len(job.rates.interventions) + 1
    if number > 1:  # the same step may go wrong again
        file = file.with_stem(f"{file.stem}-{number}")
    objective = job.objective
    parameters = {name: value for name, value in objective.named_parameters() if value.requires_grad}
    buffers = {name: value for name, value in objective.named_buffers() if value.is_floating_point()}
    report: dict[str, Any] = {
        **{"step": incident.step, "first_bad": incident.first, "reason": incident.reason},
        **{"recipe": job.recipe, "interventions": [one._asdict() for one in job.rates.interventions]},
        "intervention": intervention._asdict() if intervention is not None else None,
        "losses_before": [_number(value) for value in guard.losses],
        "steps": steps_of(job, guard),
        "weights": summaries(parameters),
        "buffers": summaries(buffers),
        "averages": summaries(job.ema),
        "last_micro_batch": ranks.gather([replay(job, incident.step, batch)], job.accelerator.device),
    }
    if job.accelerator.is_main_process:
        after = intervention.step if intervention is not None else 0
        report["log"] = [entry for entry in read_log(job.run / "log.jsonl") if entry["step"] > after]
        try:
            file.parent.mkdir(exist_ok=True)
            write_json(file, report)
        except OSError as error:  # the report must not stand in the way of the rollback either
            say(f"{file} could not be written: {error.strerror}")
    return file


def steps_of(job: Job, guard: Guard) -> list[dict[str, Any]]:
    """The last steps: positions, gradient norm, and keys of the samples of all ranks."""
    mine = [{"step": step.number, "keys": step.keys} for step in guard.steps]
    keys: dict[int, dict[str, None]] = {}
    for entry in ranks.gather(mine, job.accelerator.device):
        keys.setdefault(entry["step"], {}).update(dict.fromkeys(entry["keys"]))  # rows that only pad repeat one
    return [
        {
            "step": step.number,
            "positions": [job.position(step.number - 1), job.position(step.number)],  # from, to
            "skipped": step.finite is not None and not bool(step.finite),
            "grad_norm": _number(float(step.grad_norm)) if step.grad_norm is not None else None,
            "keys": list(keys[step.number]),
        }
        for step in guard.steps
    ]


def replay(job: Job, step: int, batch: Batch) -> dict[str, Any]:
    """One more forward and backward pass of this rank's last micro-batch, in evaluation mode: what each layer does."""
    objective, outputs = job.objective, dict[str, Tensor]()
    progress = torch.tensor((step - 1) / job.rates.total_steps, device=job.accelerator.device)

    def watch(name: str) -> Any:
        return lambda _module, _inputs, out: outputs.update({name: out.detach()}) if isinstance(out, Tensor) else None

    leaves = [(name, module) for name, module in objective.named_modules() if not list(module.children())]
    hooks = [module.register_forward_hook(watch(name)) for name, module in leaves]
    found: dict[str, Any] = {"rank": ranks.place()[0], "keys": list(dict.fromkeys(batch["keys"]))}
    objective.eval()
    try:
        # Compiled code has no hooks on what is inside a block.
        with torch.compiler.set_stance("force_eager"), job.accelerator.autocast():
            loss = objective(batch, progress)["loss"]
        found["loss"] = [_number(value) for value in loss.tolist()]
        found["gradients"] = summaries(_gradients(objective, (loss * batch["weight"]).sum()))
    except RuntimeError as error:  # the report must not stand in the way of the rollback
        found["error"] = " ".join(str(error).split())[:500]
    finally:
        for hook in hooks:
            hook.remove()
        objective.train()
    return found | {"outputs": summaries(outputs)}


def _gradients(objective: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Of this rank alone, by parameter. Sharded parameters have none of their own."""
    trained = [(n, p) for n, p in objective.named_parameters() if p.requires_grad and not hasattr(p, "full_tensor")]
    if not trained:
        return {}
    gradients = torch.autograd.grad(loss, [parameter for _, parameter in trained], allow_unused=True)
    return {name: g for (name, _), g in zip(trained, gradients, strict=True) if g is not None}


@torch.no_grad()
def summaries(tensors: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Norm and largest magnitude of what is finite in each tensor, and how many values are not. One host sync."""
    rows = []
    for tensor in tensors.values():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        values = whole.detach().double().flatten()
        finite = values.isfinite()
        kept = torch.where(finite, values, 0.0)
        largest = kept.abs().max() if len(kept) else kept.sum()
        rows.append(torch.stack([kept.norm(), largest, (~finite).sum().double()]))
    numbers = torch.stack(rows).tolist() if rows else []
    return {
        name: {"shape": list(tensor.shape), "norm": norm, "max": largest, "not_finite": int(count)}
        for (name, tensor), (norm, largest, count) in zip(tensors.items(), numbers, strict=True)
    }


def _number(value: float) -> float | str:
    """JSON knows neither infinity nor nan."""
    return value if math.isfinite(value) else str(value)
