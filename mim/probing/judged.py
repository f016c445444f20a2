"""Any backbone as evaluations see a run of ours: an exported folder, any timm name, or a run on other images.

The encoder is the one of `mim/encoders/` that fits the timm class, and `dense` where none does. Pixels are normalised
with the mean and std that the folder or timm names for the model.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mim import build, config
from mim.config import ConfigError
from mim.contracts import LoadedRun
from mim.data import stream
from mim.log import say
from mim.pretrained import weights

OPTIONS = ("pretrained", "init", "init_seed")  # of a timm name
KINDS = {VisionTransformer: "vit", Eva: "eva", Beit: "beit"}
FIELDS = {  # arguments of timm's factory -> fields of our encoders
    "embed_dim": "width",
    "depth": "depth",
    "num_heads": "num_heads",
    "patch_size": "patch_size",
    "init_values": "layer_scale",
    "reg_tokens": "num_registers",
    "num_reg_tokens": "num_registers",
    "qk_norm": "qk_norm",
}
SILENT = {"img_size", "in_chans", "num_classes", "global_pool", "drop_rate", "drop_path_rate", "weight_init"}
OURS = {  # arguments that our encoders of a class set themselves
    *("dynamic_img_size", "use_fc_norm", "use_post_transformer_norm", "fc_norm"),
    *("use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias"),
}


class Named(NamedTuple):
    """A model of timm's."""

    architecture: str
    arguments: dict[str, Any]  # of its factory
    facts: dict[str, Any]  # pretrained_cfg: mean, std, input_size
    folder: Path | None  # of an export


class Untrained(nn.Module):
    """Stands where a run has its objective: there is none, only the encoder."""

    per_micro_batch = False
    reads: tuple[str, ...] = ()

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder


def load(model: str, data: dict[str, Any], options: dict[str, Any]) -> LoadedRun:
    """Open an exported folder or a timm name on the images of a section `data`.

    options: `pretrained` (timm's weights, downloaded where they are not in its cache), `init` (as `encoder.init`) and
    `init_seed` (of random weights) of a timm name. Raises ConfigError for what has no features.
    """
    named = _find(model)
    pretrained, init, seed = (options.get(name) for name in OPTIONS)
    if named.folder is not None and options:
        raise ConfigError(f"{min(options)}={options[min(options)]} is for timm names; {model} has weights of its own")
    if pretrained and init is not None:
        raise ConfigError(f"pretrained=true and init={init} both give the weights; keep one of them")
    shape = named.facts.get("input_size") or (3, 224, 224)
    section = {"channels": shape[0], "image_size": list(shape[1:]), **data}
    if without := not {"path", "sources"} & data.keys():  # pictures of named files need none; what does will say so
        section["path"] = ""
    found = config.typed(stream.Config, section, "data")
    found.path = None if without else found.path
    torch.manual_seed(int(seed or 0))
    name, encoder = _encoder(named, found)
    source = named.folder or init or (model.removeprefix("timm:") if pretrained else None)
    if source is None:
        say(f"{named.architecture} has random weights (init_seed={int(seed or 0)}); pretrained=true takes timm's")
    else:
        for line in weights.initialize_encoder(encoder, str(source)).lines():
            say(line)
    encoder.eval().requires_grad_(False)
    view = config.bind("mim.data.augment", found.eval_view, "data.eval_view")
    views = build.Views(found, [build.image_size(found)], view, view, None)
    sections = {
        "data": config.plain(found),
        "encoder": {"name": name, "model": named.architecture, "arguments": config.plain(named.arguments)},
        "objective": {"name": "no objective"},
    }
    return LoadedRun(Untrained(encoder).eval(), encoder, {}, views, sections, 0, Path(model))


def on(loaded: LoadedRun, data: dict[str, Any]) -> LoadedRun:
    """A run on other images, or in another size: `data` goes before the recipe's section."""
    before = dict(loaded.config["data"])
    if "path" in data or "sources" in data:  # what belongs to the recipe's images
        before |= {"path": None, "sources": None, "val_path": None, "val_ratio": 0.0, "range": None}
    found = config.typed(stream.Config, {**before, **data}, "data")
    if found.channels != before["channels"]:
        raise ConfigError(f"data.channels={found.channels}, but {loaded.path} was trained on {before['channels']}")
    view = config.bind("mim.data.augment", found.eval_view, "data.eval_view")
    size = build.image_size(found)
    if size == loaded.views.sizes[0]:
        sizes = loaded.views.sizes
    else:
        sizes = [size]
        _grid(loaded.encoder, size)
    views = dataclasses.replace(loaded.views, data=found, evaluation=view, sizes=sizes)
    return dataclasses.replace(loaded, views=views, config={**loaded.config, "data": config.plain(found)})


def _grid(encoder: Any, size: tuple[int, int]) -> None:
    """Refuse a size that the encoder cannot take."""
    if encoder is None:
        raise ConfigError("data.image_size is that of the run where a tokenizer is judged; leave it out")
    try:
        encoder.grid(size)
    except ValueError as error:
        raise ConfigError(f"data.image_size: {error}") from error


def _find(model: str) -> Named:
    """The model behind a folder or a name."""
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        try:
            found = json.loads((folder / "config.json").read_text())
        except ValueError as error:
            raise ConfigError(f"{folder / 'config.json'} is not JSON ({error}); export the run again") from error
        if not isinstance(found, dict) or "architecture" not in found:
            raise ConfigError(
                f"{folder / 'config.json'} names no architecture of timm; export with `mim export timm`, or give a "
                f"timm name with init={model}"
            )
        return Named(found["architecture"], found.get("model_args", {}), found.get("pretrained_cfg", {}), folder)
    name = model.removeprefix("timm:")
    if folder.exists() or not timm.is_model(name.split(".")[0]):
        close = timm.list_models(f"*{name.split('_')[0]}*")[:3] if not folder.exists() else []
        hint = f"; some timm names: {', '.join(close)}" if close else ""
        raise ConfigError(
            f"{model} is not a run directory (config.yaml), an exported folder (config.json) or a timm name{hint}"
        )
    known = timm.get_pretrained_cfg(name)
    return Named(name, {}, known.to_dict() if known is not None else {}, None)


def _encoder(named: Named, data: stream.Config) -> tuple[str, Any]:
    """Our encoder around the model: the one of its class, or `dense`."""
    try:
        with torch.device("meta"):
            sketch = timm.create_model(named.architecture, num_classes=0, **_other(named, {"num_classes"}))
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"timm cannot make {named.architecture} with {named.arguments}: {error}") from error
    name = next((kind for of, kind in KINDS.items() if isinstance(sketch, of)), "dense")
    refusals = []
    for kind in dict.fromkeys((name, "dense")):
        try:
            section = _section(kind, named, sketch)
            module, cfg = config.component("mim.encoders", section, "encoder")
            cfg.mean, cfg.std = _statistics(named, data.channels)
            unmasked = {"masked": False} if kind == "dense" else {}
            return kind, module.build(cfg, image_size=build.image_size(data), channels=data.channels, **unmasked)
        except ValueError as error:  # ConfigError, too
            refusals.append(str(error).replace("encoder.model=", ""))
    raise ConfigError(f"{named.architecture} cannot be judged: {'; as a dense model: '.join(refusals)}")


def _section(kind: str, named: Named, sketch: Any) -> dict[str, Any]:
    """The section `encoder` of a recipe that makes this model. Raises ValueError when none does."""
    section: dict[str, Any] = {"name": kind, "model": named.architecture}
    if kind == "dense":
        return {**section, "options": _other(named, SILENT)}
    if strange := sorted(_other(named, {*FIELDS, *SILENT, *OURS})):
        raise ValueError(f"encoder.name={kind} has no option {strange[0]}")
    section |= {FIELDS[name]: value for name, value in named.arguments.items() if name in FIELDS}
    if kind == "beit":
        tables = (sketch.pos_embed, sketch.blocks[0].attn.relative_position_bias_table, sketch.rel_pos_bias)
        found = [n for n, t in zip(("absolute", "relative", "shared_relative"), tables, strict=True) if t is not None]
        if len(found) != 1:
            raise ValueError(f"encoder.name=beit has one kind of positions, not {' and '.join(found) or 'none'}")
        section["positions"] = found[0]
    return section


def _other(named: Named, left_out: set[str]) -> dict[str, Any]:
    return {name: value for name, value in named.arguments.items() if name not in left_out}


def _statistics(named: Named, channels: int) -> tuple[list[float], list[float]]:
    """Mean and std of pixels as the model knows them."""
    mean, std = (list(named.facts.get(name) or []) for name in ("mean", "std"))
    return (mean, std) if len(mean) == len(std) == channels else build.statistics(channels, None)
