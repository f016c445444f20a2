"""Frozen networks beside what is trained: where they lie, whether they will do, and what they write into a batch.

A tokenizer writes `codes`, a teacher `targets` or `teacher_logits`; a cache of codes may stand in the tokenizer's
place. They compute as the run does (`computing`), and what they write is float32 or integers.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tokenizer as tokenizers
from mim.config import ConfigError
from mim.contracts import Batch
from mim.data import tokens
from mim.saving import checkpoint
from tokenizer.card import RED, verdict
from tokenizer.quantize import images_of


def dtype_of(precision: str) -> torch.dtype:
    """In what the matrix products of frozen networks are done in a run of this `train.precision`.

    Under fp16 in float32: their activations were never held within its range, and an infinity would be a wrong code
    without a word.
    """
    return torch.bfloat16 if precision == "bf16" else torch.float32


def computing(precision: str, device: torch.device) -> torch.autocast:
    """A context in which frozen networks compute as `dtype_of` says; quantizers stay in float32 by themselves."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype_of(precision) is torch.bfloat16)


@torch.no_grad()
def write_targets(frozen: dict[str, Any], batch: Batch) -> None:
    """Let the frozen networks write `codes`, `targets` or `teacher_logits` into a batch that is on the device."""
    if "teacher" in frozen:
        batch[frozen["teacher"].writes] = frozen["teacher"](batch["images"])  # (B, N, D') or (B, classes)
    if "tokenizer" in frozen:
        batch["codes"] = frozen["tokenizer"].encode(images_of(batch))  # (B, N)


def tokenizer_path(section: dict[str, Any]) -> Path:
    """The folder that holds a frozen tokenizer's files: the section's path, or the newest checkpoint of that run."""
    if not section.get("path"):
        raise ConfigError("tokenizer.path is missing: the run of a trained tokenizer, e.g. tokenizer.path=runs/dvae")
    path = Path(section["path"]).expanduser()
    if (path / "tokenizer.json").is_file():
        return path
    newest = checkpoint.newest(path) if path.is_dir() else None
    if newest is None or not (newest / "tokenizer.json").is_file():
        raise ConfigError(
            f"tokenizer.path={str(path)!r} holds no trained tokenizer; train one first, e.g. "
            f"`mim train {section.get('recipe', 'RECIPE')} train.run={path}`"
        )
    return newest


def teacher_path(section: dict[str, Any]) -> Path:
    """Where a frozen teacher comes from: a run directory, or `init` of one that others released."""
    if section.get("model") is not None:  # of timm
        return Path(str(section.get("init") or section["model"]))
    if section.get("encoder") is not None:
        if not section.get("init"):
            raise ConfigError(
                "teacher.init is missing: the released weights of teacher.encoder, a file, a folder or a timm name"
            )
        return Path(str(section["init"]))
    if not section.get("path"):
        raise ConfigError("teacher.path is missing: the run of a trained encoder, e.g. teacher.path=runs/mae")
    path = Path(section["path"]).expanduser()
    if not path.is_dir() or checkpoint.newest(path) is None:
        raise ConfigError(
            f"teacher.path={str(path)!r} holds no trained encoder; train one first, e.g. "
            f"`mim train {section.get('recipe', 'RECIPE')} train.run={path}`"
        )
    return path


def weights_hash(network: torch.nn.Module) -> str:
    """SHA-256 over the names and values of all weights."""
    found = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def has_tokenizer(section: dict[str, Any]) -> bool:
    """Whether the tokenizer that a section names is there."""
    try:
        tokenizer_path(section)
    except ConfigError:
        return False
    return True


def check_tokenizer(
    section: dict[str, Any] | None, tokenizer: Any, cache: tokens.TokenCache | None = None
) -> list[str]:
    """The verdict on a frozen tokenizer as a start line; a red one is refused, unless `tokenizer.force` is true.

    tokenizer: what knows its `num_codes`; None where the recipe has none. cache: the codes that stand in its place.
    """
    if section is None or tokenizer is None or not (cache or section.get("path")):
        return []
    named = f"in {tokenizer_path(section)}" if cache is None else f"of {cache.path}"
    card = tokenizers.score_card(tokenizer_path(section)) if cache is None else cache.tokenizer.card
    colour, reason = verdict(card, tokenizer.num_codes)
    if colour == RED and not section.get("force"):
        raise ConfigError(
            f"the tokenizer {named} is red: {reason}; train a better one (`mim eval codebook "
            f"{section.get('path') or 'RUN'}` shows it), or set tokenizer.force=true"
        )
    return [f"tokenizer {named.removeprefix('in ')} is {colour}: {reason}"]


class Deferred:
    """A tokenizer of which training reads only the codes: loaded when an evaluation first asks for anything of it."""

    def __init__(self, sections: dict[str, Any], cache: tokens.TokenCache) -> None:
        self._section, self._cache = sections["tokenizer"], cache
        self._device = torch.device("cpu")

    def to(self, device: torch.device) -> Deferred:
        self._device = device
        return self

    @functools.cached_property
    def _loaded(self) -> Any:
        if not has_tokenizer(self._section):
            raise ConfigError(
                f"this evaluation needs the tokenizer, and the run has only its codes ({self._cache.path}); say "
                f"where it is (tokenizer.path=...), or leave the evaluation out"
            )
        folder = tokenizer_path(self._section)
        if (found := tokenizers.file_hash(folder)) != (made := self._cache.tokenizer.sha256):
            raise ConfigError(
                f"the tokenizer in {folder} is {found}, but the codes of {self._cache.path} are of {made}"
            )
        return tokenizers.load(folder).to(self._device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loaded, name)


class Teacher(torch.nn.Module):
    """A frozen encoder whose patch features are targets; it sees images at its own size and normalises them itself."""

    writes = "targets"

    def __init__(self, encoder: Any, image_size: tuple[int, int]):
        super().__init__()
        self.encoder = encoder
        self.image_size = image_size
        self.width = encoder.width
        self.grid = encoder.grid(image_size)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> features (B, N, D')."""
        if images.shape[-2:] != self.image_size:
            images = F.interpolate(images, size=self.image_size, mode="bicubic", antialias=True).clamp(0, 1)
        return self.encoder(images).patches.float()
