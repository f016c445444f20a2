"""The same pretraining as other libraries ship it, with our weights: transformers' ViTMAE and BEiT, lightly's MAE.

Each is a module `(images, batch) -> loss` (0-d) of normalised images (B, C, H, W) and the masks or codes of a batch,
built from one of our objectives as the documentation of its library shows, with its own defaults where ours do not
say otherwise. `attend(eager=True)` makes attention products and a softmax, `attend(eager=False)` what the library
chooses itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mim.contracts import Batch
from mim.patches import mask_to_ids

BLOCKS = [
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("attention.o_proj", "attn.proj"),
    ("attention.q_proj", "attn.qkv"),
    ("lambda_1", "ls1.gamma"),
    ("lambda_2", "ls2.gamma"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.cls_token", "cls_token"),
]  # transformers -> timm
OF_MAE = [
    ("vit.embeddings.", "encoder.vit.embeddings."),
    ("vit.layers", "encoder.vit.blocks"),
    ("vit.layernorm.", "encoder.vit.norm."),
    ("decoder.decoder_layers", "decoder_blocks"),
    ("decoder.", ""),
]
OF_BEIT = [
    ("beit.embeddings.mask_token", "mask_token"),
    ("beit.embeddings.", "encoder.vit.embeddings."),
    ("beit.layers", "encoder.vit.blocks"),
    ("lm_head", "head"),
]

Tensors = dict[str, Tensor]


class Unfit(ValueError):
    """A recipe that a library has no model for; the message is the reason."""


# ---- transformers' weights under our names -------------------------------------------------------


def renamed(state: Tensors, renames: list[tuple[str, str]]) -> Tensors:
    """Tensors of transformers under our names (pairs old, new), with query, key and value as one; no key bias is 0."""
    found = {}
    for name, value in state.items():
        if "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            parts = [state.get(name.replace("q_proj", f"{part}_proj"), torch.zeros_like(value)) for part in "qkv"]
            value = torch.cat(parts)
        for old, new in [*renames, *BLOCKS]:
            name = name.replace(old, new)
        found[name] = value
    return found


def mae_weights(state: Tensors) -> Tensors:
    """ViTMAEForPreTraining's tensors under our names, without the fixed positions."""
    state = {name: value for name, value in state.items() if "position" not in name and "pos_embed" not in name}
    return renamed(state, OF_MAE)


def beit_on_vit_weights(state: Tensors) -> Tensors:
    """BeitForMaskedImageModeling's tensors as our BEiT on a ViT has them."""
    state = {"encoder.vit.norm" + name[9:] if name.startswith("layernorm.") else name: t for name, t in state.items()}
    return renamed(state, OF_BEIT)


def beit_weights(state: Tensors) -> Tensors:
    """The same on timm's Beit: keys without bias, and tables of relative positions."""
    found = {}
    for name, value in beit_on_vit_weights(state).items():
        name = name.replace("beit.shared_position_bias.", "encoder.vit.rel_pos_bias.")
        name = name.replace("relative_position_bias.", "attn.") if ".blocks." in name else name
        name = name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
        if name.endswith("qkv.bias"):
            query, _, value = value.chunk(3)
            found[name.replace("qkv.bias", "q_bias")] = query
            name = name.replace("qkv.bias", "v_bias")
        found[name] = value
    return found


# ---- transformers --------------------------------------------------------------------------------


class TransformersMAE(nn.Module):
    """ViTMAEForPreTraining of the size of our MAE; it takes the mask as the noise that it sorts."""

    def __init__(self, objective: Any, sections: dict[str, Any]) -> None:
        import transformers

        super().__init__()
        vit, decoder = objective.encoder.vit, objective.decoder_blocks
        self.model = transformers.ViTMAEForPreTraining(
            transformers.ViTMAEConfig(
                **_vit_options(objective.encoder, sections),
                intermediate_size=vit.blocks[0].mlp.fc1.out_features,
                decoder_hidden_size=objective.cfg.decoder_width,
                decoder_num_hidden_layers=objective.cfg.decoder_depth,
                decoder_num_attention_heads=objective.cfg.decoder_num_heads,
                decoder_intermediate_size=decoder[0].mlp.fc1.out_features,
                mask_ratio=sections["mask"]["ratio"],
                norm_pix_loss=objective.cfg.norm_pix_loss,
            )
        )
        self.shipped = self.model.config._attn_implementation
        self._take_positions(objective)

    def forward(self, images: Tensor, batch: Batch) -> Tensor:
        return self.model(images, noise=batch["mask"].float()).loss

    def attend(self, *, eager: bool) -> None:
        _attend(self.model, "eager" if eager else self.shipped)

    def share(self, objective: nn.Module) -> None:
        """Put these weights into our objective."""
        _load(objective, mae_weights(self.model.state_dict()), fixed={"encoder.vit.pos_embed"})

    @torch.no_grad()
    def _take_positions(self, objective: Any) -> None:
        """The fixed sine-cosine tables, which transformers 5.23 leaves at zero in a fresh model."""
        table = objective.encoder.vit.pos_embed  # (1, 1 + N, D)
        self.model.vit.embeddings.position_embeddings.copy_(table)
        self.model.decoder.decoder_pos_embed.copy_(_decoder_positions(objective))


class TransformersBEiT(nn.Module):
    """BeitForMaskedImageModeling of the size of our BEiT, with one bias of relative positions for all blocks.

    `use_mean_pooling` leaves out a second norm before the head that no published BEiT has, and the epsilon is theirs.
    """

    def __init__(self, objective: Any, sections: dict[str, Any]) -> None:
        import transformers

        super().__init__()
        vit = objective.encoder.vit
        if getattr(vit, "rel_pos_bias", None) is None:
            raise Unfit("only encoder.name=beit with encoder.positions=shared_relative has its like in transformers")
        self.model = transformers.BeitForMaskedImageModeling(
            transformers.BeitConfig(
                **_vit_options(objective.encoder, sections),
                intermediate_size=vit.blocks[0].mlp.fc1.out_features,
                vocab_size=objective.num_codes,
                use_mask_token=True,
                use_mean_pooling=True,
                use_absolute_position_embeddings=False,
                use_shared_relative_position_bias=True,
                use_relative_position_bias=False,
                layer_scale_init_value=sections["encoder"]["layer_scale"] or 0.0,
                drop_path_rate=sections["encoder"]["drop_path_rate"],
            )
        )
        self.shipped = self.model.config._attn_implementation

    def forward(self, images: Tensor, batch: Batch) -> Tensor:
        mask = batch["mask"]
        return self.model(images, bool_masked_pos=mask, labels=batch["codes"][mask]).loss

    def attend(self, *, eager: bool) -> None:
        _attend(self.model, "eager" if eager else self.shipped)

    def share(self, objective: nn.Module) -> None:
        """Put these weights into our objective."""
        _load(objective, beit_weights(self.model.state_dict()))


def _vit_options(encoder: Any, sections: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.vit.blocks[0].attn.num_heads,
        "image_size": sections["data"]["image_size"],
        "patch_size": encoder.patch_size,
        "layer_norm_eps": 1e-6,
    }


def _attend(model: Any, implementation: str) -> None:
    """Choose the attention of all parts of a model; MAE's decoder has a configuration of its own."""
    for part in model.modules():
        if hasattr(part, "config"):
            part.config._attn_implementation = implementation


def _load(objective: nn.Module, tensors: Tensors, fixed: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """Load weights that are complete but for what is `fixed` and for buffers that a configuration decides."""
    missing, unexpected = objective.load_state_dict(tensors, strict=False)
    trained = {name for name, _ in objective.named_parameters()}
    if unexpected or (left := (set(missing) & trained) - fixed):
        raise ValueError(f"weights do not fit: {', '.join(unexpected or sorted(left))}")


def _decoder_positions(objective: Any) -> Tensor:
    """MAE's fixed positions of the decoder (1, 1 + N, D'); the class token has none."""
    grid = objective.encoder.vit.patch_embed.grid_size
    positions = objective.positions(grid, torch.device("cpu"))  # (N, D')
    return torch.cat([positions.new_zeros(1, positions.shape[1]), positions]).unsqueeze(0)


# ---- lightly -------------------------------------------------------------------------------------


class LightlyMAE(nn.Module):
    """MAE from lightly's modules, put together as its documentation does, on timm's ViT; takes our weights."""

    def __init__(self, objective: Any, sections: dict[str, Any]) -> None:
        from lightly.models import utils
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

        super().__init__()
        ours, cfg = objective.encoder.vit, objective.cfg
        if not cfg.norm_pix_loss:
            raise Unfit("objective.norm_pix_loss=false is not compared with lightly; leave it true")
        vit = VisionTransformer(
            img_size=sections["data"]["image_size"],
            patch_size=objective.encoder.patch_size,
            embed_dim=objective.encoder.width,
            depth=objective.encoder.depth,
            num_heads=ours.blocks[0].attn.num_heads,
            num_classes=0,
        )
        self.functions = utils
        self.patch_size = objective.encoder.patch_size
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.backbone.mask_token.requires_grad_(False)  # replaces patches, which MAE drops
        self.decoder = MAEDecoderTIMM(
            num_patches=vit.patch_embed.num_patches,
            patch_size=self.patch_size,
            embed_dim=objective.encoder.width,
            decoder_embed_dim=cfg.decoder_width,
            decoder_depth=cfg.decoder_depth,
            decoder_num_heads=cfg.decoder_num_heads,
        )
        self.criterion = nn.MSELoss()
        self.fused = [module for module in self.modules() if getattr(module, "fused_attn", False)]

    def attend(self, *, eager: bool) -> None:
        for attention in self.fused:
            attention.fused_attn = not eager

    def forward(self, images: Tensor, batch: Batch) -> Tensor:
        utils, (rows, length) = self.functions, (len(images), self.backbone.sequence_length)
        keep, masked, _ = mask_to_ids(batch["mask"], batch["num_masked"])
        keep = torch.cat([keep.new_zeros(rows, 1), keep + 1], dim=1)  # (B, 1 + K): the class token stays
        embedded = self.decoder.embed(self.backbone.encode(images=images, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, (rows, length))
        tokens = utils.set_at_index(tokens, keep, embedded.type_as(tokens))
        decoded = self.decoder.decode(tokens)
        pred = self.decoder.predict(utils.get_at_index(decoded, masked + 1))
        target = utils.get_at_index(utils.patchify(images, self.patch_size), masked)
        return self.criterion(pred, utils.normalize_mean_var(target))

    def share(self, objective: Any) -> None:
        """Take the weights of our objective."""
        self.backbone.vit.load_state_dict(objective.encoder.vit.state_dict())
        own = {name: value for name, value in objective.state_dict().items() if not name.startswith("encoder.")}
        self.decoder.load_state_dict({**own, "decoder_pos_embed": _decoder_positions(objective)})


PEERS: dict[
    str, dict[str, Callable[[Any, dict[str, Any]], Any]]
] = {  # by objective and package; the first gives weights
    "mae": {"transformers": TransformersMAE, "lightly": LightlyMAE},
    "beit": {"transformers": TransformersBEiT},
}
