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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_lr": 1.0}, "optim.lr=1.0 and optim.base_lr=1.0: give exactly one"),
        ({"lr": None}, "optim.lr=None and optim.base_lr=None: give exactly one"),
        ({"schedule": "cosin"}, "optim.schedule='cosin' is unknown; choose one of cosine, linear, constant, multistep"),
        ({"name": "sgd"}, "optim.name='sgd' is not offered; choose adamw"),
        ({"batch_size": 0}, "optim.batch_size=0 must be at least 1"),
        ({"length": "long"}, "optim.length='long' is not a duration"),
        ({"warmup": "2 weeks"}, "optim.warmup='2 weeks' is not a duration"),
        ({"warmup": "11 epochs"}, "optim.warmup='11 epochs' is 110 steps, longer than the run of 100 steps"),
    ],
)
def test_what_makes_no_schedule_is_refused(options, message):
    with pytest.raises(ConfigError) as error:
        rates(**options)
    assert message in str(error.value)
