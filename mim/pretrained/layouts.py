"""Published key layouts -> the names of timm's VisionTransformer. Pure functions, dict -> dict.

A layout is recognised by the key of its patch embedding, which also shows the prefix under which the encoder lies
(`module.`, `backbone.`, `encoder.`, `visual.`, `vit.`, ...). Keys that a layout does not know keep their names, so that
they end in the report as unused. Tensors of an objective get its name in front: `mae.decoder_embed.weight`. BEiT's
`lm_head` is none of these: its rows are codes of a tokenizer that the file does not hold.

Sources: the reference classes in transformers (`*ForPreTraining`, `*Model`, as `save_pretrained` writes them),
open_clip, and the files of BEiT (Bao et al. 2022, arXiv 2106.08254), MAE (He et al. 2022, arXiv 2111.06377), SimMIM
(Xie et al. 2022, arXiv 2111.09886), DINO, iBOT and DINOv2 (Oquab et al. 2024, arXiv 2304.07193).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mim.patches import sincos_positions

Tensors = dict[str, Tensor]
Rules = list[tuple[str, str]]  # pattern, replacement; applied to a name in order

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
INCEPTION = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])

BLOCKS: Rules = [  # of transformers
    (r"\.attention\.attention\.query\.", ".attn.q."),
    (r"\.attention\.attention\.key\.", ".attn.k."),
    (r"\.attention\.attention\.value\.", ".attn.v."),
    (r"\.attention\.attention\.relative_position_bias\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),  # gated, of DINOv2 giant
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"\.lambda_([12])$", r".ls\1.gamma"),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
]
TRANSFORMERS: Rules = [
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.", "blocks."),
    (r"^encoder\.relative_position_bias\.", "rel_pos_bias."),
    (r"^pooler\.layernorm\.", "fc_norm."),
    (r"^layernorm\.", "norm."),
    *BLOCKS,
]
TRANSFORMERS_DECODER: Rules = [
    (r"^decoder\.decoder_(?:layers|encoder\.layer)\.", "decoder_blocks."),  # classic, and as transformers 5 writes it
    (r"^decoder\.", ""),
    *BLOCKS,
]
TRANSFORMERS_DINOV3: Rules = [
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^(?:model\.)?layer\.", "blocks."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.up_proj\.", ".mlp.fc1."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
]
TRANSFORMERS_CLIP: Rules = [
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^pre_layrnorm\.", "norm_pre."),  # spelt so in the files
    (r"^post_layernorm\.", "norm."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.layer_norm([12])\.", r".norm\1."),
]
OPEN_CLIP: Rules = [
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.ls_([12])\.gamma$", r".ls\1.gamma"),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
]
ORIGINAL: Rules = [  # BEiT, MAE, DINO, DINOv2, DINOv3, DeiT, iBOT, SimMIM: timm's names with a few of their own
    (r"^(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma"),
    (r"^(blocks\.\d+\.attn)\.([qv])_bias$", r"\1.\2.bias"),
    (r"\.mlp\.w12\.", ".mlp.fc1."),  # gated, of DINOv2 giant
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"^(?:register_tokens|storage_tokens)$", "reg_token"),
]


@dataclass
class Layout:
    """Weights in timm's names."""

    family: str
    encoder: Tensors
    rest: Tensors  # OBJECTIVE.name, and whatever has no place
    pixels: tuple[list[float], list[float]] | None  # mean and std that the family was trained with, where that is known


def recognise(tensors: Tensors) -> Layout:
    """Find the layout of released weights and give them timm's names; names that no layout has stay as they are."""
    known: list[tuple[str, Callable[[Tensors, Tensors], Layout]]] = [
        ("embeddings.patch_embeddings.projection.weight", transformers_vit),
        ("embeddings.patch_embeddings.weight", transformers_dinov3),
        ("embeddings.patch_embedding.weight", transformers_clip),
        ("conv1.weight", open_clip),
        ("patch_embed.proj.weight", original),
    ]
    for anchor, layout in known:
        prefixes = [n.removesuffix(anchor) for n in tensors if n == anchor or n.endswith(f".{anchor}")]
        if layout is open_clip:
            prefixes = [p for p in prefixes if f"{p}class_embedding" in tensors]
        if prefixes:
            prefix = min(prefixes, key=lambda p: ("teacher" not in p, "decoder" in p, len(p)))
            inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            return layout(inside, {n: t for n, t in tensors.items() if not n.startswith(prefix)})
    return Layout("unknown layout", tensors, {}, None)


def transformers_vit(inside: Tensors, outside: Tensors) -> Layout:
    """ViTModel, ViTMAEForPreTraining, BeitModel, Dinov2Model, Dinov2WithRegistersModel and their heads."""
    moved = {n: t for n, t in outside.items() if n.startswith("layernorm.")}  # beside `beit.` under a language head
    encoder = join_qkv(rename(inside | moved, TRANSFORMERS))
    rest = {n: t for n, t in outside.items() if n not in moved}
    if "decoder.decoder_embed.weight" in rest:
        decoder = join_qkv(rename(rest, TRANSFORMERS_DECODER))
        return Layout("MAE (transformers)", encoder, {f"mae.{n}": t for n, t in decoder.items()}, IMAGENET)
    if not any(name.endswith(".key.bias") for name in inside):
        rest |= {"beit.mask_token": encoder.pop("mask_token")} if "mask_token" in encoder else {}
        return Layout("BEiT (transformers)", encoder, rest, INCEPTION)
    if "blocks.0.ls1.gamma" in encoder:
        return Layout("DINOv2 (transformers)", encoder, rest, IMAGENET)
    return Layout("ViT (transformers)", encoder, rest, INCEPTION)


def transformers_dinov3(inside: Tensors, outside: Tensors) -> Layout:
    """DINOv3ViTModel: rotary positions, no bias of keys."""
    return Layout("DINOv3 (transformers)", join_qkv(rename(inside, TRANSFORMERS_DINOV3)), outside, IMAGENET)


def transformers_clip(inside: Tensors, outside: Tensors) -> Layout:
    """CLIPVisionModel, or the vision tower of CLIPModel."""
    return Layout("CLIP (transformers)", clip_shapes(join_qkv(rename(inside, TRANSFORMERS_CLIP))), outside, CLIP)


def open_clip(inside: Tensors, outside: Tensors) -> Layout:
    """The vision tower of OpenAI's and open_clip's state dicts; the text tower stays unused."""
    return Layout("CLIP (open_clip)", clip_shapes(rename(inside, OPEN_CLIP)), outside, CLIP)


def original(inside: Tensors, outside: Tensors) -> Layout:
    """The authors' own files, all close to timm's names; which one it is shows in the keys beside the blocks."""
    encoder = join_qkv(rename(inside, ORIGINAL))
    decoder = {n: t for n, t in encoder.items() if n.startswith("decoder_")}
    if decoder:
        decoder |= {"mask_token": encoder["mask_token"]} if "mask_token" in encoder else {}
        encoder = {n: t for n, t in encoder.items() if n not in decoder}
        return Layout("MAE", encoder, outside | {f"mae.{n}": t for n, t in decoder.items()}, IMAGENET)
    mask_token = encoder.get("mask_token")
    if "decoder.0.weight" in outside:
        return Layout("SimMIM", encoder, simmim_head(encoder, outside), IMAGENET)
    if mask_token is not None and mask_token.ndim == 3 and "reg_token" not in encoder:  # DINOv2's is (1, D)
        outside = outside | {"beit.mask_token": encoder.pop("mask_token")}
        return Layout("BEiT", encoder, outside, INCEPTION)
    if any("relative_position_bias_table" in name for name in encoder):
        return Layout("BEiT", encoder, outside, INCEPTION)
    if mask_token is not None:
        return Layout("DINOv2", encoder, outside, IMAGENET)
    if "masked_embed" in encoder or any("head.last_layer" in name for name in outside):
        return Layout("DINO or iBOT", encoder, outside, IMAGENET)
    if "pos_embed" in encoder and is_sincos(encoder["pos_embed"], None):
        return Layout("MAE (encoder only)", encoder, outside, IMAGENET)
    return Layout("timm's names (ViT, DeiT, DINO, ...)", encoder, outside, None)


def simmim_head(encoder: Tensors, outside: Tensors) -> Tensors:
    """SimMIM's mask token and its 1x1 convolution, whose outputs run over (channel, row, column): ours end in channels.

    The token is taken out of `encoder`.
    """
    rest = dict(outside)
    if "mask_token" in encoder:
        rest["simmim.mask_token"] = encoder.pop("mask_token")
    for part in ("weight", "bias"):
        tensor = rest.pop(f"decoder.0.{part}")
        side = round((len(tensor) / 3) ** 0.5)
        pixels = tensor.reshape(3, side, side, -1).permute(1, 2, 0, 3)  # (p, p, 3, D), or D = 1 of the bias
        rest[f"simmim.head.{part}"] = pixels.reshape(3 * side**2, *tensor.shape[1:2])  # (P, D) or (P,)
    return rest


def rename(tensors: Tensors, rules: Rules) -> Tensors:
    """Apply all rules to every name."""
    found = {}
    for name, tensor in tensors.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        found[name] = tensor
    return found


def join_qkv(tensors: Tensors) -> Tensors:
    """`attn.{q,k,v}` -> `attn.qkv`; a bias that keys lack is zero (it would cancel in the softmax in any case)."""
    joined = dict(tensors)
    for name in tensors:
        stem, _, kind = name.rpartition(".q.")
        if kind not in ("weight", "bias") or not re.fullmatch(r"(decoder_)?blocks\.\d+\.attn", stem):
            continue
        q, v = joined.pop(name), joined.pop(f"{stem}.v.{kind}")
        k = joined.pop(f"{stem}.k.{kind}", torch.zeros_like(q))
        joined[f"{stem}.qkv.{kind}"] = torch.cat([q, k, v])  # (3 D, D) or (3 D,)
    return joined


def clip_shapes(tensors: Tensors) -> Tensors:
    """Class token (D,) and positions (N + 1, D) with the leading ones that timm has."""
    shaped = dict(tensors)
    shaped["cls_token"] = tensors["cls_token"].reshape(1, 1, -1)  # (1, 1, D)
    shaped["pos_embed"] = tensors["pos_embed"].unsqueeze(0)  # (1, N + 1, D)
    return shaped


def adapt(tensors: Tensors, wanted: Iterable[str]) -> tuple[Tensors, list[str]]:
    """From VisionTransformer's names to those of timm's Beit and Eva where a module wants these, and remarks on it.

    A shared table of relative positions is copied to every block that has its own (BEiT's fine-tuning does so); a final
    norm that the file lacks is taken from its `fc_norm`.
    """
    names, found, remarks = dict.fromkeys(wanted), dict(tensors), []
    if "norm.weight" in names and "norm.weight" not in found and "fc_norm.weight" in found:
        remarks.append("norm is the file's fc_norm: it was fine-tuned on pooled patches")
        found |= {f"norm.{part}": found.pop(f"fc_norm.{part}") for part in ("weight", "bias")}
    for name in tensors:
        block = name.rpartition(".attn.")[0] or name.rpartition(".ls")[0]
        if name.endswith(("ls1.gamma", "ls2.gamma")) and f"{block}.gamma_1" in names:
            found[f"{block}.gamma_{name[-7]}"] = found.pop(name)
        if name.endswith("attn.qkv.bias") and f"{block}.attn.q_bias" in names:
            q, _, v = found.pop(name).chunk(3)
            found |= {f"{block}.attn.q_bias": q, f"{block}.attn.v_bias": v}
    shared = "rel_pos_bias.relative_position_bias_table"
    own = [n for n in names if n.endswith("attn.relative_position_bias_table")]
    if shared in found and shared not in names and own:
        table = found.pop(shared)
        found |= {name: table.clone() for name in own}
        remarks.append(f"the shared table of relative positions was copied to {len(own)} blocks")
    return found, remarks


def is_sincos(positions: Tensor, grid: tuple[int, int] | None) -> bool:
    """Whether a table (1, N or N + 1, D) holds MAE's fixed positions, with zeros for the class token."""
    count, width = positions.shape[-2:]
    side = round(count**0.5)
    h, w = grid or (side, side)
    prefix = count - h * w
    if width % 4 or not 0 <= prefix <= 1:
        return False
    expected = torch.cat([torch.zeros(prefix, width), sincos_positions((h, w), width)])
    return torch.allclose(positions[0].float(), expected, atol=1e-4)
