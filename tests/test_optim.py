"""Parameter groups, and the rates of each step."""

import pytest
import torch
from torch import nn

from mim import optim
from mim.config import ConfigError
from mim.encoders import vit
from mim.objectives import mae

OPTIONS = {"width": 32, "depth": 3, "num_heads": 2, "patch_size": 8, "layer_scale": 0.1, "num_registers": 2}


def an_objective(**changes):
    encoder = vit.build(vit.Config("vit_tiny_patch16_224", **OPTIONS | changes), image_size=(32, 32), channels=3)
    return mae.build(encoder, mae.Config(decoder_width=16, decoder_depth=1, decoder_num_heads=2))


def rates(num_images=100, **options):
    defaults = {"batch_size": 10, "length": "10 epochs", "warmup": "2 epochs", "lr": 1.0}
    return optim.resolve(optim.Config(**defaults | options), num_images)


def scales(groups):
    return {name: group["lr_scale"] for group in groups for name in group["names"]}


# ---- groups --------------------------------------------------------------------------------------


def test_every_trained_parameter_is_in_exactly_one_group():
    objective = an_objective(positions="sincos")
    groups = optim.parameter_groups(objective, optim.Config(layer_decay=0.5))
    names = [name for group in groups for name in group["names"]]
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    assert sorted(names) == sorted(trained)
    assert all(p is trained[n] for group in groups for n, p in zip(group["names"], group["params"], strict=True))


def test_fixed_positions_are_not_trained():
    groups = optim.parameter_groups(an_objective(positions="sincos"), optim.Config())
    assert "encoder.vit.pos_embed" not in scales(groups)
    assert "encoder.vit.pos_embed" in scales(optim.parameter_groups(an_objective(), optim.Config()))


def test_biases_norms_layer_scales_and_learned_tokens_are_not_decayed():
    groups = optim.parameter_groups(an_objective(), optim.Config())
    kept = {name for group in groups if not group["decayed"] for name in group["names"]}
    assert {"encoder.vit.cls_token", "encoder.vit.pos_embed", "encoder.vit.reg_token"} <= kept
    assert {"encoder.vit.norm.weight", "encoder.vit.blocks.0.ls1.gamma", "decoder_pred.bias"} <= kept
    decayed = {name for group in groups if group["decayed"] for name in group["names"]}
    assert {"encoder.vit.patch_embed.proj.weight", "encoder.vit.blocks.2.mlp.fc1.weight"} <= decayed
    assert {"decoder_embed.weight", "decoder_blocks.0.attn.qkv.weight", "decoder_pred.weight"} <= decayed
    assert not {name for name in decayed if name.endswith(("bias", "gamma")) or "norm" in name}


PUBLISHED = {
    "MAE": ([], {"cls_token", "reg_token", "mask_token"}, set()),
    "BEiT": (["cls_token", "pos_embed"], {"mask_token", "reg_token"}, {"cls_token", "pos_embed"}),
    "SimMIM with a Swin, as far as a ViT has it": (["mask_token"], {"cls_token", "pos_embed"}, {"mask_token"}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_s_list_takes_the_place_of_the_encoder_s(name):
    listed, decayed, kept = PUBLISHED[name]
    groups = optim.parameter_groups(an_objective(), optim.Config(no_decay=listed))
    found = {True: set(), False: set()}  # decayed: the last parts of names
    for group in groups:
        found[group["decayed"]] |= {name.split(".")[-1] for name in group["names"]}
    assert decayed <= found[True] - found[False]
    assert kept | {"bias"} <= found[False] - found[True]


def test_a_list_names_parameters_by_whole_parts_at_the_end():
    groups = optim.parameter_groups(an_objective(), optim.Config(no_decay=["attn.qkv.weight"]))
    kept = {name for group in groups if not group["decayed"] for name in group["names"]}
    assert {"encoder.vit.blocks.1.attn.qkv.weight", "decoder_blocks.0.attn.qkv.weight"} <= kept
    assert "encoder.vit.blocks.1.attn.proj.weight" not in kept
    for ending in ("okens", "ls_token", "mask_tokens"):
        with pytest.raises(ConfigError, match=f"optim.no_decay names '{ending}', but the name of no parameter ends so"):
            optim.parameter_groups(an_objective(), optim.Config(no_decay=[ending]))


def test_layer_decay_scales_a_rate_by_the_distance_from_the_head():
    found = scales(optim.parameter_groups(an_objective(), optim.Config(layer_decay=0.5)))
    assert found["encoder.vit.patch_embed.proj.weight"] == found["encoder.vit.cls_token"] == 0.5**4
    assert [found[f"encoder.vit.blocks.{i}.attn.qkv.weight"] for i in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert found["encoder.vit.norm.weight"] == found["decoder_pred.weight"] == found["mask_token"] == 1.0


def test_without_layer_decay_there_are_two_groups_at_the_full_rate():
    groups = optim.parameter_groups(an_objective(), optim.Config())
    assert sorted(group["decayed"] for group in groups) == [False, True]
    assert [group["lr_scale"] for group in groups] == [1.0, 1.0]


def test_an_objective_without_an_encoder_is_grouped_too():
    class Plain(nn.Linear):
        encoder = None

    groups = optim.parameter_groups(Plain(3, 2), optim.Config(layer_decay=0.5))
    assert scales(groups) == {"weight": 1.0, "bias": 1.0}
    assert {name for group in groups if group["decayed"] for name in group["names"]} == {"weight"}


def test_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match="nothing to train"):
        optim.create(an_objective().requires_grad_(False), optim.Config())


# ---- the optimizer -------------------------------------------------------------------------------


def test_rates_of_a_step_reach_the_groups_with_their_scale_and_decay():
    objective = an_objective()
    optimizer = optim.create(objective, optim.Config(layer_decay=0.5, betas=[0.8, 0.9]))
    optim.set_rates(optimizer, 2.0, 0.3)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    stem = group_of[id(objective.encoder.vit.patch_embed.proj.weight)]
    head = group_of[id(objective.decoder_pred.bias)]
    assert (stem["lr"], stem["weight_decay"], stem["betas"]) == (2.0 * 0.5**4, 0.3, (0.8, 0.9))
    assert (head["lr"], head["weight_decay"]) == (2.0, 0.0)


def test_weight_decay_is_decoupled_and_touches_only_the_decayed():
    objective = an_objective()
    optimizer = optim.create(objective, optim.Config())
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    for parameter in objective.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optim.set_rates(optimizer, 0.1, 0.5)
    optimizer.step()
    after = dict(objective.named_parameters())
    weight, bias = "decoder_pred.weight", "encoder.vit.pos_embed"
    assert torch.allclose(after[weight], before[weight] * (1 - 0.1 * 0.5))
    assert torch.equal(after[bias], before[bias])


def test_an_update_is_skipped_where_the_gradient_is_found_not_finite():
    objective = an_objective()
    optimizer = optim.create(objective, optim.Config())
    optim.set_rates(optimizer, 0.1, 0.5)
    before = [p.detach().clone() for p in objective.parameters()]
    for parameter in objective.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, objective.parameters(), strict=True))


# ---- rates ---------------------------------------------------------------------------------------


def test_rates_follow_warm_up_and_cosine_over_the_resolved_steps():
    found = rates(min_lr=0.1)
    assert (found.total_steps, found.warmup_steps) == (100, 20)
    assert [found.at(step)[0] for step in (0, 9, 19, 20)] == pytest.approx([0.05, 0.5, 1.0, 1.0])
    assert found.at(99)[0] == pytest.approx(0.1)


def test_a_base_rate_is_scaled_by_the_batch_over_256():
    assert rates(lr=None, base_lr=1.5e-4, batch_size=4096).lr == pytest.approx(2.4e-3)


def test_weight_decay_is_constant_or_a_cosine_over_the_whole_run():
    assert {rates(weight_decay=0.05).at(step)[1] for step in range(100)} == {0.05}
    rising = [rates(weight_decay=0.04, weight_decay_end=0.4).at(step)[1] for step in (0, 99)]
    assert rising == pytest.approx([0.04, 0.4])
    assert rates(weight_decay=0.0, weight_decay_end=1.0, length="101 steps").at(50)[1] == pytest.approx(0.5)


def test_the_rates_of_mae_at_given_steps():
    """1.5e-4 for 256 images, a batch of 4096, 40 of 800 epochs of warm-up, half a cosine to 0."""
    found = rates(1_281_167, lr=None, base_lr=1.5e-4, batch_size=4096, length="800 epochs", warmup="40 epochs")
    assert (found.total_steps, found.warmup_steps) == (250_228, 12_512)
    assert found.at(6_255)[0] == pytest.approx(1.2e-3)
    assert found.at(12_511)[0] == found.at(12_512)[0] == pytest.approx(2.4e-3)
    half = (12_512 + 250_227) // 2
    assert found.at(half)[0] == pytest.approx(1.2e-3, rel=1e-4)
    assert found.at(250_227)[0] == 0.0


def test_the_rates_of_beit_at_given_steps():
    """1.5e-3 for a batch of 2048, 10 of 800 epochs of warm-up, half a cosine to 1e-5."""
    found = rates(1_281_167, lr=1.5e-3, min_lr=1e-5, batch_size=2048, length="800 epochs", warmup="10 epochs")
    assert (found.total_steps, found.warmup_steps) == (500_456, 6_256)
    assert found.at(6_255)[0] == pytest.approx(1.5e-3)
    quarter = 6_256 + (500_455 - 6_256) // 4
    assert found.at(quarter)[0] == pytest.approx(1e-5 + 1.49e-3 * (1 + 2**-0.5) / 2, rel=1e-4)
    assert found.at(500_455)[0] == pytest.approx(1e-5)


def test_the_rates_of_simmim_fall_to_a_tenth_after_700_of_800_epochs():
    """1e-4 for 512 images at a batch of 2048, warm-up from 2e-6 over 10 epochs."""
    options = {"batch_size": 2048, "length": "800 epochs", "warmup": "10 epochs", "warmup_lr": 2e-6, "lr": 4e-4}
    found = rates(1_281_167, schedule="multistep", milestones=["700 epochs"], **options)
    assert found.milestones == (437_899,)
    assert found.at(0)[0] == pytest.approx(2e-6 + 3.98e-4 / 6_256)
    assert found.at(6_255)[0] == found.at(437_898)[0] == pytest.approx(4e-4)
    assert found.at(437_899)[0] == found.at(500_455)[0] == pytest.approx(4e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_lr": 1.0}, "optim.lr=1.0 and optim.base_lr=1.0: give exactly one"),
        ({"lr": None}, "optim.lr=None and optim.base_lr=None: give exactly one"),
        ({"schedule": "cosin"}, "optim.schedule='cosin' is unknown; choose one of cosine, linear, constant, multistep"),
        (
            {"schedule": "multistep"},
            "multistep needs milestones, such as ['700 epochs'], and no other schedule has any",
        ),
        ({"milestones": ["5 epochs"]}, "optim.schedule=cosine and optim.milestones=['5 epochs']: multistep needs"),
        ({"schedule": "multistep", "milestones": ["soon"]}, "optim.milestones='soon' is not a duration"),
        (
            {"schedule": "multistep", "milestones": ["1 epochs", "9 epochs"]},
            "are the steps [10, 90]; they must lie between the end of the warm-up, 20, and that of the run, 100",
        ),
        ({"schedule": "multistep", "milestones": ["10 epochs"]}, "are the steps [100]; they must lie between"),
        ({"name": "sgd"}, "optim.name='sgd' is not offered; choose adamw"),
        ({"batch_size": 0}, "optim.batch_size=0 must be at least 1"),
        ({"length": "long"}, "optim.length='long' is not a duration"),
        ({"warmup": "2 weeks"}, "optim.warmup='2 weeks' is not a duration"),
        ({"warmup": "11 epochs"}, "optim.warmup='11 epochs' is 110 steps, longer than the run of 100 steps"),
        ({"layer_decay": 2.0}, "optim.layer_decay=2.0 must be at least 0 and at most 1"),
        ({"warmup_lr": -1.0}, "optim.warmup_lr=-1.0 must be at least 0"),
        ({"ema": 1.5}, "optim.ema=1.5 must be at least 0 and at most 1"),
        ({"betas": [0.9]}, "optim.betas=[0.9] must be two numbers, at least 0 and below 1"),
        ({"betas": [0.9, 1.0]}, "optim.betas=[0.9, 1.0] must be two numbers, at least 0 and below 1"),
    ],
)
def test_what_makes_no_schedule_is_refused(options, message):
    with pytest.raises(ConfigError) as error:
        rates(**options)
    assert message in str(error.value)
