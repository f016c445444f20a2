"""Export to transformers: a folder that `AutoModel` and `AutoImageProcessor` load, as a native class where one fits.

`kind` is the class. A native one (`mim/hf_layouts.py`) is what heads and detectors of transformers are built on, and
needs no timm; `timm_wrapper` is timm's own module inside transformers and takes every encoder. The folder is read back
through transformers, offline: every tensor must find its place bit for bit, the configuration must be the one that was
written, pixels must be normalised as in training, and all tokens of a fixed batch must be the run's. Both sides then
use the same attention kernel, so that the model is compared and not the rounding of two kernels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mim import hf_layouts, hf_processor, timm_folder
from mim.config import ConfigError
from mim.contracts import ExportError, LoadedRun
from mim.export_folder import Terms, Written, check_tensors, export_folder, features, fixed_batch, largest_difference
from mim.export_folder import require as require_installed
from mim.hf_layouts import Native, Unfit
from mim.weights import backbone_of

WRAPPER = "timm_wrapper"
KINDS = ("auto", WRAPPER, *hf_layouts.KINDS)
WEIGHTS = "model.safetensors"
USAGE = """```python
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{{folder}}")
model = AutoModel.from_pretrained("{{folder}}"{options}).eval()  # {architecture}
tokens = model(**processor(image, return_tensors="pt")).last_hidden_state  # class token, registers, patches
```"""


@dataclass
class Config:
    # auto: a native class if one computes what the encoder computes, else timm_wrapper
    kind: str = "auto"  # auto | timm_wrapper | dinov2 | dinov2_with_registers | vit | beit
    pool: str = (
        "class"  # of kind=beit, what `pooler_output` is: class | mean (normed after the mean, as fine-tuning has it)
    )
    license: str = "unknown"  # of the exported weights: what data and initial weights allow
    initial_license: str = "unknown"  # of the weights that the run started from, if any


def export(loaded: LoadedRun, out: Path, cfg: Config) -> dict[str, Any]:
    """Write the folder, reload it with transformers and compare. Returns the report that is also `report.json`."""
    require_installed("transformers", extra="hf")
    if cfg.kind not in KINDS:
        raise ConfigError(f"kind={cfg.kind!r} is unknown; choose {', '.join(KINDS)}")
    if cfg.pool not in hf_layouts.POOLS:
        raise ConfigError(f"pool={cfg.pool!r} is unknown; choose {' or '.join(hf_layouts.POOLS)}")
    terms = Terms(cfg.license, cfg.initial_license)
    return export_folder(
        loaded, out, target="transformers", terms=terms, write=lambda folder: write(loaded, folder, cfg)
    )


def write(loaded: LoadedRun, folder: Path, cfg: Config) -> Written:
    """Write configuration, weights and image processor of the chosen kind, and compare."""
    kind, native, reasons = choose(backbone_of(loaded.encoder).cpu().float().eval(), cfg)
    if native is None:
        timm_folder.write(loaded, folder, license=cfg.license)
        hf_processor.write_timm(loaded, folder)
    else:
        tensors = {name: tensor.contiguous() for name, tensor in native.tensors.items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        config = {"architectures": [native.architecture], "dtype": "float32", **native.config}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        hf_processor.write(loaded, folder)
    with sdpa_kernel(SDPBackend.MATH):
        difference = compare(loaded, folder, native)
    options = {} if native is None else native.options
    architecture = "TimmWrapperModel" if native is None else native.architecture
    shown = "".join(f", {name}={value!r}" for name, value in options.items())
    return Written(
        difference,
        tolerance=hf_layouts.EXACT if native is None else native.tolerance,
        library="transformers",
        usage=USAGE.format(options=shown, architecture=architecture),
        versions=("transformers", "huggingface_hub"),
        tags=("transformers", *(("timm",) if native is None else ())),
        notes=(*hf_processor.notes(loaded), *(f"Not of kind {name}: {reason}." for name, reason in reasons.items())),
        facts={"kind": kind, "architecture": architecture, "other_kinds": reasons},
    )


def choose(model: nn.Module, cfg: Config) -> tuple[str, Native | None, dict[str, str]]:
    """The kind, its model (None of timm_wrapper), and why kinds that were asked before it do not fit."""
    wanted = cfg.kind if cfg.pool == "class" or cfg.kind != "auto" else "beit"
    if wanted == WRAPPER:
        if cfg.pool != "class":
            raise ConfigError(f"pool={cfg.pool} is for kind=beit; timm's own pooling is part of kind={WRAPPER}")
        return WRAPPER, None, {}
    reasons: dict[str, str] = {}
    for kind in hf_layouts.candidates(model) if wanted == "auto" else [wanted]:
        try:
            return kind, hf_layouts.convert(kind, model, pool=cfg.pool), reasons
        except Unfit as error:
            reasons[kind] = str(error)
    if wanted == "auto":
        return WRAPPER, None, reasons
    fitting = [kind for kind in hf_layouts.candidates(model) if fits(kind, model)]
    raise ConfigError(
        f"kind={wanted} cannot be this encoder: {reasons[wanted]}; use kind={' or '.join([*fitting, WRAPPER])}"
    )


def fits(kind: str, model: nn.Module) -> bool:
    """Whether a kind can represent an encoder."""
    try:
        hf_layouts.convert(kind, model)
    except Unfit:
        return False
    return True


@torch.no_grad()
def compare(loaded: LoadedRun, folder: Path, native: Native | None) -> float:
    """Largest difference between what the run and the folder make of the fixed batch, as transformers opens it.

    Raises ExportError where transformers cannot read the folder, or reads something else from it.
    """
    images = fixed_batch(loaded)
    model = reload(folder, {} if native is None else native.options)
    hf_processor.check(loaded, folder, images)
    pixels = loaded.encoder.cpu().float().eval().normalize(images)
    if native is None:
        backbone: Any = backbone_of(loaded.encoder)
        check_tensors(backbone.state_dict(), model.timm_model.state_dict(), where="TimmWrapperModel")
        found = model(pixels)
        ours, theirs = _listed(backbone.forward_features(pixels)), _listed(found.last_hidden_state)
        difference = largest_difference(ours, theirs)
        tokens = torch.cat(features(loaded, images), dim=1)
        if len(theirs) == 1 and theirs[0].shape == tokens.shape:  # others return maps
            difference = max(difference, largest_difference([tokens], theirs))
        return difference
    check_tensors(native.tensors, load_file(folder / WEIGHTS), where=WEIGHTS)
    check_config(native, model)
    return native_difference(loaded, native, model, images)


def native_difference(loaded: LoadedRun, native: Native, model: Any, images: Tensor) -> float:
    """Of all tokens after the final norm, prefix first, and of what the class pools."""
    norm = loaded.encoder.final_norm
    pixels = loaded.encoder.normalize(images)
    found = model(pixel_values=pixels)
    prefix, patches = features(loaded, images)
    last = found.last_hidden_state
    ours, theirs = [torch.cat([prefix, patches], dim=1)], [last if native.normed else norm(last)]
    if found.pooler_output is not None:
        raw = loaded.encoder.layers(images, [-1])[0].patches
        ours.append(prefix[:, 0] if native.normed else norm(raw.mean(dim=1)))
        theirs.append(found.pooler_output)
    return largest_difference(ours, theirs)


def check_config(native: Native, model: Any) -> None:
    """Raise ExportError unless transformers runs the class and the configuration that were written."""
    if type(model).__name__ != native.architecture:
        raise ExportError(f"transformers reads a {type(model).__name__} where a {native.architecture} was written")
    for name, value in native.config.items():
        found = getattr(model.config, name, None)
        if (list(found) if isinstance(found, tuple) else found) != value:
            raise ExportError(f"transformers reads {name}={found!r} from config.json where {value!r} was written")


def reload(folder: Path, options: dict[str, Any]) -> Any:
    """The model of the folder as `AutoModel` opens it, offline; ExportError unless every tensor finds its place."""
    from transformers import AutoModel

    try:
        with quiet():
            model, info = AutoModel.from_pretrained(
                str(folder),
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # reported here, by name
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # transformers and timm raise what they like; its text names the fault
        raise ExportError(f"transformers cannot load the export: {' '.join(str(error).split())[:300]}") from error
    for fault, names in info.items():
        if names:
            some = ", ".join(sorted(map(str, names))[:3])
            raise ExportError(f"transformers reports {len(names)} {fault.replace('_', ' ')} in the export: {some}")
    return model.eval()


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar and no report of transformers while the block runs: faults are raised here."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _listed(found: Any) -> list[Tensor]:
    """One tensor, or those of two branches (CrossViT)."""
    return list(found) if isinstance(found, (list, tuple)) else [found]
