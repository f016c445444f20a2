"""The image processor of an export to transformers: the run's evaluation view and its normalisation.

`preprocessor_config.json` makes `AutoImageProcessor` resize the short side bicubically, cut the centre and normalise
with the run's mean and std, as `data.eval_view` frames images. For images that are not square transformers cannot say
"cover this rectangle", so both sides are resized and the aspect changes. transformers resizes before it cuts and rounds
in other places, so pixels are the same only where nothing is resized. Values are 8-bit, or those of `data.range`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mim.contracts import ExportError, LoadedRun
from mim.handover.timm_folder import crop_ratio

BICUBIC = 3  # Pillow's number
PIXEL_TOLERANCE = 1e-4  # of normalised pixels: rescaling and normalising are one step there and two here


def write(loaded: LoadedRun, folder: Path) -> None:
    """Write `preprocessor_config.json` for a native class."""
    (h, w), ratio = loaded.views.sizes[0], crop_ratio(loaded)
    mean, std = (getattr(loaded.encoder, name).flatten().tolist() for name in ("mean", "std"))
    span = ranges(loaded)
    if span is not None:  # raw values are normalised directly
        mean = [low + m * (high - low) for m, (low, high) in zip(mean, span, strict=True)]
        std = [s * (high - low) for s, (low, high) in zip(std, span, strict=True)]
    sides = {"shortest_edge": round(h / ratio)} if h == w else {"height": round(h / ratio), "width": round(w / ratio)}
    config = {
        "image_processor_type": "BitImageProcessor",  # DINOv2's
        "do_convert_rgb": loaded.encoder.channels == 3,
        "do_resize": True,
        "size": sides,
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": h, "width": w},
        "do_rescale": span is None,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n")


def check(loaded: LoadedRun, folder: Path, images: Tensor) -> None:
    """Raise ExportError unless the folder's processor makes of images (B, C, H, W) in [0, 1] what the encoder does."""
    from transformers import AutoImageProcessor

    try:
        processor: Any = AutoImageProcessor.from_pretrained(str(folder), local_files_only=True)
        wanted = loaded.encoder.normalize(images)
        if hasattr(processor, "data_config"):  # timm's, which resizes and cuts first
            found = processor.data_config
            mean, std = (torch.tensor(found[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
            size, pixels = tuple(found["input_size"][1:]), (images - mean) / std
        else:
            span = torch.tensor(ranges(loaded) or [(0, 255)] * images.shape[1], dtype=torch.float32)  # (C, 2)
            low, high = span.T.unsqueeze(-1).unsqueeze(-1)  # (C, 1, 1) each
            raw = list(images * (high - low) + low)
            size = (processor.crop_size["height"], processor.crop_size["width"])
            pixels = processor(raw, do_resize=False, input_data_format="channels_first", return_tensors="pt")
            pixels = pixels["pixel_values"]
    except Exception as error:  # transformers and timm raise what they like
        raise ExportError(
            f"transformers cannot use the image processor: {' '.join(str(error).split())[:300]}"
        ) from error
    if size != tuple(images.shape[2:]):
        raise ExportError(
            f"the image processor of the export makes images of {size}, the run has {tuple(images.shape[2:])}"
        )
    difference = float((pixels - wanted).abs().max()) if pixels.shape == wanted.shape else float("nan")
    if not difference <= PIXEL_TOLERANCE * max(1.0, float(wanted.abs().max())):
        raise ExportError(
            f"the image processor of the export normalises pixels otherwise than the run, by {difference:.3g}"
        )


def notes(loaded: LoadedRun) -> tuple[str, ...]:
    """What a user of the processor must know, sentences for the model card."""
    channels, (h, w) = loaded.encoder.channels, loaded.views.sizes[0]
    found = [] if h == w else ["The image processor resizes both sides and so changes the aspect of an image."]
    if channels not in (1, 3):
        found.append(
            f'The image processor takes arrays of {channels} channels with input_data_format="channels_first".'
        )
    return tuple(found)


def ranges(loaded: LoadedRun) -> list[tuple[float, float]] | None:
    """Raw values (low, high) per channel that the recipe maps to 0 and 1; None for the range of 8 bits."""
    stated = loaded.views.data.range
    if stated is None:
        return None
    pairs = stated if isinstance(stated[0], list) else [stated] * loaded.encoder.channels
    return [(float(low), float(high)) for low, high in pairs]
