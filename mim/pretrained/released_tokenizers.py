"""Released tokenizers -> a tokenizer's folder, which `tokenizer: {path: FOLDER}` of a recipe reads.

DALL-E's dVAE (Ramesh et al. 2021, arXiv 2102.12092; `encoder.pkl` and `decoder.pkl`, two whole pickled networks) and
BEiT v2's VQ-KD (Peng et al. 2022, arXiv 2208.06366; `{"model": ...}`). Which of them a file is shows in its keys; every
number of the config is read off the shapes, and the shapes must be those of the tokenizer that the config describes.
A number of heads shows in no shape: VQ-KD's are those of its code, all heads 64 wide.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokenizer as tokenizers
from mim.config import ConfigError
from mim.pretrained import layouts, weight_files
from mim.pretrained.layouts import Tensors
from mim.pretrained.resample import shape_of
from mim.pretrained.weights import Report
from mim.saving.checkpoint import part

FIRST = "blocks.input.w"  # by which each half of a dVAE is known
CODES = "quantize.embedding.weight"  # by which a VQ-KD tokenizer is known
HEAD_WIDTH = 64  # of VQ-KD's transformers
SIDES = {"encoder": "encode_task_layer", "decoder": "decode_task_layer"}  # VQ-KD's networks and the layers after them


@dataclass
class Released:
    """A released tokenizer in our names."""

    family: str
    name: str  # of its module in tokenizer/
    config: dict[str, Any]  # of that module
    tensors: Tensors
    unused: list[str]
    neutral: list[str] = field(default_factory=list)  # lacking in the file
    notes: list[str] = field(default_factory=list)


def import_tokenizer(files: Sequence[Path], out: Path) -> Report:
    """Write the tokenizer of one or two released files to a new folder, with a report on every tensor (init.json)."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; choose another folder for the tokenizer")
    sources = [open_file(file) for file in files]
    origin = " and ".join(source.origin for source in sources)
    released = recognise(sources)
    # Copies, for tensors of a pickle may share memory, which safetensors refuses to write.
    state = {name: tensor.to(torch.float32, copy=True) for name, tensor in released.tensors.items()}
    config = write(released, state, origin, out)
    report = Report(origin, released.family, num_wanted=len(state), neutral=released.neutral, unused=released.unused)
    report.loaded = [name for name in state if name not in released.neutral]
    report.notes += [f"{source.origin}: {note}" for source in sources for note in source.notes]
    report.notes += [
        *released.notes,
        f"{released.name}: {', '.join(f'{key} {config[key]}' for key in released.config)}",
        f"a recipe reads it as tokenizer.path={out}",
        f"it has no score card yet; `mim eval codebook {out} data.path=YOURS` measures it on your images",
    ]
    report.write(out)
    return report


def open_file(file: Path) -> weight_files.Source:
    """The tensors of a file; one of our own is refused, for it needs no import."""
    if not file.is_file():
        raise ConfigError(f"{file} is not a file; give the release's own, e.g. encoder.pkl decoder.pkl, then OUT")
    if (file.parent / tokenizers.DESCRIPTION).is_file() and file.name == tokenizers.WEIGHTS:
        raise ConfigError(f"{file} is a tokenizer of ours already; set tokenizer.path={file.parent}")
    return weight_files.from_file(file)


def recognise(sources: list[weight_files.Source]) -> Released:
    """Find out which tokenizer the files are, and give it our names."""
    for source in sources:
        if prefix_of(source.tensors, CODES) is not None:
            if len(sources) > 1:
                raise ConfigError(f"{source.origin} is a whole VQ-KD tokenizer; import it alone")
            return vqkd(source)
        if not prefixes(source.tensors, FIRST):
            names = list(source.tensors)
            has = f"{', '.join(names[:6])}{f' and {len(names) - 6} more' if len(names) > 6 else ''}" or "no tensors"
            raise ConfigError(
                f"{source.origin} is no released tokenizer: halves of DALL-E's dVAE have {FIRST}, VQ-KD has {CODES}, "
                f"but it has {has}; choose encoder.pkl and decoder.pkl, or a VQ-KD checkpoint"
            )
    return dalle(sources)


# ---- DALL-E's dVAE -----------------------------------------------------------------------------------------------


def dalle(sources: list[weight_files.Source]) -> Released:
    """The dVAE of an encoder and a decoder, in two files of any order or in one; its names are ours already."""
    halves: dict[str, Tensors] = {}
    origins: dict[str, str] = {}
    unused = []
    for source in sources:
        known = [f"{prefix}blocks." for prefix in prefixes(source.tensors, FIRST)]
        unused += [name for name in source.tensors if not name.startswith(tuple(known))]
        for prefix in known:
            half = {f"blocks.{name}": tensor for name, tensor in part(source.tensors, prefix).items()}
            # The encoder begins with a convolution of 7x7, the decoder with one of 1x1.
            kind = "decoder" if size(half, FIRST, 4, source.origin)[-1] == 1 else "encoder"
            if kind in halves:
                raise ConfigError(
                    f"{origins[kind]} and {source.origin} are both {kind}s; give one encoder, one decoder"
                )
            halves[kind], origins[kind] = half, source.origin
    for kind, lacks in (("encoder", "decoder"), ("decoder", "encoder")):
        if lacks not in halves:
            raise ConfigError(
                f"{origins[kind]} is the {kind} of a dVAE without its {lacks}; a tokenizer encodes and decodes, so "
                f"give both: mim tokenizer import encoder.pkl decoder.pkl OUT"
            )
    config = dalle_config(halves["encoder"], halves["decoder"], origins)
    tensors = {f"{kind}.{name}": tensor for kind in ("encoder", "decoder") for name, tensor in halves[kind].items()}
    return Released("DALL-E's dVAE", "dvae", config, tensors, unused)


def dalle_config(encoder: Tensors, decoder: Tensors, origins: dict[str, str]) -> dict[str, Any]:
    """The fields of tokenizer/dvae.py that decide shapes, read off the shapes; both halves must agree."""
    width, channels, *_ = size(encoder, FIRST, 4, origins["encoder"])
    num_codes, *_ = size(encoder, "blocks.output.conv.w", 4, origins["encoder"])
    n_init, decoded, *_ = size(decoder, FIRST, 4, origins["decoder"])
    values, *_ = size(decoder, "blocks.output.conv.w", 4, origins["decoder"])
    if num_codes != decoded:
        raise ConfigError(
            f"{origins['encoder']} encodes to {num_codes} codes, {origins['decoder']} decodes {decoded}; "
            f"take both from one release"
        )
    if values not in (channels, 2 * channels):
        raise ConfigError(
            f"{origins['encoder']} takes images of {channels} channels, but {origins['decoder']} gives {values} values "
            f"per pixel, not {2 * channels}; take both from one release"
        )
    return {
        "num_codes": num_codes,
        "channels": channels,
        "width": width,
        "n_init": n_init,
        "num_groups": count(encoder, r"blocks\.group_(\d+)\."),
        "blocks_per_group": count(encoder, r"blocks\.group_1\.block_(\d+)\."),
        "likelihood": "mse" if values == channels else "logit_laplace",
    }


# ---- BEiT v2's VQ-KD ---------------------------------------------------------------------------------------------


def vqkd(source: weight_files.Source) -> Released:
    """The tokenizer of a VQ-KD checkpoint; its teacher, the scaling of its input and its losses stay unused."""
    prefix, origin = prefix_of(source.tensors, CODES), source.origin
    assert prefix is not None
    theirs = part(source.tensors, prefix)
    size(theirs, CODES, 2, origin)
    started = theirs.get("quantize.embedding.initted")
    if started is not None and not started.any():
        raise ConfigError(
            f"the codebook of {origin} was never started (quantize.embedding.initted is 0); train it first"
        )
    try:
        tensors, used = vqkd_names(theirs)
    except KeyError as missing:
        raise ConfigError(f"{origin} lacks {missing} of a VQ-KD tokenizer; fetch it again") from None
    counts = "quantizer.sizes", "quantizer.sums"
    neutral = [] if "quantize.cluster_size" in theirs else list(counts)
    kept = {f"{prefix}{name}" for name in used}
    unused = [name for name in source.tensors if name not in kept]
    notes = ["the averages behind its codes (quantizer.sums) are the codes times how often it used them"]
    return Released("VQ-KD of BEiT v2", "vqkd", vqkd_config(theirs, origin), tensors, unused, neutral, notes)


def vqkd_names(theirs: Tensors) -> tuple[Tensors, set[str]]:
    """VQ-KD's names as released -> those of tokenizer/vqkd.py, and which of theirs were used.

    `attn.q_bias` and `v_bias` become one bias with zeros for keys. Of a codebook the file has the codes and how often
    each was used; the averages of sums, which only a further training would read, are made to agree with both.
    """
    ours: Tensors = {}
    for side, task_layer in SIDES.items():
        vit = layouts.join_qkv(layouts.rename(part(theirs, f"{side}."), layouts.ORIGINAL))
        ours |= {f"{side}.vit.{name}": tensor for name, tensor in vit.items()}
        ours |= {f"{side}.task_layer.{name}": tensor for name, tensor in part(theirs, f"{task_layer}.").items()}
    codes = theirs[CODES]  # (K, d)
    sizes = theirs.get("quantize.cluster_size", codes.new_ones(len(codes)))  # (K,)
    ours |= {"quantizer.codes": codes, "quantizer.sizes": sizes, "quantizer.sums": codes * sizes[:, None]}
    ours["target_mean"] = codes.new_zeros(len(theirs["decode_task_layer.2.weight"]))  # its targets were not centred
    used = tuple(f"{name}." for names in SIDES.items() for name in names)
    return ours, {n for n in theirs if n.startswith(used) or n in (CODES, "quantize.cluster_size")}


def vqkd_config(theirs: Tensors, origin: str) -> dict[str, Any]:
    """The fields of tokenizer/vqkd.py that decide shapes, read off the shapes."""
    num_codes, code_width = size(theirs, CODES, 2, origin)
    width, channels, stride, _ = size(theirs, "encoder.patch_embed.proj.weight", 4, origin)
    decoder_width, *_ = size(theirs, "decoder.patch_embed.proj.weight", 4, origin)
    target_width, _ = size(theirs, "decode_task_layer.2.weight", 2, origin)
    num_positions = size(theirs, "encoder.pos_embed", 3, origin)[1] - 1  # without the class token's
    side = round(max(num_positions, 0) ** 0.5)
    if side < 1 or side**2 != num_positions:
        raise ConfigError(
            f"{origin} has positions for {num_positions} patches, which make no square; only squares are read"
        )
    for key, found in (("encoder", width), ("decoder", decoder_width)):
        if found % HEAD_WIDTH:
            raise ConfigError(
                f"the {key} of {origin} is {found} wide, which is no multiple of its heads of {HEAD_WIDTH}"
            )
    return {
        "num_codes": num_codes,
        "code_width": code_width,
        "channels": channels,
        "target_width": target_width,
        "image_size": side * stride,
        "stride": stride,
        "width": width,
        "depth": count(theirs, r"encoder\.blocks\.(\d+)\."),
        "num_heads": width // HEAD_WIDTH,
        "decoder_width": decoder_width,
        "decoder_depth": count(theirs, r"decoder\.blocks\.(\d+)\."),
        "decoder_num_heads": decoder_width // HEAD_WIDTH,
    }


# ---- both --------------------------------------------------------------------------------------------------------


def write(released: Released, state: Tensors, origin: str, out: Path) -> dict[str, Any]:
    """Build the tokenizer that the config describes, fill it and save it. Returns the whole config."""
    module = importlib.import_module(f"tokenizer.{released.name}")
    cfg = module.Config(**released.config)
    try:
        with torch.device("meta"):
            tokenizer = module.build(cfg)
        head = f"the release in {origin} is not the tokenizer that its shapes describe"
        tokenizers.require_same_layout(state, tokenizer.state_dict(), head)
    except (ValueError, RuntimeError) as error:  # RuntimeError: sizes beyond what a tensor can have
        raise ConfigError(f"{error}; fetch it again, all of it from one place") from error
    tokenizer.load_state_dict(state, assign=True)
    tokenizers.save(tokenizer, out, name=released.name, config=dataclasses.asdict(cfg), card={})
    return dataclasses.asdict(cfg)


def prefixes(tensors: Tensors, anchor: str) -> list[str]:
    """What stands before an anchor in the names of tensors (`module.`, `encoder.`, or nothing)."""
    return [name.removesuffix(anchor) for name in tensors if name == anchor or name.endswith(f".{anchor}")]


def prefix_of(tensors: Tensors, anchor: str) -> str | None:
    """The shortest of the prefixes; None without the anchor."""
    return min(prefixes(tensors, anchor), key=len, default=None)


def size(tensors: Tensors, name: str, ndim: int, origin: str) -> tuple[int, ...]:
    """The shape of a tensor that must be there with so many dimensions."""
    tensor: Tensor | None = tensors.get(name)
    if tensor is None or tensor.ndim != ndim:
        found = "lacks it" if tensor is None else f"has {shape_of(tensor)}"
        raise ConfigError(f"{name} should have {ndim} dimensions, but {origin} {found}; fetch it again")
    return tuple(tensor.shape)


def count(tensors: Tensors, pattern: str) -> int:
    """How many numbers stand in the names of tensors where the pattern has its group."""
    return len({found[1] for name in tensors if (found := re.match(pattern, name))})
