"""The run directory: what a checkpoint holds, which ones are valid, and how one is read.

    RUN/config.yaml  log.jsonl  journal.jsonl  status.json  pictures/  checkpoints/step-00001200/
        tensors/*.safetensors   model, optimizer and average, written by torch.distributed.checkpoint (no pickle)
        tokenizer.safetensors, tokenizer.json   of a tokenizer run
        state.json              step, position in the stream, identity of the order, sums of the open log interval,
                                samples that could not be decoded
        manifest.json           size and sha256 of every file, written last
        PINNED                  while someone wants to keep it (retention.py); the one file that may come later

A checkpoint is written aside, hashed into its manifest, and renamed (saver.py): that rename is the one commit
point, so whatever has the name `step-*` was complete when it appeared.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from mim import config, ranks
from mim.config import ConfigError
from mim.log import say
from mim.saving.snapshot import quiet

FORMAT = 1  # of the run directory; raised when an older program could misread it
PINNED = "PINNED"  # its name in a checkpoint
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def gather_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, ema: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name every tensor of the training state: `model.*`, `optimizer.*`, `ema.*`, free of wrapper prefixes."""
    state: dict[str, Any] = {f"model.{name}": value for name, value in get_model_state_dict(model).items()}
    optimizer_state = get_optimizer_state_dict(model, optimizer, options=FLAT)
    for name, value in optimizer_state.items():
        if isinstance(value, Tensor):  # LAMB's groups count their steps: one tensor under the names of all parameters
            state[f"optimizer.{name}"] = value.clone() if name.startswith("param_groups.") else value
    return state | {f"ema.{name}": value for name, value in ema.items()}


def averaged_tensors(objective: nn.Module) -> dict[str, Tensor]:
    """What `optim.ema` averages, by name: trained parameters, and the buffers that training moves along with them.

    A codebook, a whitening or the statistics of a BatchNorm belong to the weights of their own step: beside averaged
    weights they would be wrong.
    """
    trained = {name: p.detach() for name, p in objective.named_parameters() if p.requires_grad}
    saved = objective.state_dict().keys()
    return trained | {n: b for n, b in objective.named_buffers() if n in saved and b.is_floating_point()}


def newest(run: Path, *, report: Callable[[str], None] = say) -> Path | None:
    """The newest valid checkpoint of a run; each rejected one is reported with its reason. None if there is none.

    A run that has checkpoints, none of them valid, is an error: never a silent fresh start.
    """
    folders = list_checkpoints(run)
    found = first_valid(folders, verify, report=report)
    if found is None and folders:
        raise none_valid(run, len(folders))
    return found


def first_valid(
    folders: list[Path],
    why_not: Callable[[Path], str | None],
    *,
    report: Callable[[str], None],
    rejected: list[dict[str, str]] | None = None,
) -> Path | None:
    """The newest of some checkpoints, given oldest first, for which `why_not` has no reason; None if there is none.

    Each one that is passed over is reported, and added to `rejected`.
    """
    for folder in reversed(folders):
        reason = why_not(folder)
        if reason is None:
            return folder
        report(f"checkpoint {folder} is rejected: {reason}")
        if rejected is not None:
            rejected.append({"checkpoint": folder.name, "reason": reason})
    return None


def none_valid(run: Path, count: int) -> ConfigError:
    """A run that has checkpoints, none of them valid."""
    return ConfigError(
        f"{run} holds {count} checkpoints and none is valid (reasons above); "
        f"restore one, or choose another train.run to start afresh"
    )


def list_checkpoints(run: Path) -> list[Path]:
    """Committed checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    names = [p for p in folder.iterdir() if re.fullmatch(r"step-\d{8,}", p.name)] if folder.is_dir() else []
    return sorted(names, key=step_of)


def step_of(folder: Path) -> int:
    """Step in the name of a checkpoint folder."""
    return int(folder.name.removeprefix("step-"))


def verify(
    folder: Path, *, share: tuple[int, int] | None = (0, 1), advance: Callable[[int], None] = lambda size: None
) -> str | None:
    """Compare a checkpoint with its manifest; return the reason why it is not valid, or None.

    Sizes are compared in full. `share` (rank, ranks): only every `ranks`-th file is hashed, the largest being dealt out
    first; None: no file is. `advance` is told the bytes of each file.
    """
    try:
        manifest = read_json(folder / "manifest.json")
        written_as = int(manifest["format"])
        files = {name: (int(entry["size"]), entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its manifest is missing or unreadable"
    if written_as < 1:
        return "its manifest is unreadable"
    if written_as > FORMAT:
        return f"its manifest has format {written_as}, newer than this program's {FORMAT}"
    for index, (name, (size, sha256)) in enumerate(sorted(files.items(), key=lambda item: -item[1][0])):
        path = folder / name
        if not path.is_file():
            return f"{name} is missing, which its manifest lists"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of the {size} of its manifest"
        hashed = share is not None and index % share[1] == share[0]
        if hashed and _sha256(path) != sha256:
            return f"the content of {name} does not match its hash in the manifest"
        advance(size)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    foreign = sorted(found - files.keys() - {"manifest.json", PINNED})
    if foreign:  # a reader would take tensors from any file that lies there
        return f"{foreign[0]} is not in its manifest"
    return None


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: dict[str, Tensor]) -> dict[str, Any]:
    """Load a checkpoint into prepared modules. Returns its state.json.

    All or nothing: everything is read into tensors of its own, and is only copied once all of it is there.
    """
    state = {name: torch.empty_like(value) for name, value in gather_tensors(model, optimizer, ema).items()}
    load_tensors(folder, state)
    set_model_state_dict(model, part(state, "model."))
    _set_optimizer(model, optimizer, state)
    for name, value in ema.items():
        value.copy_(state[f"ema.{name}"])
    return read_json(folder / "state.json")


def restore_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimizer of a checkpoint alone, for a new run from another's weights; all sizes must agree."""
    state = {k: v for k, v in gather_tensors(model, optimizer, {}).items() if k.startswith("optimizer.")}
    load_tensors(folder, state)
    _set_optimizer(model, optimizer, state)


def _set_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    groups = get_optimizer_state_dict(model, optimizer, options=FLAT)
    set_optimizer_state_dict(model, optimizer, {**groups, **part(state, "optimizer.")}, options=FLAT)


def read_config(run: Path) -> dict[str, Any]:
    """The resolved recipe of a run directory."""
    file = run / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{run} is not a run directory: it holds no config.yaml")
    saved = config.from_yaml(file)
    if saved.get("format", 0) > FORMAT:
        raise ConfigError(
            f"{run} was written by a newer mimstream (format {saved['format']}, this one reads up to {FORMAT}); upgrade"
        )
    return saved


def load_tensors(folder: Path, state: dict[str, Tensor], *, alone: bool = False) -> None:
    """Fill the named tensors in place from a checkpoint; every one must be there with its shape.

    All ranks call it together and fail together; `alone`, a rank reads for itself while others may do something else.
    Raises ConfigError for tensors that do not fit, cannot be read or are not finite.
    """
    reader = HuggingFaceStorageReader(str(folder / "tensors"))
    try:
        with quiet():
            reader.read_metadata()  # of which torch would log a traceback
            dcp.load(state, storage_reader=reader, no_dist=alone or not dist.is_initialized())
    except dcp.api.CheckpointException as error:
        reason = next((str(found) for found, _ in error.failures.values()), str(error))  # of the first rank
        raise ConfigError(f"{folder} does not fit the recipe: {' '.join(reason.split())[:500]}") from error
    except (RuntimeError, KeyError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{folder} does not fit the recipe: {' '.join(str(error).split())[:500]}") from error
    broken = [name for name, value in sorted(state.items()) if value.is_floating_point() and not _finite(value)]
    if bool(broken) if alone else ranks.agree(bool(broken)):
        first = f", first in {broken[0]}" if broken else ""
        raise ConfigError(f"{folder} holds values that are not finite{first}; take an earlier checkpoint")


def _finite(value: Tensor) -> bool:
    """Whether every value of this rank's part of a tensor is a finite number."""
    return bool(getattr(value, "_local_tensor", value).isfinite().all())


def read_tensors(folder: Path, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names start with one of the prefixes, in the shapes that it has."""
    known = HuggingFaceStorageReader(str(folder / "tensors")).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in known.items()
        if name.startswith(prefixes) and isinstance(entry, TensorStorageMetadata)
    }
    load_tensors(folder, state, alone=True)
    return state


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def part(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The tensors whose name starts with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
