"""Export to torch.export: model.pt2, a graph from pixels to tokens for any number of images of one size.

`torch.export.load("model.pt2").module()` runs without this program and without timm. Pixels in [0, 1] go in; the
normalisation is inside. The archive is a zip of JSON and raw weights. torch would add the example inputs as a pickle,
which a program does not need: they are left out, and an archive with a pickle in it is refused.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mim.contracts import ExportError, LoadedRun
from mim.handover import inference
from mim.handover.export_folder import Terms, Written, check_tensors, export_folder, largest_difference

FILE = "model.pt2"
TOLERANCE = 1e-6
USAGE = """```python
import torch

model = torch.export.load("{folder}/model.pt2").module()
outputs = model(images)  # float32 (B, C, H, W) in [0, 1], NOT normalised: that is inside
```"""


@dataclass
class Config:
    image_size: Any = None  # pixels, one number or [height, width]; null: the run's. Positions are resampled to it
    pool: str = "mean"  # of the output `pooled`: mean over patches | class token
    license: str = "unknown"  # of the exported weights: what data and initial weights allow
    initial_license: str = "unknown"  # of the weights that the run started from, if any


def export(loaded: LoadedRun, out: Path, cfg: Config) -> dict[str, Any]:
    """Write the folder, load it with torch and compare. Returns the report that is also `report.json`."""

    def fill(folder: Path) -> Written:
        made = inference.prepare(loaded, image_size=cfg.image_size, pool=cfg.pool)
        write(made.network, made.images[:2], folder / FILE)
        difference = compare(made.network, folder, made.images, made.expected)
        return Written(
            difference,
            TOLERANCE,
            library="pytorch",
            usage=USAGE,
            tags=("torch.export",),
            notes=made.notes,
            facts=made.facts,
        )

    return export_folder(loaded, out, target="torch", terms=Terms(cfg.license, cfg.initial_license), write=fill)


def write(network: inference.Inference, images: Tensor, file: Path) -> None:
    """Trace the network for any batch size and save the program."""
    program = inference.traced(network, images)
    program.example_inputs = None  # a pickle in the archive
    torch.export.save(program, file)


def compare(network: inference.Inference, folder: Path, images: Tensor, expected: dict[str, Tensor]) -> float:
    """Largest difference of all outputs between the run and the loaded program, at batches of 1 and of all images."""
    if found := pickles(folder / FILE):
        raise ExportError(
            f"torch {torch.__version__} writes pickles into {FILE} ({found[0]}), which this program never does; use a "
            f"newer torch"
        )
    try:
        program = torch.export.load(folder / FILE)
    except Exception as error:  # a damaged archive fails in many ways
        raise ExportError(f"torch cannot load {FILE}: {' '.join(str(error).split())[:300]}") from error
    check_tensors(network.state_dict(), program.state_dict, where=FILE)
    module = program.module()
    with torch.no_grad():
        runs = {rows: module(images[:rows]) for rows in (1, len(images))}
    return max(
        largest_difference([expected[n][:rows] for n in expected], [found[n] for n in expected])
        for rows, found in runs.items()
    )


def pickles(file: Path) -> list[str]:
    """Names of the parts of an archive that loading would unpickle."""
    found = []
    with zipfile.ZipFile(file) as archive:
        for part in archive.infolist():
            head = archive.read(part)[:2]
            if part.filename.endswith("_config.json"):
                entries = json.loads(archive.read(part))["config"].values()
                found += [entry["path_name"] for entry in entries if entry["use_pickle"]]
            elif head in (b"PK", b"\x80\x02") and not Path(part.filename).name.startswith(("weight_", "tensor_")):
                found.append(part.filename)
    return found
