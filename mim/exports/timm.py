"""Export to timm: a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads.

The encoder is a timm module, so nothing is converted. The folder is read back through timm in the way a user would, and
the largest difference of the features on a fixed batch is the report; anything but 0.0 is an error.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import nn

from mim.config import ConfigError
from mim.contracts import LoadedRun

# Arguments of timm's factory that a user chooses anew; transformers passes num_classes itself and would pass it twice.
# (Drop rates timm leaves out itself.)
OURS_ALONE = ("num_classes", "weight_init", "dynamic_img_size")
README = """# {arch}, pretrained with {objective} by mimstream

    import timm
    model = timm.create_model("local-dir:{folder}", pretrained=True)                    # features
    model = timm.create_model("local-dir:{folder}", pretrained=True, num_classes=10)    # to fine-tune

Input {size} pixels in [0, 1], normalised with mean {mean} and std {std} (`timm.data.resolve_model_data_config`).
Trained for {step} optimizer steps on dataset {dataset}; recipe in `recipe.json`. Weights: {weights}.
"""


@dataclass
class Config:
    license: str = "unknown"  # of the weights: what the training data allow


def export(loaded: LoadedRun, out: Path, cfg: Config) -> dict[str, Any]:
    """Write the folder, reload it with timm and compare. Returns the report that is also `report.json`."""
    encoder = loaded.encoder
    if encoder is None:
        raise ConfigError(f"{loaded.path} has no timm backbone to export; export a run that trains an encoder")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; choose another folder for the export")
    place = out.resolve()
    if place == Path.cwd():
        raise ConfigError(f"{out} is the folder you are in; name another one for the export, e.g. {out / 'export'}")
    temporary = place.with_name(f".{place.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        report = write(loaded, temporary, cfg, folder=out)
        temporary.rename(place)  # takes the place of an empty folder
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # it is still there when anything failed
    return report


def write(loaded: LoadedRun, temporary: Path, cfg: Config, *, folder: Path) -> dict[str, Any]:
    """Fill the temporary folder of an export that will be `folder`, and compare. Returns the report."""
    encoder = loaded.encoder
    model = (encoder.model if hasattr(encoder, "model") else encoder.vit).cpu().eval()
    mean, std = encoder.mean.flatten().tolist(), encoder.std.flatten().tolist()
    size = (len(mean), *loaded.views.sizes[0])
    data_config = {"input_size": size, "mean": mean, "std": std, "interpolation": "bicubic", "crop_pct": 1.0}
    save_for_hf(
        model,
        str(temporary),
        safe_serialization=True,
        model_config={"pretrained_cfg": {"tag": "mimstream", "license": cfg.license, "hf_hub_id": None}},
        data_config=data_config,
    )
    config = json.loads((temporary / "config.json").read_text())
    for key in OURS_ALONE:
        config["model_args"].pop(key, None)
    (temporary / "config.json").write_text(json.dumps(config, indent=2))
    weights = "exponential moving average" if loaded.config["optim"].get("ema") else "of the last step"
    report = {
        "target": "timm",
        "run": str(loaded.path),
        "step": loaded.step,
        "weights": weights,
        "max_difference": compare(model, temporary, size),
    }
    if report["max_difference"] != 0.0:
        raise RuntimeError(f"the exported {temporary} differs from the run by {report['max_difference']:.3g}")
    recipe = {name: loaded.config.get(name) for name in ("data", "mask", "encoder", "objective", "optim")}
    (temporary / "recipe.json").write_text(json.dumps(recipe, indent=1))
    (temporary / "report.json").write_text(json.dumps(report, indent=1))
    (temporary / "README.md").write_text(
        README.format(
            arch=model.pretrained_cfg["architecture"],
            objective=loaded.config["objective"]["name"],
            folder=folder,
            size="x".join(map(str, size[1:])),
            mean=[round(v, 4) for v in mean],
            std=[round(v, 4) for v in std],
            step=loaded.step,
            dataset=loaded.config.get("experiment", {}).get("dataset_id", "unknown")[:16],
            weights=weights,
        )
    )
    return report


@torch.no_grad()
def compare(model: nn.Module, folder: Path, size: tuple[int, ...]) -> float:
    """Largest absolute difference of the features of a fixed batch between a module and its export."""
    reloaded: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    images = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
    models: Any = (model, reloaded)
    ours, theirs = (m.forward_features(images) for m in models)
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, list) else [(ours, theirs)]  # CrossViT has two branches
    return max(float((a - b).abs().max()) for a, b in pairs)
