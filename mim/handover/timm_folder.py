"""The folder that timm reads: config.json and model.safetensors of a run, and the check that it is the run.

`timm.create_model("local-dir:FOLDER", pretrained=True)` builds it. The export to timm is such a folder, and exports
that need the backbone at one fixed size (ONNX, torch.export) let timm build it from one.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from timm.models import save_for_hf
from torch import Tensor, nn

from mim.contracts import ExportError, LoadedRun
from mim.handover import timm_head
from mim.handover.export_folder import check_difference, check_tensors, features, fixed_batch, largest_difference
from mim.pretrained.weights import backbone_of

WEIGHTS = "model.safetensors"
# Arguments of timm's factory that a user chooses anew; transformers passes num_classes itself and would pass it twice.
# (Drop rates timm leaves out itself.)
OURS_ALONE = ("num_classes", "weight_init", "dynamic_img_size")


def write(loaded: LoadedRun, folder: Path, *, license: str, head: bool) -> None:
    """Write the backbone of a run as timm does, with the run's size, statistics and framing as its preprocessing.

    With `head` that of a classify run is in it.
    """
    encoder = loaded.encoder
    mean, std = encoder.mean.flatten().tolist(), encoder.std.flatten().tolist()
    size = (encoder.channels, *loaded.views.sizes[0])
    framing = {"interpolation": "bicubic", "crop_pct": crop_ratio(loaded), "crop_mode": "center"}
    save_for_hf(
        backbone_of(encoder).cpu().float().eval(),
        str(folder),
        safe_serialization=True,
        model_config={"pretrained_cfg": {"tag": "mimstream", "license": license, "hf_hub_id": None}},
        data_config={"input_size": size, "mean": mean, "std": std, **framing},
    )
    config = json.loads((folder / "config.json").read_text())
    for key in OURS_ALONE:
        config["model_args"].pop(key, None)
    if head:
        found = timm_head.arguments(loaded)
        config["model_args"] |= found
        config |= {"num_classes": timm_head.classifier(loaded).num_classes, "global_pool": found["global_pool"]}
        config["pretrained_cfg"]["num_classes"] = config["num_classes"]
        save_file(timm_head.tensors(loaded), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def crop_ratio(loaded: LoadedRun) -> float:
    """What the run's evaluation view keeps of the short side; 1 for a view that does not crop."""
    found = inspect.signature(loaded.views.evaluation).parameters.get("crop_ratio")
    return 1.0 if found is None else found.default


@torch.no_grad()
def compare(loaded: LoadedRun, folder: Path, head: bool) -> float:
    """Largest difference between what the run and the folder make of the fixed batch, as a user of timm opens it.

    Raises ExportError where timm cannot read the folder, or reads other tensors or another size from it.
    """
    model = backbone_of(loaded.encoder).cpu().float().eval()
    tensors = timm_head.tensors(loaded) if head else model.state_dict()
    check_tensors(tensors, load_file(folder / WEIGHTS), where=WEIGHTS)
    reloaded = open_folder(folder)
    check_tensors(tensors, reloaded.state_dict(), where="the reloaded model")
    images = fixed_batch(loaded)
    found = resolve_model_data_config(reloaded)
    if tuple(found["input_size"]) != tuple(images.shape[1:]):
        raise ExportError(f"timm reads the size {found['input_size']} from the export of {tuple(images.shape[1:])}")
    mean, std = (torch.tensor(found[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    pixels = (images - mean) / std
    if head:
        return _compare_classifier(loaded, reloaded, images, pixels)
    ours, theirs = _tokens(model, loaded.encoder.normalize(images)), _tokens(reloaded, pixels)
    difference = largest_difference(ours, theirs)
    run = features(loaded, images)
    if len(theirs) == 1 and theirs[0].shape == torch.cat(run, dim=1).shape:  # others return maps
        difference = max(difference, largest_difference([torch.cat(run, dim=1)], theirs))
    return difference


def _compare_classifier(loaded: LoadedRun, reloaded: Any, images: Tensor, pixels: Tensor) -> float:
    """The same of logits, after the tokens were found to be equal."""
    objective = timm_head.classifier(loaded).cpu().float().eval()
    own_norm = objective.cfg.pool == "mean" and not objective.cfg.frozen
    ours = loaded.encoder.layers(images, [-1])[0] if own_norm else features(loaded, images)
    tokens = largest_difference([torch.cat(ours, dim=1)], _tokens(reloaded, pixels))
    check_difference(tokens, 0.0, target="timm", run=loaded.path)
    return largest_difference([objective.logits({"images": images})], [reloaded(pixels)])


def open_folder(folder: Path, **options: Any) -> Any:
    """What timm builds from the folder, in evaluation mode; ExportError where it cannot."""
    try:
        return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        raise ExportError(f"timm cannot load the export: {' '.join(str(error).split())[:300]}") from error


def _tokens(model: nn.Module, pixels: Tensor) -> list[Tensor]:
    """What `forward_features` returns: one tensor, or those of two branches (CrossViT)."""
    found: Any = model.forward_features(pixels)  # type: ignore[operator]
    return list(found) if isinstance(found, (list, tuple)) else [found]
