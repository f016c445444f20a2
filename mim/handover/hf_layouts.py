"""timm's encoders as native models of transformers: the class, its config.json and its tensors. Pure functions.

The tensors have the classic names, which transformers writes itself and every version of it reads. A kind takes an
encoder only if it computes exactly what the encoder computes; the one rounding is LayerScale, which ViTModel lacks,
folded into the layer before it. What the classes do is read from transformers 5.23 (`modeling_dinov2.py`,
`modeling_dinov2_with_registers.py`, `modeling_vit.py`, `modeling_beit.py`); the way back is mim/pretrained/layouts.py.

ViT: Dosovitskiy et al. 2021, arXiv 2010.11929. DINOv2: Oquab et al. 2024, arXiv 2304.07193; with registers: Darcet et
al. 2024, arXiv 2309.16588. BEiT: Bao et al. 2022, arXiv 2106.08254.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import Attention, GluMlp, LayerScale, Mlp, PatchEmbed
from timm.models.beit import Beit
from timm.models.beit import Block as BeitBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mim.pretrained.layouts import Rules, Tensors, rename

EXACT = 1e-6  # largest difference of a feature; the same operations in the same order give 0.0
FOLDED = 1e-5  # where LayerScale is multiplied into weights and rounded there
ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}
POOLS = ("class", "mean")

COMMON: Rules = [  # timm -> transformers
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^reg_token$", "embeddings.register_tokens"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^fc_norm\.", "pooler.layernorm."),
    (r"^rel_pos_bias\.", "encoder.relative_position_bias."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.relative_position_bias_table$", ".attn.relative_position_bias.relative_position_bias_table"),
    (r"\.attn\.(query|key|value|relative_position_bias)\.", r".attention.attention.\1."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
]
DINOV2: Rules = [*COMMON, (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1")]
GATED: Rules = [*DINOV2, (r"\.mlp\.fc1\.", ".mlp.weights_in."), (r"\.mlp\.fc2\.", ".mlp.weights_out.")]
VIT: Rules = [
    *COMMON,
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.gamma_([12])$", r".lambda_\1"),
]


class Unfit(ValueError):
    """An encoder that a kind cannot represent; the message is the reason."""


@dataclass
class Native:
    """A model as transformers stores it."""

    architecture: str  # its class
    config: dict[str, Any]  # config.json
    tensors: Tensors  # model.safetensors
    tolerance: float = EXACT  # largest allowed difference of a feature
    options: dict[str, Any] = field(default_factory=dict)  # of `from_pretrained`, so that the file is complete
    normed: bool = True  # whether the last hidden state has gone through the final norm


@dataclass
class Plain:
    """What a transformer of plain blocks is made of."""

    config: dict[str, Any]  # what all classes call alike
    hidden: int  # width inside the MLP
    gated: bool
    num_registers: int
    tensors: Tensors  # timm's names; queries, keys and values apart


def convert(kind: str, model: nn.Module, *, pool: str = "class") -> Native:
    """Give a timm encoder the class of a kind. `pool` is what BEiT's `pooler_output` will be. Raises `Unfit`."""
    require(kind == "beit" or pool == "class", "its class pools the class token; pool=mean is for kind=beit alone")
    return beit(model, pool) if kind == "beit" else KINDS[kind](model)


def candidates(model: nn.Module) -> list[str]:
    """The kinds that may fit an encoder, the one that is nearest to it first."""
    if isinstance(model, Beit):
        return ["beit"]
    scaled = any(isinstance(getattr(block, "ls1", None), LayerScale) for block in getattr(model, "blocks", []))
    return ["dinov2", "dinov2_with_registers", "vit"] if scaled else ["vit", "dinov2", "dinov2_with_registers"]


def dinov2(model: nn.Module) -> Native:
    """A ViT with LayerScale (where it has none: ones) and a class token."""
    plain = plain_vit(model)
    require(not plain.num_registers, f"it has {plain.num_registers} registers, which Dinov2Model lacks")
    native = _dinov2(plain, "Dinov2Model")
    native.config |= {"model_type": "dinov2", "use_mask_token": False}
    return native


def dinov2_with_registers(model: nn.Module) -> Native:
    """A ViT with registers, whose positions are added to them; the mask token that the class insists on is zero."""
    plain = plain_vit(model)
    require(plain.num_registers > 0, "it has no registers")
    native = _dinov2(plain, "Dinov2WithRegistersModel")
    native.config |= {"model_type": "dinov2_with_registers", "num_register_tokens": plain.num_registers}
    native.tensors["embeddings.mask_token"] = torch.zeros(1, plain.config["hidden_size"])  # (1, D)
    return native


def vit(model: nn.Module) -> Native:
    """A ViT without registers; LayerScale is folded into `attn.proj` and `mlp.fc2`, and no pooler is written."""
    plain = plain_vit(model)
    require(not plain.num_registers, f"it has {plain.num_registers} registers, which ViTModel lacks")
    require(not plain.gated, "its MLP is gated, that of ViTModel is not")
    scales = [name for name in plain.tensors if name.endswith((".ls1.gamma", ".ls2.gamma"))]
    for name in scales:
        gamma = plain.tensors.pop(name).double()
        layer = name.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        weight, bias = plain.tensors[f"{layer}.weight"], plain.tensors[f"{layer}.bias"]
        plain.tensors[f"{layer}.weight"] = (gamma[:, None] * weight).to(weight.dtype)
        plain.tensors[f"{layer}.bias"] = (gamma * bias).to(bias.dtype)
    return Native(
        architecture="ViTModel",
        config={**plain.config, "model_type": "vit", "intermediate_size": plain.hidden},
        tensors=rename(plain.tensors, VIT),
        tolerance=FOLDED if scales else EXACT,
        options={"add_pooling_layer": False},
    )


def beit(model: Any, pool: str) -> Native:
    """BEiT; with pool="mean" the mean of the patches is normed instead of the tokens, as in published fine-tuning."""
    require(type(model) is Beit, f"it is timm's {type(model).__name__}, not Beit")
    plain = _plain(model, BeitBlock, type(model.blocks[0].attn))
    size = _square(plain.config, "BeitModel misreads the positions of")
    bias = model.blocks[0].attn.relative_position_bias_table is not None
    config = {
        **plain.config,
        "model_type": "beit",
        "image_size": size,
        "intermediate_size": plain.hidden,
        "use_absolute_position_embeddings": model.pos_embed is not None,
        "use_relative_position_bias": bias,
        "use_shared_relative_position_bias": model.rel_pos_bias is not None,
        "use_mask_token": False,
        "use_mean_pooling": pool == "mean",
        "layer_scale_init_value": 0.0 if model.blocks[0].gamma_1 is None else 0.1,  # 0: the class has none
        "drop_path_rate": 0.0,
    }
    del config["qkv_bias"]  # queries and values always have one
    if pool == "mean":
        plain.tensors |= {f"fc_norm.{part}": plain.tensors.pop(f"norm.{part}") for part in ("weight", "bias")}
    tensors = {name: t for name, t in plain.tensors.items() if not name.endswith(".key.bias")}
    return Native("BeitModel", config, rename(tensors, VIT), normed=pool == "class")


KINDS: dict[str, Callable[..., Native]] = {
    "dinov2": dinov2,
    "dinov2_with_registers": dinov2_with_registers,
    "vit": vit,
    "beit": beit,
}


def plain_vit(model: Any) -> Plain:
    """A timm ViT whose every part has its equal in transformers' ViT and DINOv2. Raises `Unfit`."""
    require(type(model) is VisionTransformer, f"it is timm's {type(model).__name__}, not a plain VisionTransformer")
    require(model.cls_token is not None, "it has no class token")
    require(model.pos_embed is not None, "it has no table of positions")
    require(isinstance(model.norm_pre, nn.Identity), "it norms its tokens before the first block")
    plain = _plain(model, Block, Attention)
    plain.num_registers = model.num_reg_tokens
    plain.tensors |= prefix_positions(plain.tensors, model.patch_embed.num_patches)
    return plain


def prefix_positions(tensors: Tensors, num_patches: int) -> Tensors:
    """Positions of the class token and the patches (1, 1 + N, D), and registers (1, R, D) that contain theirs."""
    table = tensors["pos_embed"]  # (1, N or 1 + R + N, D)
    if table.shape[1] == num_patches:
        return {"pos_embed": torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)}  # (1, 1 + N, D)
    first, registers, patches = table.split([1, table.shape[1] - 1 - num_patches, num_patches], dim=1)
    found = {"pos_embed": torch.cat([first, patches], dim=1)}  # (1, 1 + N, D)
    return found | ({"reg_token": tensors["reg_token"] + registers} if "reg_token" in tensors else {})


def _plain(model: Any, block: type, attention: type) -> Plain:
    """What blocks of a kind, with attention of a kind, are made of. Raises `Unfit` where a part is unknown."""
    stem, first, width = model.patch_embed, model.blocks[0], model.embed_dim
    require(type(stem) is PatchEmbed and isinstance(stem.norm, nn.Identity), "its stem is more than one convolution")
    require(stem.patch_size[0] == stem.patch_size[1], f"its patches of {stem.patch_size} are not square")
    gated = type(first.mlp) is GluMlp
    for part in model.blocks:
        check_block(part, block, attention, width, gated=gated)
    norms = [model.norm, *(norm for part in model.blocks for norm in (part.norm1, part.norm2))]
    plain = all(isinstance(norm, nn.LayerNorm) and norm.bias is not None for norm in norms)
    require(plain and len({norm.eps for norm in norms}) == 1, "its norms are not LayerNorms with one epsilon")
    activation = activation_of(first.mlp.act)
    require(not gated or activation == "silu", f"its gated MLP has {activation} where DINOv2 has silu")
    tensors = dict(model.state_dict())
    for name in [name for name in tensors if name.endswith(".weight")]:  # what these classes have a bias for
        if name.endswith((".attn.proj.weight", "patch_embed.proj.weight", ".fc1.weight", ".fc2.weight")):
            tensors.setdefault(name.replace(".weight", ".bias"), torch.zeros(len(tensors[name])))
    config = {
        "hidden_size": width,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": first.attn.num_heads,
        "hidden_act": activation,
        "layer_norm_eps": model.norm.eps,
        "image_size": list(stem.img_size),
        "patch_size": stem.patch_size[0],
        "num_channels": stem.proj.in_channels,
        "qkv_bias": first.attn.qkv.bias is not None,
    }
    return Plain(config, first.mlp.fc2.in_features, gated, 0, split_qkv(tensors))


def check_block(part: Any, block: type, attention: type, width: int, *, gated: bool) -> None:
    """Refuse a block that computes more than these classes do."""
    require(type(part) is block, f"its blocks are of the kind {type(part).__name__}")
    attn, mlp = part.attn, part.mlp
    require(type(attn) is attention, f"its attention is of the kind {type(attn).__name__}")
    for norm in ("q_norm", "k_norm"):
        require(isinstance(getattr(attn, norm, nn.Identity()), nn.Identity), "it norms queries and keys (qk_norm)")
    inside = [getattr(attn, "norm", nn.Identity()), mlp.norm]
    require(all(isinstance(norm, nn.Identity) for norm in inside), "it norms inside attention or MLP")
    require(getattr(attn, "gate", None) is None, "its attention is gated")
    require(attn.qkv.weight.shape == (3 * width, width), "its heads do not add up to its width")
    require(type(mlp) is (GluMlp if gated else Mlp), f"its MLP is of the kind {type(mlp).__name__}")
    require(not getattr(mlp, "gate_last", False), "its MLP gates with its second half, DINOv2's with its first")


def activation_of(act: nn.Module) -> str:
    """transformers' name of an activation."""
    name = "GELUTanh" if getattr(act, "approximate", "none") == "tanh" else type(act).__name__
    require(name in ACTIVATIONS, f"transformers has no name for its activation {name}")
    return ACTIVATIONS[name]


def split_qkv(tensors: Tensors) -> Tensors:
    """`attn.qkv` -> `attn.{query,key,value}`; separate biases of queries and values join them, zero where absent."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        stem, joined, part = name.rpartition(".qkv.")
        if joined:
            parts: tuple[Tensor, ...] = tensor.chunk(3)  # (D, D) or (D,)
            found |= {f"{stem}.{n}.{part}": t.clone() for n, t in zip(("query", "key", "value"), parts, strict=True)}
        elif name.endswith((".q_bias", ".v_bias")):
            found[f"{name[:-7]}.{'query' if name[-6] == 'q' else 'value'}.bias"] = tensor
        else:
            found[name] = tensor
    return found


def _dinov2(plain: Plain, architecture: str) -> Native:
    """What both classes of DINOv2 have in common."""
    width = plain.config["hidden_size"]
    size = _square(plain.config, f"{architecture} interpolates the positions of")
    inner = gated_width if plain.gated else int
    ratio = next((r for r in range(1, 17) if inner(r * width) == plain.hidden), None)
    require(ratio is not None, f"its MLP, {plain.hidden} wide inside, is no whole multiple of the width {width}")
    for i in range(plain.config["num_hidden_layers"]):
        for scale in ("ls1", "ls2"):
            plain.tensors.setdefault(f"blocks.{i}.{scale}.gamma", torch.ones(width))
    config = {**plain.config, "image_size": size, "mlp_ratio": ratio, "use_swiglu_ffn": plain.gated}
    return Native(architecture, config, rename(plain.tensors, GATED if plain.gated else DINOV2))


def gated_width(hidden: int) -> int:
    """The width of DINOv2's gated MLP in the place of one of `hidden`: two thirds, rounded up to a multiple of 8."""
    return (int(hidden * 2 / 3) + 7) // 8 * 8


def _square(config: dict[str, Any], what: str) -> int:
    """The one side of the images."""
    height, width = config["image_size"]
    require(height == width, f"{what} images of {height}x{width}, which are not square")
    return height


def require(fact: bool, otherwise: str) -> None:
    """Raise `Unfit` with a reason unless a fact holds."""
    if not fact:
        raise Unfit(otherwise)
