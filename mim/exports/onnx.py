"""Export to ONNX: one model.onnx from pixels to tokens, for any number of images of one size.

Pixels in [0, 1] go in; the normalisation and the positions of that size are inside. ONNX Runtime reads the file back
and must give the run's tokens at batches of 1 and 3; the checker of ONNX passes it, every initializer is used, and
those that have a name of a weight are that weight bit for bit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mim.contracts import ExportError, LoadedRun
from mim.handover import inference
from mim.handover.export_folder import Terms, Written, check_names, export_folder, largest_difference, require

FILE = "model.onnx"
TOLERANCE = 1e-4  # ONNX Runtime adds in another order, and has its own approximations of GELU and softmax
USAGE = """```python
import onnxruntime

session = onnxruntime.InferenceSession("{folder}/model.onnx")
outputs = session.run(None, {"images": images})  # float32 (B, C, H, W) in [0, 1], NOT normalised: that is inside
outputs = dict(zip([output.name for output in session.get_outputs()], outputs))
```"""


@dataclass
class Config:
    image_size: Any = None  # pixels, one number or [height, width]; null: the run's. Positions are resampled to it
    pool: str = "mean"  # of the output `pooled`: mean over patches | class token
    opset: int | None = None  # version of ONNX's operators; null: torch's choice
    license: str = "unknown"  # of the exported weights: what data and initial weights allow
    initial_license: str = "unknown"  # of the weights that the run started from, if any


def export(loaded: LoadedRun, out: Path, cfg: Config) -> dict[str, Any]:
    """Write the folder, read it back with ONNX Runtime and compare. Returns the report, also `report.json`."""
    require("onnx", "onnxruntime", "onnxscript", extra="onnx")

    def fill(folder: Path) -> Written:
        made = inference.prepare(loaded, image_size=cfg.image_size, pool=cfg.pool)
        write(
            made.network, made.images[:2], folder / FILE, cfg, facts={"run": loaded.path.name, "step": str(loaded.step)}
        )
        difference = compare(made.network, folder, made.images, made.expected)
        return Written(
            difference,
            TOLERANCE,
            library="onnx",
            usage=USAGE,
            versions=("onnx", "onnxruntime", "onnxscript"),
            tags=("onnx",),
            notes=made.notes,
            facts=made.facts,
        )

    return export_folder(loaded, out, target="onnx", terms=Terms(cfg.license, cfg.initial_license), write=fill)


def write(network: inference.Inference, images: Tensor, file: Path, cfg: Config, *, facts: dict[str, str]) -> None:
    """Trace the network for any batch size and write it; `facts` become metadata of the model."""
    program = inference.traced(network, images)
    with inference.quiet():
        try:
            made: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=cfg.opset,
                input_names=["images"],
                output_names=list(network(images)),
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
        except Exception as error:  # torch's own kinds differ by version
            raise ExportError(f"torch cannot write this network as ONNX: {first_line(error)}") from error
        made.model.metadata_props.update({"mimstream": json.dumps(facts), "input": "images (B, C, H, W) in [0, 1]"})
        made.save(file)


def compare(network: inference.Inference, folder: Path, images: Tensor, expected: dict[str, Tensor]) -> float:
    """Largest difference of all outputs between the run and ONNX Runtime, at batches of 1 and of all images."""
    import onnxruntime

    check_file(folder / FILE, network)
    try:
        session = onnxruntime.InferenceSession(folder / FILE, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        check_names(expected, names, where=FILE)
        runs = {rows: session.run(names, {"images": images[:rows].numpy()}) for rows in (1, len(images))}
    except ExportError:
        raise
    except Exception as error:  # ONNX Runtime's own kinds, which it does not export
        raise ExportError(f"ONNX Runtime cannot run {FILE}: {first_line(error)}") from error
    pairs = [
        ([expected[n][:rows] for n in names], [torch.from_numpy(v) for v in values]) for rows, values in runs.items()
    ]
    return max(largest_difference(ours, theirs) for ours, theirs in pairs)


def check_file(file: Path, network: inference.Inference) -> None:
    """Raise ExportError for a file that ONNX refuses, an initializer that nothing reads, or a weight that changed."""
    import onnx
    from onnx import numpy_helper

    try:
        onnx.checker.check_model(file, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the checker of ONNX refuses {FILE}: {first_line(error)}") from error
    graph = onnx.load(file).graph
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    check_names({i.name for i in graph.initializer} & read, {i.name for i in graph.initializer}, where=FILE)
    weights = network.state_dict()
    for initializer in graph.initializer:
        if initializer.name in weights:
            value = torch.from_numpy(numpy_helper.to_array(initializer, base_dir=str(file.parent)).copy())
            if not torch.equal(value, weights[initializer.name]):
                raise ExportError(f"weight {initializer.name} of {FILE} is not that of the run; nothing was written")


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
