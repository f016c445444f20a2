"""Export to transformers: a folder that `AutoModel` and `AutoImageProcessor` load, as a native class where one fits.

`kind` is the class. A native one (`mim/handover/hf_layouts.py`) is what heads and detectors of transformers are built
on, and needs no timm; `timm_wrapper` is timm's own module inside transformers and takes every encoder. A classify run
keeps its head and is read by `AutoModelForImageClassification`. The folder is read back through transformers, offline:
every tensor must find its place bit for bit, the configuration must be the one that was written, pixels must be
normalised as in training, and all tokens of a fixed batch must be the run's. Both sides then use the same attention
kernel, so that the model is compared and not the rounding of two kernels.
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
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mim.config import ConfigError
from mim.contracts import ExportError, LoadedRun
from mim.handover import hf_head, hf_layouts, hf_processor, timm_folder, timm_head
from mim.handover.export_folder import (
    Terms,
    Written,
    check_tensors,
    export_folder,
    features,
    fixed_batch,
    largest_difference,
)
from mim.handover.export_folder import require as require_installed
from mim.handover.hf_layouts import Native, Unfit
from mim.pretrained.weights import backbone_of

WRAPPER = "timm_wrapper"
KINDS = ("auto", WRAPPER, *hf_layouts.KINDS)
USAGE = """```python
from transformers import AutoImageProcessor, {auto}

processor = AutoImageProcessor.from_pretrained("{{folder}}")
model = {auto}.from_pretrained("{{folder}}"{options}).eval()  # {architecture}
{line}
```"""
TOKENS = 'tokens = model(**processor(image, return_tensors="pt")).last_hidden_state  # class token, registers, patches'
LOGITS = 'logits = model(**processor(image, return_tensors="pt")).logits'


@dataclass
class Config:
    # auto: a native class if one computes what the run computes, else timm_wrapper
    kind: str = "auto"  # auto | timm_wrapper | dinov2 | dinov2_with_registers | vit | beit
    head: bool = True  # that of a classify run goes with it
    pool: str = "class"  # of kind=beit without head, its `pooler_output`: class | mean, normed after the mean
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
    loaded.objective.cpu().float().eval()
    head = cfg.head and timm_head.classifier(loaded) is not None
    kind, native, reasons = choose(loaded, cfg, head=head)
    if native is None:
        timm_folder.write(loaded, folder, license=cfg.license, head=head)
        native = Native(f"TimmWrapper{'ForImageClassification' if head else 'Model'}", {}, {})
    else:
        tensors = {name: tensor.contiguous() for name, tensor in native.tensors.items()}
        save_file(tensors, folder / timm_folder.WEIGHTS, metadata={"format": "pt"})
        config = {"architectures": [native.architecture], "dtype": "float32", **native.config}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        hf_processor.write(loaded, folder)
    with sdpa_kernel(SDPBackend.MATH):
        difference = compare(loaded, folder, native, head)
    usage = USAGE.format(
        auto="AutoModelForImageClassification" if head else "AutoModel",
        options="".join(f", {name}={value!r}" for name, value in native.options.items()),
        architecture=native.architecture,
        line=LOGITS if head else TOKENS,
    )
    return Written(
        difference,
        tolerance=hf_layouts.FOLDED if head and loaded.objective.cfg.frozen else native.tolerance,
        library="transformers",
        usage=usage,
        versions=("transformers", "huggingface_hub"),
        tags=("transformers", *(("timm",) if kind == WRAPPER else ())),
        notes=(*hf_processor.notes(loaded), *(f"Not of kind {name}: {reason}." for name, reason in reasons.items())),
        facts={"kind": kind, "architecture": native.architecture, "other_kinds": reasons},
    )


def choose(loaded: LoadedRun, cfg: Config, *, head: bool) -> tuple[str, Native | None, dict[str, str]]:
    """The kind, its model (None of timm_wrapper), and why kinds that were tried before it do not fit."""
    model = backbone_of(loaded.encoder)
    wanted = cfg.kind if cfg.pool == "class" or cfg.kind != "auto" else "beit"
    if wanted == WRAPPER:
        if cfg.pool != "class":
            raise ConfigError(f"pool={cfg.pool} is for kind=beit; kind={WRAPPER} pools as timm does")
        return WRAPPER, None, {}
    reasons: dict[str, str] = {}
    for kind in hf_layouts.candidates(model) if wanted == "auto" else [wanted]:
        try:
            return kind, convert(loaded, kind, cfg.pool, head=head), reasons
        except Unfit as error:
            reasons[kind] = str(error)
    if wanted == "auto":
        return WRAPPER, None, reasons
    fitting = [kind for kind in hf_layouts.candidates(model) if fits(loaded, kind, head=head)]
    what, remedy = ("classifier", ", or head=false") if head else ("encoder", "")
    raise ConfigError(
        f"kind={wanted} cannot be this {what}: {reasons[wanted]}; use kind={' or '.join([*fitting, WRAPPER])}{remedy}"
    )


def convert(loaded: LoadedRun, kind: str, pool: str, *, head: bool) -> Native:
    """The run as a native kind. Raises `Unfit`."""
    model = backbone_of(loaded.encoder)
    if not head:
        return hf_layouts.convert(kind, model, pool=pool)
    objective = timm_head.classifier(loaded)
    if objective.distill_head is not None:
        raise Unfit("it averages the softmaxes of two heads")
    own_norm = objective.cfg.pool == "mean" and not objective.cfg.frozen
    native = hf_layouts.convert(kind, model, pool="mean" if kind == "beit" and own_norm else "class")
    found = timm_head.tensors(loaded)  # with the norm of a linear probe folded in
    norm = {part: found[f"fc_norm.{part}"] for part in ("weight", "bias")} if own_norm else None
    return hf_head.add_head(native, hf_head.Head(found["head.weight"], found["head.bias"], objective.cfg.pool, norm))


def fits(loaded: LoadedRun, kind: str, *, head: bool) -> bool:
    """Whether a native kind can represent a run."""
    try:
        convert(loaded, kind, "class", head=head)
    except Unfit:
        return False
    return True


@torch.no_grad()
def compare(loaded: LoadedRun, folder: Path, native: Native, head: bool) -> float:
    """Largest difference between what the run and the folder make of the fixed batch, as transformers opens it.

    Raises ExportError where transformers cannot read the folder, or reads something else from it.
    """
    images = fixed_batch(loaded)
    model = reload(folder, native.options, head=head)
    with quiet():
        hf_processor.check(loaded, folder, images)
    pixels = loaded.encoder.normalize(images)
    if hasattr(model, "timm_model"):
        ours, theirs = wrapped(loaded, model, images, head=head)
    else:
        check_tensors(native.tensors, load_file(folder / timm_folder.WEIGHTS), where=timm_folder.WEIGHTS)
        check_config(native, model)
        ours, theirs = native_tokens(loaded, native, model.base_model if head else model, images)
    if head:
        ours.append(loaded.objective.logits({"images": images}))
        theirs.append(model(pixels).logits)
    return largest_difference(ours, theirs)


def native_tokens(loaded: LoadedRun, native: Native, model: Any, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Ours and theirs: all tokens after the final norm, prefix first, and what the class pools."""
    norm = loaded.encoder.final_norm
    found = model(pixel_values=loaded.encoder.normalize(images))
    prefix, patches = features(loaded, images)
    last = found.last_hidden_state
    ours, theirs = [torch.cat([prefix, patches], dim=1)], [last if native.normed else norm(last)]
    if native.architecture == "BeitModel" and not native.normed:
        ours.append(norm(loaded.encoder.layers(images, [-1])[0].patches.mean(dim=1)))
        theirs.append(found.pooler_output)
    elif found.pooler_output is not None and native.normed:
        ours.append(prefix[:, 0])
        theirs.append(found.pooler_output)
    return ours, theirs


def wrapped(loaded: LoadedRun, model: Any, images: Tensor, *, head: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Ours and theirs: what timm's `forward_features` gives, and all tokens where these are it."""
    backbone: Any = backbone_of(loaded.encoder)
    wanted = timm_head.tensors(loaded) if head else backbone.state_dict()
    check_tensors(wanted, model.timm_model.state_dict(), where="transformers' timm_model")
    pixels = loaded.encoder.normalize(images)
    theirs = _listed(model.timm_model.forward_features(pixels))
    own_norm = head and any(name.startswith("fc_norm.") for name in wanted)  # then tokens are raw
    tokens = torch.cat(loaded.encoder.layers(images, [-1])[0] if own_norm else features(loaded, images), dim=1)
    if own_norm:
        return [tokens], theirs
    ours = _listed(backbone.forward_features(pixels))
    same = len(theirs) == 1 and theirs[0].shape == tokens.shape  # others return maps
    return ([*ours, tokens], [*theirs, *theirs]) if same else (ours, theirs)


def check_config(native: Native, model: Any) -> None:
    """Raise ExportError unless transformers runs the class and the configuration that were written."""
    if type(model).__name__ != native.architecture:
        raise ExportError(f"transformers reads a {type(model).__name__} where a {native.architecture} was written")
    for name, value in native.config.items():
        found = getattr(model.config, name, None)
        if (list(found) if isinstance(found, tuple) else found) != value:
            raise ExportError(f"transformers reads {name}={found!r} from config.json where {value!r} was written")


def reload(folder: Path, options: dict[str, Any], *, head: bool) -> Any:
    """The model of the folder as transformers opens it, offline; ExportError unless every tensor finds its place."""
    from transformers import AutoModel, AutoModelForImageClassification

    try:
        with quiet():
            model, info = (AutoModelForImageClassification if head else AutoModel).from_pretrained(
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
