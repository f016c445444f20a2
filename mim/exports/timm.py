"""Export to timm: a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads.

The encoder is a timm module, so nothing is converted. The folder is read back through timm in the way a user would,
pixels are normalised by what timm reads from it, and all tokens of a fixed batch must be the run's: a difference other
than 0.0 is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mim.contracts import LoadedRun
from mim.export_folder import Terms, Written, export_folder
from mim.timm_folder import compare, write

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

    def fill(folder: Path) -> Written:
        write(loaded, folder, license=cfg.license)
        difference = compare(loaded, folder)
        return Written(difference, tolerance=0.0, library="timm", usage=USAGE, tags=("timm", "transformers"))

    return export_folder(loaded, out, target="timm", terms=Terms(cfg.license, cfg.initial_license), write=fill)
