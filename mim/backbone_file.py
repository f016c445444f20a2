"""`backbone.safetensors`: the encoder of a finished run, whole and under timm's names, whatever layout trained it.

It lies in the run directory, and needs nothing of ours to be read:

    with safe_open("RUN/backbone.safetensors", "pt") as file:
        facts, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    model = timm.create_model(facts["model"], **json.loads(facts["model_args"]))
    model.load_state_dict(tensors)  # images - mean, / std, both in facts too

The weights are the average of the run where it has one. `mim export timm` writes more: preprocessing, a card, a check
of the features, of any checkpoint.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import get_model_args
from torch import Tensor

from mim import __version__, ranks
from mim.contracts import StorageError
from mim.job import Job
from mim.log import say
from mim.looking import averaged
from mim.pretrained.weights import backbone_of

NAME = "backbone.safetensors"
OURS_ALONE = ("weight_init", "dynamic_img_size")  # arguments of timm that say nothing of the weights


def write(job: Job, step: int, *, again: bool) -> None:
    """Write the file at the end of a run (all ranks); not `again`, only where it is missing.

    Raises StorageError when what the disk gives back is not what was written.
    """
    main_rank, path = job.accelerator.is_main_process, job.run / NAME
    if job.objective.encoder is None or not ranks.agree(main_rank and (again or not path.is_file())):
        return
    with averaged(job) as objective:
        backbone: Any = backbone_of(objective.encoder)
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in backbone.state_dict().items()}
        facts = describe(objective.encoder)
    if not main_rank:
        return
    momentum = job.cfg.optim.ema
    facts |= {"model": job.built.sections["encoder"]["model"], "step": str(step)}
    facts |= {"weights": "last" if momentum is None else f"average of momentum {momentum}"}
    write_verified(path, tensors, facts)
    say(f"encoder: {path} ({len(tensors)} tensors, weights: {facts['weights']})")


def describe(encoder: Any) -> dict[str, str]:
    """What a reader needs to build the module and to feed it: text, as safetensors keeps it."""
    arguments = get_model_args(backbone_of(encoder))
    return {
        "format": "pt",
        "mimstream": __version__,
        "model_args": json.dumps({key: value for key, value in arguments.items() if key not in OURS_ALONE}),
        **{name: json.dumps(getattr(encoder, name).flatten().tolist()) for name in ("mean", "std")},
    }


def write_verified(path: Path, tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    """Write tensors aside, read them back, compare every bit, and give the file its name."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(tensors, temporary, metadata=facts)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        found = load_file(temporary)
        if wrong := [name for name in tensors.keys() | found.keys() if not _same(found.get(name), tensors.get(name))]:
            raise StorageError(f"{path}: the disk gives back other values of {wrong[0]}; check the disk and rerun")
        temporary.replace(path)
    except (SafetensorError, OSError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{path} cannot be written: {error}; make room and rerun to write it") from error
    finally:
        temporary.unlink(missing_ok=True)


def _same(found: Tensor | None, wanted: Tensor | None) -> bool:
    return found is not None and wanted is not None and found.dtype == wanted.dtype and torch.equal(found, wanted)
