"""Every published key layout becomes the encoder whose features equal those of the reference class."""

import json

import pytest
import timm
import torch
from transformers import (
    BeitConfig,
    BeitForMaskedImageModeling,
    BeitModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from mim.config import ConfigError
from mim.encoders import beit, dense, eva, vit
from mim.objectives import mae
from mim.patches import unpatchify
from mim.pretrained import layouts, weight_files, weights

TRANSFORMERS = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
    "layer_norm_eps": 1e-6,
}  # fmt: skip
OURS = {"model": "vit_tiny_patch16_224", "width": 32, "depth": 3, "num_heads": 2, "patch_size": 8}
IMAGENET = {"mean": layouts.IMAGENET[0], "std": layouts.IMAGENET[1]}


def shaken(module):
    """Random values in every parameter, of a size at which each of them shows in the features."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15 + 0.05)
    return module.eval()


def encoder_of(image_size=(32, 32), channels=3, **options):
    return vit.build(vit.Config(**(OURS | options)), image_size=image_size, channels=channels).eval()


def tokens(encoder, images):
    features = encoder(images)
    return torch.cat([features.prefix, features.patches], dim=1)


def assert_same(mine, theirs):
    assert mine.shape == theirs.shape
    assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def fill(encoder, source, objective=None, name="mae"):
    """Initialise an encoder that no objective wraps, or one inside an objective."""
    objective = objective if objective is not None else torch.nn.ModuleDict({"encoder": encoder})
    return weights.initialize(objective, encoder, str(source), name=name)


def features(encoder, images):
    """What the encoder computes from images that its first line does not change."""
    encoder.mean.zero_()
    encoder.std.fill_(1.0)
    with torch.no_grad():
        return tokens(encoder, images)


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def saved(model, folder):
    shaken(model).save_pretrained(folder)
    return folder


# ---- transformers ----------------------------------------------------------------------------------------------------


def test_a_transformers_vit_computes_what_its_reference_computes(tmp_path, images):
    reference = ViTModel(ViTConfig(**TRANSFORMERS, intermediate_size=128), add_pooling_layer=False)
    encoder = encoder_of()
    report = fill(encoder, saved(reference, tmp_path))
    assert_same(features(encoder, images), reference(images).last_hidden_state)
    assert report.unused == report.reinitialised == []


def test_a_classifier_of_transformers_gives_its_encoder_and_names_the_rest(tmp_path, images):
    from transformers import ViTForImageClassification

    reference = ViTForImageClassification(ViTConfig(**TRANSFORMERS, intermediate_size=128))
    encoder = encoder_of()
    report = fill(encoder, saved(reference, tmp_path))
    assert_same(features(encoder, images), reference.vit(images).last_hidden_state)
    assert sorted(report.unused) == ["classifier.bias", "classifier.weight"]


@pytest.mark.parametrize("classic", [True, False], ids=["classic keys", "as transformers 5 writes it"])
def test_a_transformers_mae_fills_the_decoder_too(tmp_path, images, classic):
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2,
               "decoder_intermediate_size": 64}  # fmt: skip
    reference = ViTMAEForPreTraining(ViTMAEConfig(**TRANSFORMERS, intermediate_size=128, mask_ratio=0.0, **decoder))
    shaken(reference)
    with torch.no_grad():  # the reference's own fixed positions, which a bare constructor leaves at zero
        for table in (reference.vit.embeddings.position_embeddings, reference.decoder.decoder_pos_embed):
            fixed = build_2d_sinusoidal_position_embedding(4, 4, table.shape[-1], cls_token=True)
            table.copy_(torch.cat(fixed.chunk(2, dim=-1)[::-1], dim=-1))  # columns first, as the reference turns them
    reference.save_pretrained(tmp_path)
    if classic:
        from safetensors.torch import load_file, save_file

        file = tmp_path / "model.safetensors"
        renamed = {n.replace("decoder_encoder.layer", "decoder_layers"): t for n, t in load_file(file).items()}
        assert renamed.keys() != load_file(file).keys()
        save_file(renamed, file)
    encoder = encoder_of(positions="sincos")
    objective = mae.build(encoder, mae.Config(decoder_width=16, decoder_depth=2, decoder_num_heads=2)).eval()
    report = fill(encoder, tmp_path, objective)
    assert report.reinitialised == []
    assert report.unused == ["mae.decoder_pos_embed"]
    encoder.mean.zero_()
    encoder.std.fill_(1.0)
    noise = torch.arange(16.0).expand(2, -1)  # nothing is masked, and the order stays
    theirs = reference(images, noise=noise).logits
    with torch.no_grad():
        ids_keep = torch.arange(16).expand(2, -1)
        inside = objective.decode(encoder(images), ids_keep, ids_keep[:, :0], (4, 4))
        assert_same(objective.decoder_pred(inside), theirs)


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_of_transformers_with_and_without_registers(tmp_path, images, registers):
    if registers:
        reference = Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(**TRANSFORMERS, mlp_ratio=4, num_register_tokens=4)
        )
    else:
        reference = Dinov2Model(Dinov2Config(**TRANSFORMERS, mlp_ratio=4))
    encoder = encoder_of(layer_scale=1e-5, num_registers=registers or None)
    report = fill(encoder, saved(reference, tmp_path))
    assert_same(features(encoder, images), reference(images).last_hidden_state)
    assert report.family == "DINOv2 (transformers)"
    assert report.unused == ["mask_token"]


def test_the_vision_tower_of_clip_of_transformers(tmp_path, images):
    reference = CLIPVisionModel(
        CLIPVisionConfig(**{**TRANSFORMERS, "layer_norm_eps": 1e-5}, intermediate_size=128, hidden_act="quick_gelu")
    )
    encoder = encoder_of(model="vit_base_patch32_clip_quickgelu_224")
    fill(encoder, saved(reference, tmp_path))
    hidden = reference(images).last_hidden_state
    tower = getattr(reference, "vision_model", reference)
    assert_same(features(encoder, images), tower.post_layernorm(hidden))


def test_another_activation_than_the_file_s_is_refused(tmp_path):
    saved(CLIPVisionModel(CLIPVisionConfig(**TRANSFORMERS, intermediate_size=128)), tmp_path)
    with pytest.raises(ConfigError, match=r"QuickGELU, the encoder has GELU; set encoder.model"):
        fill(encoder_of(model="vit_base_patch32_clip_224"), tmp_path)


def test_beit_of_transformers_with_absolute_positions_fits_a_vit(tmp_path, images):
    """The release `pt1k_800ep` is of this kind; its LayerScale and its keys without bias are those of BEiT."""
    reference = BeitModel(
        BeitConfig(**TRANSFORMERS, intermediate_size=128, use_absolute_position_embeddings=True, use_mask_token=True,
                   use_mean_pooling=False, layer_scale_init_value=0.1),
        add_pooling_layer=False,
    )  # fmt: skip
    encoder = encoder_of(layer_scale=1e-5)
    report = fill(encoder, saved(reference, tmp_path))
    assert report.family == "BEiT (transformers)"
    assert_same(features(encoder, images), reference(images).last_hidden_state)


def test_beit_with_relative_positions_does_not_fit_a_vit(tmp_path):
    config = BeitConfig(**TRANSFORMERS, intermediate_size=128, use_shared_relative_position_bias=True)
    saved(BeitForMaskedImageModeling(config), tmp_path)
    with pytest.raises(ConfigError, match=r"relative positions, which this encoder lacks; use encoder.name=beit"):
        fill(encoder_of(layer_scale=0.1), tmp_path)


def beit_of(positions="shared_relative", image_size=(32, 32), **options):
    arguments = {"width": 32, "depth": 3, "num_heads": 2, "patch_size": 8, "positions": positions, "layer_scale": 0.1}
    return beit.build(beit.Config(**(arguments | options)), image_size=image_size, channels=3).eval()


@pytest.mark.parametrize("positions", ["relative", "shared_relative"])
def test_the_shared_table_of_beit_is_kept_or_copied_to_the_blocks(tmp_path, images, positions):
    config = BeitConfig(**TRANSFORMERS, intermediate_size=128, use_shared_relative_position_bias=True)
    reference = BeitForMaskedImageModeling(config)
    encoder = beit_of(positions)
    report = fill(encoder, saved(reference, tmp_path))
    hidden = reference.layernorm(reference.beit(images).last_hidden_state)
    assert_same(features(encoder, images), hidden)
    copied = "the shared table of relative positions was copied to 3 blocks"
    assert (copied in report.notes) == (positions == "relative")
    assert report.reinitialised == []


def test_beit_with_a_table_for_each_block(tmp_path, images):
    config = BeitConfig(**TRANSFORMERS, intermediate_size=128, use_relative_position_bias=True, use_mean_pooling=False)
    reference = BeitModel(config, add_pooling_layer=False)
    encoder = beit_of("relative")
    fill(encoder, saved(reference, tmp_path))
    assert_same(features(encoder, images), reference(images).last_hidden_state)


def test_dinov3_of_transformers_fills_eva(tmp_path, images):
    config = DINOv3ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128, image_size=32, patch_size=8,
        num_register_tokens=4,
    )  # fmt: skip
    reference = DINOv3ViTModel(config)
    options = {"width": 32, "depth": 3, "num_heads": 2, "patch_size": 8}
    cfg = eva.Config(model="vit_base_patch16_dinov3_qkvb", **options)
    encoder = eva.build(cfg, image_size=(32, 32), channels=3).eval()
    report = fill(encoder, saved(reference, tmp_path))
    assert report.family == "DINOv3 (transformers)"
    assert_same(features(encoder, images), reference(images).last_hidden_state)
    assert report.unused == ["mask_token"]
    with pytest.raises(ConfigError, match=r"no table of positions .* use encoder.name=eva"):
        fill(encoder_of(layer_scale=1e-5, num_registers=4), tmp_path)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("swin_tiny_patch4_window7_224", {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}),
        ("swinv2_tiny_window8_256", {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}),
        ("cait_xxs24_224", {"embed_dim": 32, "depth": 2, "num_heads": 2}),  # class attention with q, k and v apart
    ],
)
def test_a_dense_encoder_takes_the_weights_of_its_own_model(tmp_path, images, model, options):
    cfg = dense.Config(model=model, options=options)
    encoder = dense.build(cfg, image_size=(32, 32), channels=3).eval()
    reference = shaken(dense.build(cfg, image_size=(32, 32), channels=3))
    torch.save({"model": reference.model.state_dict()}, tmp_path / "file.pth")
    report = fill(encoder, tmp_path / "file.pth")
    assert report.reinitialised == []
    assert_same(features(encoder, images), features(reference, images))
    other = dense.Config(model=model, options={**options, "embed_dim": 2 * options["embed_dim"]})
    with pytest.raises(ConfigError, match="of another size than the encoder"):
        fill(dense.build(other, image_size=(32, 32), channels=3), tmp_path / "file.pth")


# ---- the authors' own files ------------------------------------------------------------------------------------------


def timm_vit(**options):
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0}
    return shaken(timm.create_model("vit_tiny_patch16_224", **(arguments | options)))


def beit_keys(state, *, prefix=""):
    """A ViT with LayerScale under BEiT's names: q_bias and v_bias, gamma_1 and gamma_2."""
    found = {}
    for name, tensor in state.items():
        name = name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
        if name.endswith("qkv.bias"):
            q, _, v = tensor.chunk(3)
            found[f"{prefix}{name.replace('qkv.bias', 'q_bias')}"] = q.clone()
            found[f"{prefix}{name.replace('qkv.bias', 'v_bias')}"] = v.clone()
        else:
            found[f"{prefix}{name}"] = tensor
    return found


def file_of(tmp_path, content):
    torch.save(content, tmp_path / "file.pth")
    return tmp_path / "file.pth"


def keyless(reference):
    """The bias of keys is zero in BEiT."""
    with torch.no_grad():
        for block in reference.blocks:
            block.attn.qkv.bias[32:64] = 0
    return reference


def test_the_encoder_of_mae_s_release(tmp_path, images):
    reference = timm_vit()
    state = dict(reference.state_dict())
    state["pos_embed"] = encoder_of(positions="sincos").vit.pos_embed.detach()  # what the release has
    reference.load_state_dict(state)
    encoder = encoder_of(positions="sincos")
    report = fill(encoder, file_of(tmp_path, {"model": state}))
    assert report.family == "MAE (encoder only)"
    assert_same(features(encoder, images), reference.forward_features(images))
    assert report.unused == []


@pytest.mark.parametrize("prefix", ["", "module.", "encoder."])
def test_beit_s_own_file_with_absolute_positions(tmp_path, images, prefix):
    reference = keyless(timm_vit(init_values=0.1))
    state = beit_keys(reference.state_dict(), prefix=prefix)
    state[f"{prefix}mask_token"] = torch.ones(1, 1, 32)
    state[f"{prefix}lm_head.weight"] = torch.ones(16, 32)
    state[f"{prefix}blocks.0.attn.relative_position_index"] = torch.zeros(17, 17, dtype=torch.int64)
    encoder = encoder_of(layer_scale=1e-5)
    report = fill(encoder, file_of(tmp_path, {"model": state}))
    assert report.family == "BEiT"
    assert_same(features(encoder, images), reference.forward_features(images))
    assert sorted(report.unused) == ["beit.mask_token", "blocks.0.attn.relative_position_index", "lm_head.weight"]


def test_beit_without_layer_scale_starts_an_encoder_s_own_at_one(tmp_path, images):
    """`pt1k_800ep` has none: at gamma 1 the encoder computes what the file's own computes."""
    reference = keyless(timm_vit())
    encoder = encoder_of(layer_scale=0.1)
    report = fill(encoder, file_of(tmp_path, {"model": beit_keys(reference.state_dict())}))
    assert_same(features(encoder, images), reference.forward_features(images))
    assert len(report.neutral) == 6


def test_simmim_under_its_prefix_with_its_config(tmp_path, images):
    reference = keyless(timm_vit(init_values=0.1))
    state = beit_keys(reference.state_dict(), prefix="encoder.") | {
        "encoder.mask_token": torch.ones(1, 1, 32),
        "decoder.0.weight": torch.ones(192, 32, 1, 1),
        "decoder.0.bias": torch.ones(192),
    }
    encoder = encoder_of(layer_scale=0.1)
    report = fill(encoder, file_of(tmp_path, {"model": state}))
    assert report.family == "SimMIM"
    assert_same(features(encoder, images), reference.forward_features(images))


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_s_own_file(tmp_path, images, registers):
    """Class position in the table, registers without positions: what its own class computes, and timm's too."""
    reference = timm_vit(init_values=1e-5, reg_tokens=registers, no_embed_class=bool(registers))
    state = dict(reference.state_dict())
    if registers:
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([torch.full((1, 1, 32), 0.25), state["pos_embed"]], dim=1)
        state["cls_token"] = state["cls_token"] - 0.25
    state["mask_token"] = torch.zeros(1, 32)
    encoder = encoder_of(layer_scale=1e-5, num_registers=registers or None)
    report = fill(encoder, file_of(tmp_path, state))
    assert report.family == "DINOv2"
    assert_same(features(encoder, images), reference.forward_features(images))
    assert report.unused == ["mask_token"]


def test_dinov3_s_own_file_fills_eva(tmp_path, images):
    options = {"width": 32, "depth": 3, "num_heads": 2, "patch_size": 8}
    cfg = eva.Config(model="vit_base_patch16_dinov3_qkvb", **options)
    reference, encoder = (eva.build(cfg, image_size=(32, 32), channels=3).eval() for _ in range(2))
    state = {"mask_token": torch.zeros(1, 32), "rope_embed.periods": torch.ones(4)}
    for name, tensor in shaken(reference).vit.state_dict().items():
        name = name.replace("gamma_", "ls").replace("reg_token", "storage_tokens")
        state[f"{name}.gamma" if name[-3:] in ("ls1", "ls2") else name] = tensor
    for i in range(3):
        q, v = (state.pop(f"blocks.{i}.attn.{part}_bias") for part in "qv")
        state[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, torch.zeros(32), v])
        state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.ones(96)
    report = fill(encoder, file_of(tmp_path, state))
    assert_same(features(encoder, images), features(reference, images))
    unused = ["mask_token", "rope_embed.periods", *(f"blocks.{i}.attn.qkv.bias_mask" for i in range(3))]
    assert sorted(report.unused) == sorted(unused)


def test_the_teacher_of_dino_and_ibot_is_preferred_and_named(tmp_path, images):
    reference, student = timm_vit(), encoder_of().vit
    inside = {f"backbone.{n}": t for n, t in reference.state_dict().items()}
    inside["head.last_layer.weight_v"] = torch.ones(8, 4)
    outside = {f"module.backbone.{n}": t for n, t in student.state_dict().items()}
    encoder = encoder_of()
    report = fill(encoder, file_of(tmp_path, {"student": outside, "teacher": inside, "epoch": 3}))
    assert_same(features(encoder, images), reference.forward_features(images))
    assert report.family == "DINO or iBOT"
    assert report.notes[0] == "'teacher' was taken, not 'student'"
    assert report.unused == ["head.last_layer.weight_v"]


def test_a_flat_dict_of_student_and_teacher_gives_the_teacher(tmp_path, images):
    reference, student = timm_vit(), encoder_of().vit
    state = {f"a_student.backbone.{n}": t for n, t in student.state_dict().items()}
    state |= {f"the_teacher.backbone.{n}": t for n, t in reference.state_dict().items()}
    encoder = encoder_of()
    report = fill(encoder, file_of(tmp_path, state))
    assert_same(features(encoder, images), reference.forward_features(images))
    assert sorted(report.unused) == sorted(f"a_student.backbone.{n}" for n in student.state_dict())


def test_open_clip_s_vision_tower_under_its_own_names(tmp_path, images):
    model = "vit_base_patch32_clip_224"
    reference = shaken(
        timm.create_model(model, img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0)
    )
    state = {"logit_scale": torch.ones(()), "transformer.resblocks.0.ln_1.weight": torch.ones(8),
             "visual.proj": torch.ones(32, 8)}  # fmt: skip
    names = [("norm_pre", "ln_pre"), ("patch_embed.proj", "conv1"), ("blocks.", "transformer.resblocks."),
             ("attn.qkv.", "attn.in_proj_"), ("attn.proj", "attn.out_proj"), (".norm1", ".ln_1"), (".norm2", ".ln_2"),
             ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), ("pos_embed", "positional_embedding"),
             ("cls_token", "class_embedding")]  # fmt: skip
    for name, tensor in reference.state_dict().items():
        name = f"ln_post.{name[5:]}" if name.startswith("norm.") else name
        for own, theirs in names:
            name = name.replace(own, theirs)
        squeezed = tensor.reshape(-1) if name == "class_embedding" else tensor
        state[f"visual.{name}"] = squeezed[0] if name == "positional_embedding" else squeezed
    encoder = encoder_of(model=model)
    report = fill(encoder, file_of(tmp_path, state))
    assert_same(features(encoder, images), reference.forward_features(images))
    assert sorted(report.unused) == ["logit_scale", "proj", "transformer.resblocks.0.ln_1.weight"]


def test_a_fine_tuned_file_gives_its_fc_norm_to_the_norm_and_its_head_to_nobody(tmp_path):
    state = dict(timm_vit().state_dict())
    state = {n.replace("norm.", "fc_norm.") if n.startswith("norm.") else n: t for n, t in state.items()}
    state |= {"head.weight": torch.ones(5, 32), "head.bias": torch.ones(5)}
    encoder = encoder_of()
    report = fill(encoder, file_of(tmp_path, {"model": state}))
    assert encoder.final_norm.weight.equal(state["fc_norm.weight"])
    assert report.unused == ["head.weight", "head.bias"]
    assert "norm is the file's fc_norm: it was fine-tuned on pooled patches" in report.notes


def test_a_folder_of_timm(tmp_path, images):
    reference = timm_vit(init_values=1e-5)
    timm.models.save_for_hf(
        reference, str(tmp_path), safe_serialization=True, model_args={"img_size": 32, "patch_size": 8, "num_heads": 2}
    )
    encoder = encoder_of(layer_scale=1e-5)
    report = fill(encoder, tmp_path)
    assert report.family == "timm"
    assert_same(features(encoder, images), reference.forward_features(images))


def test_a_timm_name_is_fetched_by_timm_alone_and_the_line_says_so(monkeypatch, images, capsys):
    reference, asked = timm_vit(), []

    def create(name, **options):
        asked.append((name, options))
        return reference

    encoder = encoder_of()
    monkeypatch.setattr(weight_files.timm, "create_model", create)
    report = fill(encoder, "vit_tiny_patch16_224.augreg_in21k")
    assert asked == [("vit_tiny_patch16_224.augreg_in21k", {"pretrained": True, "num_classes": 0})]
    assert "is a timm name: its weights are downloaded" in capsys.readouterr().err
    assert report.source == "timm vit_tiny_patch16_224.augreg_in21k"
    assert_same(features(encoder, images), reference.forward_features(images))


# ---- pure functions --------------------------------------------------------------------------------------------------


def test_the_shared_table_of_relative_positions_is_copied_to_blocks_that_have_their_own():
    table = torch.rand(52, 2)
    given = {"rel_pos_bias.relative_position_bias_table": table}
    own = [f"blocks.{i}.attn.relative_position_bias_table" for i in range(2)]
    found, remarks = layouts.adapt(given, own)
    assert list(found) == own
    assert all(t.equal(table) for t in found.values())
    assert remarks == ["the shared table of relative positions was copied to 2 blocks"]
    assert layouts.adapt(given, list(given)) == (given, [])  # an encoder that shares it keeps it


def test_the_head_of_simmim_paints_the_same_pixels():
    torch.manual_seed(0)
    decoder = torch.nn.Conv2d(32, 8 * 8 * 3, 1)
    state = {"decoder.0.weight": decoder.weight.detach(), "decoder.0.bias": decoder.bias.detach()}
    rest = layouts.simmim_head({}, state)
    x = torch.rand(2, 32, 4, 4)
    theirs = torch.nn.functional.pixel_shuffle(decoder(x), 8)
    pixels = torch.nn.functional.linear(x.flatten(2).mT, rest["simmim.head.weight"], rest["simmim.head.bias"])
    assert_same(unpatchify(pixels, (4, 4), 3), theirs)


def test_names_of_timm_s_beit_and_eva_come_from_the_same_weights():
    bias = torch.arange(6.0)
    given = {"blocks.0.attn.qkv.bias": bias, "blocks.0.ls1.gamma": bias[:2], "blocks.0.ls2.gamma": bias[2:4]}
    names = ["blocks.0.attn.q_bias", "blocks.0.attn.v_bias", "blocks.0.gamma_1", "blocks.0.gamma_2"]
    found, _ = layouts.adapt(given, names)
    assert {n: t.tolist() for n, t in found.items()} == dict(zip(names, [[0, 1], [4, 5], [0, 1], [2, 3]], strict=True))


def test_the_statistics_of_pixels_travel_with_a_folder(tmp_path):
    reference = ViTModel(ViTConfig(**TRANSFORMERS, intermediate_size=128), add_pooling_layer=False)
    saved(reference, tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    report = fill(encoder_of(**IMAGENET), tmp_path)
    assert report.notes[-1] == (
        "warning: pixels are normalised with mean [0.485, 0.456, 0.406] and std [0.229, 0.224, 0.225], but the weights "
        "were trained with mean [0.5, 0.5, 0.5] and std [0.5, 0.5, 0.5]; set encoder.mean and encoder.std to these"
    )
    assert fill(encoder_of(), tmp_path).notes[-1].endswith("as the weights were trained")
