"""Where released weights come from: a file, a Hugging Face or timm folder, a run directory, or a name of timm's.

Reading executes nothing. Safetensors are read as such; pickles through torch's restricted reader, in which the few
classes that published training scripts leave beside their tensors (BEiT and MAE an `argparse.Namespace`, SimMIM a yacs
`CfgNode`) are replaced by empty stand-ins, and those of DALL-E's whole pickled networks by ones that keep only tensors.
Any other class is refused by name. This is the only module that may call `torch.load` (tests/test_layers.py).
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mim.config import ConfigError
from mim.log import say
from mim.saving import checkpoint

WRAPPERS = ("teacher", "model_ema", "state_dict_ema", "model", "module", "state_dict", "student")  # first one wins
DALLE = (  # classes of OpenAI's encoder.pkl and decoder.pkl
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.decoder.Decoder",
    "dall_e.decoder.DecoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.upsampling.Upsample",
)
MAX_NETWORKS = 1000  # in one file; each half of the release has 101
NUMPY_SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")


class Inert:
    """Takes the place of an object that a file holds beside its tensors; keeps nothing of it."""

    def __init__(self, *_: Any) -> None: ...

    def __new__(cls, *_: Any) -> Inert:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None: ...


class Network(Inert):
    """Takes the place of a pickled network: keeps its parameters and the networks in it by name, and cannot run."""

    state: dict[str, Any] = {}  # noqa: RUF012  replaced, never changed

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}

    def inside(self, kind: str) -> dict[Any, Any]:
        """What it holds in `_parameters` or `_modules`."""
        found = self.state.get(kind)
        return found if isinstance(found, dict) else {}


STAND_INS = [
    (Inert, "argparse.Namespace"),  # BEiT, MAE, DINO, iBOT
    (Inert, "pathlib.PosixPath"),  # in such a Namespace
    *((Inert, name) for name in NUMPY_SCALARS),  # best accuracies
    (OrderedDict, "yacs.config.CfgNode"),  # SimMIM; a mapping
    *((Network, name) for name in DALLE),
]


@dataclass
class Source:
    """Tensors by the names that their source gives them, and what else the source says about them."""

    origin: str  # for messages
    tensors: dict[str, Tensor]
    objective: str | None = None  # of a run directory
    mean: list[float] | None = None  # per channel, of pixels in [0, 1]
    std: list[float] | None = None
    grid: tuple[int, int] | None = None  # of its table of positions
    num_heads: int | None = None
    activation: str | None = None
    checkpoint: Path | None = None  # of a run directory
    native: bool = False  # the encoder has timm's names
    notes: list[str] = field(default_factory=list)


def open_source(source: str) -> Source:
    """Read what `encoder.init` names: a path wins over a timm name."""
    path = Path(source).expanduser()
    if (Path(re.sub(r"@\d+$", "", str(path))) / "config.yaml").is_file():
        return from_run(source, averaged=True)
    if path.is_dir():
        return from_folder(path)
    if path.is_file():
        return from_file(path)
    if timm.is_model(source.split(".")[0]) and "/" not in source:
        return fetch(source)
    raise ConfigError(
        f"encoder.init={source!r} is neither a file, a folder with config.json, a run directory nor a timm model; "
        f"some timm names: vit_base_patch16_224.mae, vit_base_patch14_dinov2.lvd142m"
    )


def fetch(name: str) -> Source:
    """Weights that timm publishes under a name; the only way by which anything is downloaded, and it says so."""
    say(f"encoder.init={name} is a timm name: its weights are downloaded, or taken from timm's cache")
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except (RuntimeError, OSError) as error:  # timm lists none, or no network
        raise ConfigError(f"encoder.init={name}: {' '.join(str(error).split())[:300]}") from error
    facts: Any = model.pretrained_cfg
    source = Source(f"timm {name}", dict(model.state_dict()), native=True)
    source.mean, source.std = list(facts["mean"]), list(facts["std"])
    stem: Any = getattr(model, "patch_embed", None)
    source.grid = getattr(stem, "grid_size", None)
    blocks: Any = getattr(model, "blocks", [None])
    source.num_heads = getattr(getattr(blocks[0], "attn", None), "num_heads", None)
    return source


def from_file(path: Path) -> Source:
    """One file of tensors, taken out of the dicts that wrap them."""
    if path.suffix == ".safetensors":
        return Source(str(path), _read_safetensors(path))
    tensors, notes = unwrap(_read_pickle(path), path)
    return Source(str(path), _finite(path, tensors), notes=notes)


def from_folder(folder: Path) -> Source:
    """A folder of transformers' `save_pretrained` or of timm's (`mim export timm`): config.json beside the weights."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} holds neither config.yaml (a run) nor config.json (a model of transformers, timm)")
    facts = _read_json(folder / "config.json")
    files = sorted(folder.glob("model*.safetensors"))
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if not files and not pickles:
        raise ConfigError(f"{folder} holds config.json but neither model.safetensors nor pytorch_model.bin")
    source = Source(str(folder), {})
    for file in files or pickles:
        source.tensors |= from_file(file).tensors
    if "architecture" in facts:  # timm's
        arguments = facts.get("model_args", {})
        size, patch_size = arguments.get("img_size"), arguments.get("patch_size")
        normal = facts.get("pretrained_cfg", {})
        source.mean, source.std = normal.get("mean"), normal.get("std")
        source.num_heads, source.native = arguments.get("num_heads"), True
    else:
        facts = facts.get("vision_config") or facts
        size, patch_size = facts.get("image_size"), facts.get("patch_size")
        normal = _read_json(folder / "preprocessor_config.json")
        source.mean, source.std = normal.get("image_mean"), normal.get("image_std")
        source.num_heads, source.activation = facts.get("num_attention_heads"), facts.get("hidden_act")
    source.grid = _grid(size, patch_size)
    return source


def from_run(source: str, *, averaged: bool) -> Source:
    """A run directory, or RUN@step of it: `encoder.*` in the names of its timm backbone, the rest as OBJECTIVE.*.

    With `averaged`, the average of the weights takes their place in a run that has one.
    """
    run, at, wanted = source.rpartition("@") if re.search(r"@\d+$", source) else (source, "", "")
    path = Path(run).expanduser()
    saved = checkpoint.read_config(path)
    folder = path / "checkpoints" / f"step-{int(wanted):08d}" if at else checkpoint.newest(path)
    if folder is None or not folder.is_dir():
        known = ", ".join(str(checkpoint.step_of(f)) for f in checkpoint.list_checkpoints(path)) or "none"
        raise ConfigError(f"{source} names no checkpoint; steps of {path}: {known}")
    if (reason := checkpoint.verify(folder)) is not None:
        raise ConfigError(f"{folder} cannot be used: {reason}; choose another step")
    state = checkpoint.read_tensors(folder, ("model.", "ema."))
    ema = checkpoint.part(state, "ema.") if averaged else {}
    objective = saved["objective"]["name"]
    found = Source(f"{path} at step {checkpoint.step_of(folder)}", {}, objective=objective, native=True)
    found.checkpoint = folder
    found.notes += ["the average of its weights"] if ema else []
    for name, tensor in (checkpoint.part(state, "model.") | ema).items():
        inside = re.fullmatch(r"encoder\.[a-z_]+\.(.+)", name)  # encoder.vit.blocks...
        found.tensors[inside[1] if inside else f"{objective}.{name}"] = tensor
    if saved.get("encoder") is not None:
        found.mean, found.std = saved["encoder"]["mean"], saved["encoder"]["std"]
        stem = found.tensors.get("patch_embed.proj.weight")
        found.grid = _grid(saved["data"]["image_size"], stem.shape[-1] if stem is not None else None)
        found.num_heads = saved["encoder"].get("num_heads")
    return found


def unwrap(loaded: Any, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Descend through {'model': ...} and the like to the dict of tensors; says what was chosen among several."""
    if isinstance(loaded, Network):
        return tensors_inside(loaded, path), ["a whole pickled network, of which only the tensors were read"]
    notes = []
    while isinstance(loaded, dict) and not _holds_tensors(loaded):
        inside = [key for key in WRAPPERS if isinstance(loaded.get(key), dict)]
        if not inside:
            break
        if len(inside) > 1:
            notes.append(f"{inside[0]!r} was taken, not {', '.join(map(repr, inside[1:]))}")
        loaded = loaded[inside[0]]
    if not isinstance(loaded, dict) or not _holds_tensors(loaded):
        keys = ", ".join(map(str, list(loaded)[:8])) if isinstance(loaded, dict) else type(loaded).__name__
        raise ConfigError(f"{path} holds no dict of tensors, only: {keys}")
    return {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}, notes


def tensors_inside(network: Network, path: Path) -> dict[str, Tensor]:
    """The parameters of a pickled network in the names of its state dict.

    A file may nest a network in itself, so their number has an end.
    """
    found: dict[str, Tensor] = {}
    places = [("", network)]
    for prefix, part in places:  # it grows
        if len(places) > MAX_NETWORKS:
            raise ConfigError(f"{path} holds more than {MAX_NETWORKS} networks, or one inside itself; fetch it again")
        own, parts = part.inside("_parameters"), part.inside("_modules")
        found |= {f"{prefix}{name}": value.detach() for name, value in own.items() if isinstance(value, Tensor)}
        places += [(f"{prefix}{name}.", inner) for name, inner in parts.items() if isinstance(inner, Network)]
    return found


def _holds_tensors(loaded: dict) -> bool:
    return any(isinstance(value, Tensor) for value in loaded.values())


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as safetensors: {error}") from error
    return _finite(path, tensors)


def _finite(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, when every value of theirs is a finite number."""
    broken = sorted(n for n, value in tensors.items() if value.is_floating_point() and not value.isfinite().all())
    if broken:
        raise ConfigError(f"{path} holds values that are not finite, first in {broken[0]}; take other weights")
    return tensors


def _read_pickle(path: Path) -> Any:
    """The objects of a torch file, with stand-ins; nothing that the file names is imported or called."""
    with torch.serialization.safe_globals(STAND_INS):  # type: ignore[arg-type]
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises what it likes here; its text names the class
            found = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(
                r"from the unsafe module ([\w.]+)", str(error)
            )
            if found:
                allowed = ", ".join(name for _, name in STAND_INS if name not in (*NUMPY_SCALARS, *DALLE))
                raise ConfigError(
                    f"{path} wants to load {found[1]}, which could run code; beside tensors only {allowed} "
                    f"and DALL-E's networks are accepted: save its state dict as safetensors where you trust it"
                ) from error
            if "TorchScript" in str(error):
                raise ConfigError(
                    f"{path} is a TorchScript program, not a file of weights; save its state dict"
                ) from error
            raise ConfigError(f"{path} cannot be read as a torch file: {str(error).splitlines()[0][:200]}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _grid(image_size: Any, patch_size: Any) -> tuple[int, int] | None:
    """Rows and columns of patches of an image size, if both are known."""
    if not isinstance(patch_size, int) or image_size is None:
        return None
    height, width = [image_size] * 2 if isinstance(image_size, int) else image_size
    return height // patch_size, width // patch_size
