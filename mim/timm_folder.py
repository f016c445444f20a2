"""The folder that timm reads: config.json and model.safetensors of a run, and the check that it is the run.

`timm.create_model("local-dir:FOLDER", pretrained=True)` builds it. The export to timm is such a folder, and exports
that need the backbone at one fixed size (ONNX, torch.export) let timm build it from one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from timm.models import save_for_hf
from torch import Tensor, nn

from mim.contracts import ExportError, LoadedRun
from mim.export_folder import check_tensors, features, fixed_batch, largest_difference
from mim.weights import backbone_of

WEIGHTS = "model.safetensors"
# Arguments of timm's factory that a user chooses anew; transformers passes num_classes itself and would pass it twice.
# (Drop rates timm leaves out itself.)
OURS_ALONE = ("num_classes", "weight_init", "dynamic_img_size")


def write(loaded: LoadedRun, folder: Path, *, license: str) -> None:
    """Write the backbone of a run as timm does, with the run's pixel statistics and size as its preprocessing."""
    encoder = loaded.encoder
    mean, std = encoder.mean.flatten().tolist(), encoder.std.flatten().tolist()
    size = (encoder.channels, *loaded.views.sizes[0])
    save_for_hf(
        backbone_of(encoder).cpu().float().eval(),
        str(folder),
        safe_serialization=True,
        model_config={"pretrained_cfg": {"tag": "mimstream", "license": license, "hf_hub_id": None}},
        data_config={"input_size": size, "mean": mean, "std": std, "interpolation": "bicubic", "crop_pct": 1.0},
    )
    config = json.loads((folder / "config.json").read_text())
    for key in OURS_ALONE:
        config["model_args"].pop(key, None)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


@torch.no_grad()
def compare(loaded: LoadedRun, folder: Path) -> float:
    """Largest difference between what the run and the folder make of the fixed batch, as a user of timm opens it.

    Raises ExportError where timm cannot read the folder, or reads other tensors or another size from it.
    """
    model = backbone_of(loaded.encoder).cpu().float().eval()
    check_tensors(model.state_dict(), load_file(folder / WEIGHTS), where=WEIGHTS)
    reloaded = open_folder(folder)
    check_tensors(model.state_dict(), reloaded.state_dict(), where="the reloaded model")
    images = fixed_batch(loaded)
    found = resolve_model_data_config(reloaded)
    if tuple(found["input_size"]) != tuple(images.shape[1:]):
        raise ExportError(f"timm reads the size {found['input_size']} from the export of {tuple(images.shape[1:])}")
    mean, std = (torch.tensor(found[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    ours, theirs = _tokens(model, loaded.encoder.normalize(images)), _tokens(reloaded, (images - mean) / std)
    difference = largest_difference(ours, theirs)
    run = features(loaded, images)
    if len(theirs) == 1 and theirs[0].shape == torch.cat(run, dim=1).shape:  # others return maps
        difference = max(difference, largest_difference([torch.cat(run, dim=1)], theirs))
    return difference


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
