"""What export targets share: the folder that appears at once or not at all, its report, and the check on what it holds.

A target fills a temporary folder beside OUT, reads it back in the target's own library and measures how far the
features of a fixed batch are from the run's. Above its tolerance, or with a tensor unused or missing, nothing appears
under OUT. Otherwise the model card, the recipe and the report with the hash of every file are added, and one rename
gives the folder its name; a kill leaves at most `.OUT.tmp`, which the next export to OUT removes.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mim import config
from mim.config import ConfigError
from mim.contracts import ExportError, Features, LoadedRun, StorageError
from mim.handover import model_card

ALWAYS = ("mimstream", "torch", "timm", "safetensors")  # distributions whose versions every report tells
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass
class Terms:
    """What may be done with the weights; nobody but the user knows."""

    license: str = "unknown"  # of the exported weights: what data and initial weights allow
    initial_license: str = "unknown"  # of the weights that the run started from, if any


@dataclass
class Written:
    """What a target wrote into the folder, and what reading it back showed."""

    max_difference: float  # of all tokens of the fixed batch, and of the logits where there is a head
    tolerance: float
    library: str  # `library_name` of the model card
    usage: str  # how to load it, in Markdown; {folder} stands for OUT
    versions: tuple[str, ...] = ()  # further distributions that took part
    tags: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # sentences for the model card
    facts: dict[str, Any] = field(default_factory=dict)  # further entries of the report


def export_folder(
    loaded: LoadedRun, out: Path, *, target: str, terms: Terms, write: Callable[[Path], Written]
) -> dict[str, Any]:
    """Let `write` fill a temporary folder, judge what it reports, complete the folder and give it its name.

    Returns the report, which is also `report.json`. Raises ConfigError for a place that cannot be taken, ExportError
    for an export that is not what the run is, StorageError where the disk refuses.
    """
    if loaded.encoder is None:
        raise ConfigError(f"{loaded.path} has no backbone to export; export a run that trains an encoder")
    with _aside(out) as temporary:
        written = write(temporary)
        check_difference(written.max_difference, written.tolerance, target=target, run=loaded.path)
        report = {
            "target": target,
            "run": str(loaded.path),
            "step": loaded.step,
            "weights": weights_of(loaded),
            "max_difference": written.max_difference,
            "tolerance": written.tolerance,
            **written.facts,
            **_origin(loaded),
            "license": terms.license,
            "initial_license": terms.initial_license,
            "versions": _versions(written.versions),
        }
        card = model_card.text(
            loaded,
            report,
            library=written.library,
            tags=written.tags,
            usage=written.usage.replace("{folder}", str(out)),
            notes=written.notes,
        )
        (temporary / "README.md").write_text(card)
        _write_json(temporary / "recipe.json", recipe_of(loaded))
        report["files"] = _hashes(temporary)
        _write_json(temporary / "report.json", report)
    return report


def fixed_batch(loaded: LoadedRun, *, rows: int = 2, size: tuple[int, int] | None = None) -> Tensor:
    """Images (rows, C, H, W) in [0, 1] of the run's channels and size (or another): always the same."""
    size = size or loaded.views.sizes[0]
    return torch.rand(rows, loaded.encoder.channels, *size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def features(loaded: LoadedRun, images: Tensor) -> Features:
    """What the training encoder makes of images in [0, 1], in float32 on the CPU."""
    return Features(*loaded.encoder.cpu().float().eval()(images))


def largest_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Largest absolute difference over pairs of tensors, NaN if any value is; other shapes are an ExportError."""
    shapes = [tuple(t.shape) for t in ours], [tuple(t.shape) for t in theirs]
    if shapes[0] != shapes[1]:
        raise ExportError(f"the export returns tensors of {_list(shapes[1])} where the run has {_list(shapes[0])}")
    found = [(a.double() - b.double()).abs().max() for a, b in zip(ours, theirs, strict=True) if a.numel()]
    return float(torch.stack(found).max())


def check_difference(difference: float, tolerance: float, *, target: str, run: Path) -> None:
    """Raise ExportError for a difference above the tolerance; one that is not a number is above any."""
    if not difference <= tolerance:
        raise ExportError(
            f"the export to {target} differs from {run} by {difference:.3g}, above {tolerance:.3g}; nothing was written"
        )


def check_names(wanted: Iterable[str], given: Iterable[str], *, where: str) -> None:
    """Raise ExportError unless the tensors of a file are exactly those that the reader has a place for."""
    wanted, given = set(wanted), set(given)
    for names, fault in ((wanted - given, "are missing from"), (given - wanted, "are unused in")):
        if names:
            some = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ExportError(f"{len(names)} tensors {fault} {where}: {some}; nothing was written")


def check_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor], *, where: str) -> None:
    """Raise ExportError unless both hold the same tensors, bit for bit: also those that a batch does not show."""
    check_names(ours, theirs, where=where)
    for name, tensor in ours.items():
        if not torch.equal(tensor.cpu(), theirs[name].cpu()):
            raise ExportError(f"tensor {name} of {where} is not that of the run; nothing was written")


def require(*names: str, extra: str) -> None:
    """Raise ConfigError unless the distributions of an extra are installed."""
    missing = [name for name in names if not _installed(name)]
    if missing:
        raise ConfigError(f"this export needs {' and '.join(missing)}; install it: pip install 'mimstream[{extra}]'")


def weights_of(loaded: LoadedRun) -> str:
    """Which of its weights a run gives away."""
    average = loaded.config["optim"].get("ema")
    return "of the last step" if average is None else f"exponential moving average ({average})"


def recipe_of(loaded: LoadedRun) -> dict[str, Any]:
    """The sections that decide what was learned."""
    names = ("data", "mask", "encoder", "tokenizer", "teacher", "objective", "optim", "init")
    return {name: config.plain(loaded.config.get(name)) for name in names if loaded.config.get(name) is not None}


def _origin(loaded: LoadedRun) -> dict[str, Any]:
    """Hashes of the experiment and of its data (null for a run that is not on a disk), and its initial weights."""
    experiment = loaded.config.get("experiment")
    return {
        "experiment": None if experiment is None else config.digest(experiment),
        "dataset_id": (experiment or {}).get("dataset_id"),
        "initial_weights": model_card.lineage(loaded),
    }


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well, and vanishes when it does not."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; choose another folder for the export")
    place = out.resolve()
    if place == Path.cwd():
        raise ConfigError(f"{out} is the folder you are in; name another one for the export, e.g. {out / 'export'}")
    temporary = place.with_name(f".{place.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(place)  # takes the place of an empty folder
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise StorageError(error.errno, f"{out} cannot be written ({error.strerror}); choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # it is still there when anything failed


def _hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file, each brought to the disk."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
            found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def _versions(names: Sequence[str]) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in (*ALWAYS, *names) if _installed(name)}


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _list(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)
