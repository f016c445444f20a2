"""Images <-> codes: what a tokenizer is, and the two files in which one is kept.

A tokenizer is a module of this folder with a dataclass `Config` and `build(cfg)`. A saved one is a folder with
`tokenizer.safetensors` (its weights) and `tokenizer.json` (format, name, config and score card). Nothing else is read
and nothing is unpickled, so a tokenizer from elsewhere is data and never code.
"""

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FORMAT = "mimstream-tokenizer"
VERSION = 1
WEIGHTS, DESCRIPTION = "tokenizer.safetensors", "tokenizer.json"


class Tokenizer(Protocol):
    """Maps images to a grid of codes and back, and knows the loss that trains it. Images are (B, C, H, W) in [0, 1]."""

    num_codes: int  # V
    stride: int  # pixels of the image per code, in both directions
    channels: int  # C

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the codes of an (H, W) image; ValueError when the size does not divide by the stride."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Codes (B, N) int64, row-major over the grid."""
        ...

    def decode(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        """Images (B, C, H, W), or the features (B, N, D') of a teacher, of codes (B, N) on a grid of (h, w)."""
        ...

    def loss(self, batch: dict[str, Any], progress: Tensor) -> dict[str, Tensor]:
        """ "loss" (B,), "codes" (B, N), and detached values, (B,) or 0-d.

        Reads "tokenizer_images" (else "images") and the seeds "noise" (B,); `progress` in [0, 1] is 0-d.
        """
        ...

    # optional:
    # reads: tuple of what `loss` reads of a batch, with "targets" (B, N, D') of a frozen teacher
    # start(batches) -> None, once before the first step of a fresh run (k-means)
    # after_step(step: int, progress: Tensor) -> None, once per optimizer step (codebooks)


def save(tokenizer: nn.Module, folder: str | Path, *, name: str, config: dict[str, Any], card: dict[str, Any]) -> None:
    """Writes a tokenizer: `name` is its module in this folder, `config` the fields of its Config, `card` its scores."""
    folder = Path(folder)
    state = {key: tensor.contiguous() for key, tensor in tokenizer.state_dict().items()}
    if broken := not_finite(state):
        raise ValueError(
            f"the tokenizer for {folder} holds values that are not finite, first in {broken[0]}; "
            f"start again from an earlier checkpoint with a lower optim.lr"
        )
    folder.mkdir(parents=True, exist_ok=True)
    description = {"format": FORMAT, "version": VERSION, "name": name, "config": config, "card": card}
    save_file(state, folder / WEIGHTS)
    _write_json(folder / DESCRIPTION, description)


def load(folder: str | Path) -> Any:
    """The tokenizer in a folder, frozen and in evaluation mode, on the CPU; ValueError when it does not fit.

    Kernels of convolutions lie channels-last in memory, so that no image is turned before one and back behind it.
    """
    folder = Path(folder)
    description = _description(folder / DESCRIPTION)
    module = importlib.import_module(f"{__name__}.{description['name']}")
    try:
        cfg = module.Config(**description["config"])
    except TypeError as error:
        raise ValueError(f"{folder / DESCRIPTION} does not fit tokenizer.{description['name']}: {error}") from None
    with torch.random.fork_rng(
        devices=[]
    ):  # the initial weights are overwritten: they must not move anyone's random state
        tokenizer = module.build(cfg)
    try:
        state = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} cannot be read as safetensors: {error}; get the folder again") from error
    if broken := not_finite(state):
        raise ValueError(f"{folder / WEIGHTS} holds values that are not finite, first in {broken[0]}")
    require_same_layout(state, tokenizer.state_dict(), f"{folder / WEIGHTS} does not match its config")
    tokenizer.load_state_dict(state, assign=True)  # also where it was built without memory
    return tokenizer.requires_grad_(False).eval().to(memory_format=torch.channels_last)


def score_card(folder: str | Path) -> dict[str, float]:
    """The score card of the tokenizer in a folder; empty when it has none, or there is no tokenizer."""
    file = Path(folder) / DESCRIPTION
    return _description(file).get("card", {}) if file.is_file() else {}


def file_hash(folder: str | Path) -> str:
    """SHA-256 of which tokenizer lies in a folder: its name, config and weights, but not its scores."""
    folder = Path(folder)
    description = _description(folder / DESCRIPTION)
    found = hashlib.sha256(json.dumps([description["name"], description["config"]], sort_keys=True).encode())
    with (folder / WEIGHTS).open("rb") as file:
        found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def write_card(folder: str | Path, card: dict[str, float]) -> None:
    """Replace the score card of the tokenizer in a folder."""
    file = Path(folder) / DESCRIPTION
    _write_json(file, {**_description(file), "card": card})


def not_finite(state: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that hold a value that is no finite number, sorted."""
    return sorted(key for key, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all())


def require_same_layout(found: dict[str, Tensor], expected: dict[str, Tensor], sentence: str) -> None:
    """ValueError, which starts with `sentence`, with the names in which tensors differ from those of a tokenizer."""
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    other = sorted(
        f"{key} ({list(found[key].shape)} instead of {list(expected[key].shape)})"
        for key in expected.keys() & found.keys()
        if expected[key].shape != found[key].shape
    )
    differences = {"lacks": missing, "also holds": extra, "has another shape of": other}
    parts = [
        f"{verb} {', '.join(keys[:3])}{' ...' if len(keys) > 3 else ''}" for verb, keys in differences.items() if keys
    ]
    if parts:
        raise ValueError(f"{sentence}: it {' and '.join(parts)}")


def names() -> list[str]:
    """Names of the tokenizers that stand in this folder."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if "\nclass Config" in path.read_text())


def _write_json(file: Path, description: dict[str, Any]) -> None:
    """Written aside, then renamed: a reader sees the old text or the new."""
    aside = file.with_name(f".{file.name}.tmp")
    aside.write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")
    aside.replace(file)


def _description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f'{path} does not describe a tokenizer: its "format" must be "{FORMAT}"')
    if description.get("version") != VERSION:
        raise ValueError(f"{path} has version {description.get('version')}, this program reads version {VERSION}")
    # The name is looked up in the folder before it is imported, so no file can name other code.
    if description.get("name") not in names():
        raise ValueError(f'{path} names the tokenizer "{description.get("name")}"; known are {", ".join(names())}')
    if not isinstance(description.get("config"), dict):
        raise ValueError(f'{path} has no "config" of tokenizer.{description["name"]}')
    return description
