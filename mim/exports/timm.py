"""Export to timm: a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads.

The encoder is a timm module, so nothing is converted. The folder is read back through timm in the way a user would,
pixels are normalised by what timm reads from it, and all tokens of a fixed batch must be the run's: a difference other
than 0.0 is an error.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from timm.models import save_for_hf
from torch import Tensor, nn

from mim.contracts import ExportError, LoadedRun
from mim.export_folder import Terms, Written, check_tensors, export_folder, features, fixed_batch, largest_difference
from mim.weights import backbone_of

# Arguments of timm's factory that a user chooses anew; transformers passes num_classes itself and would pass it twice.
# (Drop rates timm leaves out itself.)
OURS_ALONE = ("num_classes", "weight_init", "dynamic_img_size")
USAGE = """```python
import timm

model = timm.create_model("local-dir:{folder}", pretrained=True)  # features: model.forward_features(images)
model = timm.create_model("local-dir:{folder}", pretrained=True, num_classes=10)  # with a new head, to fine-tune
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))  # of PIL images
```"""


@dataclass
class Config:
    license: str = "unknown"  # of the exported weights: what data and initial weights allow
    initial_license: str = "unknown"  # of the weights that the run started from, if any


def export(loaded: LoadedRun, out: Path, cfg: Config) -> dict[str, Any]:
    """Write the folder, reload it with timm and compare. Returns the report that is also `report.json`."""
    terms = Terms(cfg.license, cfg.initial_license)
    return export_folder(loaded, out, target="timm", terms=terms, write=lambda folder: write(loaded, folder, terms))


def write(loaded: LoadedRun, folder: Path, terms: Terms) -> Written:
    """Write weights and config.json with timm, and compare."""
    encoder = loaded.encoder
    model = backbone_of(encoder).cpu().eval()
    mean, std = encoder.mean.flatten().tolist(), encoder.std.flatten().tolist()
    size = (encoder.channels, *loaded.views.sizes[0])
    save_for_hf(
        model,
        str(folder),
        safe_serialization=True,
        model_config={"pretrained_cfg": {"tag": "mimstream", "license": terms.license, "hf_hub_id": None}},
        data_config={"input_size": size, "mean": mean, "std": std, "interpolation": "bicubic", "crop_pct": 1.0},
    )
    config = json.loads((folder / "config.json").read_text())
    for key in OURS_ALONE:
        config["model_args"].pop(key, None)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return Written(compare(loaded, folder), tolerance=0.0, library="timm", usage=USAGE, tags=("timm", "transformers"))


@torch.no_grad()
def compare(loaded: LoadedRun, folder: Path) -> float:
    """Largest difference between what the run and its export make of the fixed batch, as a user of timm loads it."""
    model = backbone_of(loaded.encoder).cpu().eval()
    check_tensors(model.state_dict(), load_file(folder / "model.safetensors"), where="model.safetensors")
    try:
        reloaded: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ExportError(f"timm cannot load the export: {' '.join(str(error).split())[:300]}") from error
    check_tensors(model.state_dict(), reloaded.state_dict(), where="the reloaded model")
    images = fixed_batch(loaded)
    found = resolve_model_data_config(reloaded)
    if tuple(found["input_size"]) != tuple(images.shape[1:]):
        raise ExportError(f"timm reads the size {found['input_size']} from the export of {tuple(images.shape[1:])}")
    mean, std = (torch.tensor(found[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    pixels = (images - mean) / std
    ours, theirs = tokens(model, loaded.encoder.normalize(images)), tokens(reloaded, pixels)
    difference = largest_difference(ours, theirs)
    run = features(loaded, images)
    if len(theirs) == 1 and theirs[0].ndim == 3 and theirs[0].shape[1] == sum(f.shape[1] for f in run):
        difference = max(difference, largest_difference([torch.cat(run, dim=1)], theirs))
    return difference


def tokens(model: nn.Module, pixels: Tensor) -> list[Tensor]:
    """What `forward_features` returns: one tensor, or those of two branches (CrossViT)."""
    found: Any = model.forward_features(pixels)  # type: ignore[operator]
    return list(found) if isinstance(found, (list, tuple)) else [found]
