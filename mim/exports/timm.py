"""Export to timm: a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads.

The encoder is a timm module, so nothing is converted. The folder is read back through timm in the way a user would,
pixels are normalised by what timm reads from it, and all tokens of a fixed batch must be the run's: a difference other
than 0.0 is an error. A classify run keeps its head (`head=false` leaves it out); the logits may differ by rounding
where the norm of a linear probe was folded into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mim.contracts import LoadedRun
from mim.handover import timm_head
from mim.handover.export_folder import Terms, Written, export_folder
from mim.handover.timm_folder import compare, write

FOLDED = 1e-5  # of logits, where a norm was folded into the linear layer
USAGE = """```python
import timm

model = timm.create_model("local-dir:{folder}", pretrained=True)  # features: model.forward_features(images)
model = timm.create_model("local-dir:{folder}", pretrained=True, num_classes=10)  # with a new head, to fine-tune
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))  # of PIL images
```"""


@dataclass
class Config:
    head: bool = True  # that of a classify run goes with it
    license: str = "unknown"  # of the exported weights: what data and initial weights allow
    initial_license: str = "unknown"  # of the weights that the run started from, if any


def export(loaded: LoadedRun, out: Path, cfg: Config) -> dict[str, Any]:
    """Write the folder, reload it with timm and compare. Returns the report that is also `report.json`."""
    objective = timm_head.classifier(loaded)
    head = cfg.head and objective is not None
    tolerance = FOLDED if head and objective.cfg.frozen else 0.0

    def fill(folder: Path) -> Written:
        write(loaded, folder, license=cfg.license, head=head)
        difference = compare(loaded, folder, head)
        usage = USAGE.replace("features: model.forward_features(images)", "logits: model(images)") if head else USAGE
        return Written(difference, tolerance, library="timm", usage=usage, tags=("timm", "transformers"))

    return export_folder(loaded, out, target="timm", terms=Terms(cfg.license, cfg.initial_license), write=fill)
