"""Parameter groups, the rates of each step, and what every optimizer does with a gradient."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from mim import build, optim
from mim.config import ConfigError
from mim.encoders import vit
from mim.objectives import mae
from tests.conftest import TINY

OPTIONS = {"width": 32, "depth": 3, "num_heads": 2, "patch_size": 8, "layer_scale": 0.1, "num_registers": 2}
RATES = {"adamw": 3e-3, "lamb": 1e-2, "lars": 1.0, "lion": 1e-3, "muon": 3e-3}  # that train a tiny MAE
ALL = sorted(optim.BETAS)


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


# ---- every optimizer ----------------------------------------------------------------------------


class Trained:
    """A tiny MAE, one batch, and the optimizer as the loop has it."""

    def __init__(self, name, *, allocated=True, scaler=None, **options):
        torch.manual_seed(0)
        Accelerator(cpu=True)  # whose state an AcceleratedOptimizer reads
        self.objective, self.scaler = an_objective(), scaler
        optimizer = optim.create(self.objective, optim.Config(name=name, **options))
        if allocated:
            optim.allocate(optimizer)
        self.optimizer = AcceleratedOptimizer(optimizer, scaler=scaler)
        optim.set_rates(self.optimizer, RATES[name], 0.05)
        mask = torch.arange(16).repeat(4, 1) % 4 != 0  # (B, N)
        self.batch = {"images": torch.rand(4, 3, 32, 32), "mask": mask, "num_masked": 12}

    def step(self, *, spoiled=False):
        loss = self.objective(self.batch, torch.tensor(0.0))["loss"].mean()
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if spoiled:
            self.objective.decoder_pred.weight.grad[0, 0] = torch.inf
        gradients = [p.grad for p in self.objective.parameters() if p.grad is not None]
        optim.update(self.optimizer, torch.isfinite(nn.utils.get_total_norm(gradients)), self.scaler)
        self.optimizer.zero_grad()
        return loss.item()

    def tensors(self):
        """Every tensor that a step changes."""
        inner = self.optimizer.optimizer
        owners = (*inner.state.values(), *inner.param_groups)
        state = [value.clone() for owner in owners for value in owner.values() if isinstance(value, torch.Tensor)]
        return [p.detach().clone() for p in self.objective.parameters()] + state


def same(mine, theirs):
    return len(mine) == len(theirs) and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_every_optimizer_lowers_the_loss_of_a_batch(name):
    trained = Trained(name)
    losses = [trained.step() for _ in range(30)]
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_state(name, fp16):
    """At the first step as at any other; in fp16 the scaler decides, and lowers its scale."""
    trained = Trained(name, scaler=torch.amp.GradScaler("cpu", init_scale=4.0) if fp16 else None)
    for _ in range(2):
        before = trained.tensors()
        trained.step(spoiled=True)
        assert same(trained.tensors(), before)
        trained.step()
        assert not same(trained.tensors(), before)
    assert not fp16 or trained.scaler.get_scale() == 1.0


@pytest.mark.parametrize("name", ALL)
def test_a_state_that_is_made_before_the_first_step_changes_no_step(name):
    ready, lazy = Trained(name), Trained(name, allocated=False)
    weights = [p.detach().clone() for p in lazy.objective.parameters()]
    assert same([p.detach() for p in ready.objective.parameters()], weights)
    assert not any(t.any() for t in ready.tensors()[len(weights) :])
    for _ in range(3):
        ready.step()
        lazy.step()
    assert same(ready.tensors(), lazy.tensors())


@pytest.mark.parametrize("name", ALL)
def test_the_bytes_of_the_state_are_foretold(name):
    trained = Trained(name)
    kept = [t for state in trained.optimizer.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    found = sum(t.numel() * t.element_size() for t in kept if t.ndim)
    assert optim.state_bytes(trained.objective, optim.Config(name=name)) == found > 0


@pytest.mark.parametrize("name", ALL)
def test_layer_decay_and_a_frozen_encoder_hold_for_every_optimizer(name):
    trained = Trained(name, layer_decay=0.5, freeze_encoder="5 steps")
    optim.set_rates(trained.optimizer, RATES[name], 0.05, encoder_scale=0.0)
    before = {n: p.detach().clone() for n, p in trained.objective.named_parameters()}
    trained.step()
    moved = {n for n, p in trained.objective.named_parameters() if not p.equal(before[n])}
    assert "decoder_pred.weight" in moved
    assert not any(n.startswith("encoder.") for n in moved)
    found = scales(optim.parameter_groups(trained.objective, optim.Config(name=name, layer_decay=0.5)))
    assert found["encoder.vit.blocks.0.attn.qkv.weight"] == found["encoder.vit.blocks.0.attn.qkv.bias"] == 0.5**3


def test_betas_that_are_left_out_are_those_of_the_optimizer():
    assert optim.Config().betas == [0.9, 0.95]
    assert optim.Config(name="lion").betas == [0.9, 0.99]
    assert optim.Config(name="lars").betas == [0.9]
    assert optim.Config(name="lamb", betas=[0.8, 0.9]).betas == [0.8, 0.9]
    momentum = {Trained(name, betas=betas).optimizer.param_groups[0]["momentum"] for name, betas in
                (("lars", [0.8]), ("muon", [0.8, 0.9]))}  # fmt: skip
    assert momentum == {0.8}


@pytest.mark.parametrize("name", ["lamb", "lars", "muon"])
def test_an_optimizer_that_needs_whole_tensors_is_refused_for_shards(name):
    with pytest.raises(ConfigError, match=f"optim.name={name} needs whole tensors .*; choose adamw or lion, or .* DDP"):
        optim.check_sharded(name)


@pytest.mark.parametrize("name", optim.ELEMENTWISE)
def test_an_elementwise_step_of_a_shard_is_that_shard_of_the_step(name):
    optim.check_sharded(name)
    weights, gradients = torch.randn(2, 6, 8)  # (6, 8) each
    moved = []
    for part in (slice(None), slice(0, 3), slice(3, None)):
        module = nn.Linear(8, 6, bias=False)
        module.weight = nn.Parameter(weights[part].clone())
        optimizer = optim.create(module, optim.Config(name=name))
        optim.set_rates(optimizer, 0.1, 0.5)
        for sign in (1, -2):
            module.weight.grad = sign * gradients[part].clone()
            optimizer.step()
        moved.append(module.weight.detach())
    assert torch.equal(moved[0], torch.cat(moved[1:]))


# ---- trust ratios --------------------------------------------------------------------------------


def a_layer(name, weight_decay):
    """A linear layer with gradients, its optimizer, and copies of weight, bias and their gradients."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 4)
    optimizer = optim.create(layer, optim.Config(name=name, eps=0.0))
    optim.set_rates(optimizer, 0.5, weight_decay)
    for parameter in layer.parameters():
        parameter.grad = torch.randn_like(parameter)
    return layer, optimizer, [(p.detach().clone(), p.grad.clone()) for p in (layer.weight, layer.bias)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lars_scales_matrices_by_the_trust_ratio_and_leaves_biases_to_momentum(weight_decay):
    """You et al. 2017, algorithm 1; also where nothing is decayed, as in MAE's probe."""
    layer, optimizer, ((w, dw), (b, db)) = a_layer("lars", weight_decay)
    ratio = 0.001 * w.norm() / (dw.norm() + weight_decay * w.norm())
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), w - 0.5 * ratio * (dw + weight_decay * w))
    torch.testing.assert_close(layer.bias.detach(), b - 0.5 * db)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lamb_scales_the_update_of_matrices_to_their_norm_and_does_not_clip(weight_decay):
    """You et al. 2020, algorithm 2: after one step Adam's direction is the sign of the gradient."""
    layer, optimizer, ((w, dw), (b, db)) = a_layer("lamb", weight_decay)
    direction = dw.sign() + weight_decay * w
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), w - 0.5 * w.norm() / direction.norm() * direction)
    torch.testing.assert_close(layer.bias.detach(), b - 0.5 * db.sign())
    assert all(group["max_grad_norm"] is None for group in optimizer.param_groups)


def test_lamb_and_lars_adapt_tokens_and_tables_although_they_are_not_decayed():
    for name in ("lamb", "lars"):
        groups = optim.parameter_groups(an_objective(), optim.Config(name=name))
        found = {n: (g["decayed"], g["always_adapt"]) for g in groups for n in g["names"]}
        assert found["encoder.vit.blocks.0.attn.qkv.weight"] == (True, True)
        assert found["encoder.vit.pos_embed"] == found["encoder.vit.cls_token"] == (False, True)
        assert found["encoder.vit.blocks.0.attn.qkv.bias"] == found["encoder.vit.norm.weight"] == (False, False)


# ---- muon ----------------------------------------------------------------------------------------


def muon_takes(objective):
    groups = optim.parameter_groups(objective, optim.Config(name="muon"))
    return {name for group in groups if group["use_muon"] for name in group["names"]}


def test_muon_takes_the_matrices_of_all_blocks_and_nothing_else():
    matrices = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    blocks = [f"encoder.vit.blocks.{i}" for i in range(3)] + ["decoder_blocks.0"]
    assert muon_takes(an_objective()) == {f"{block}.{matrix}" for block in blocks for matrix in matrices}


@pytest.mark.parametrize("name", ["eva", "beit", "dense"])
def test_muon_takes_no_stem_table_or_head_of_any_encoder(recipe, name):
    sections = recipe("beit2" if name == "beit" else "simmim")
    sections["encoder"] = {"name": name, **(TINY.get(f"mim.encoders.{name}") or TINY[name])}
    objective = build.build(sections).objective
    taken = muon_takes(objective)
    assert taken
    assert all(name.endswith(".weight") for name in taken)
    assert not any(word in name for name in taken for word in ("embed", "table", "head", "norm", "token"))
    shapes = {name: p.shape for name, p in objective.named_parameters()}
    assert all(min(shapes[name][:2]) > 1 for name in taken)
    inside = [n for n in taken if n.startswith("encoder.")]
    assert {objective.encoder.depth_of(n.removeprefix("encoder.")) for n in inside} >= {1, objective.encoder.depth}


@pytest.mark.parametrize("kind", ["dvae", "vqkd"])
def test_muon_takes_the_residual_blocks_of_a_tokenizer(recipe, kind):
    sections = recipe("tokenize")
    sections["tokenizer"] = {"name": kind, **TINY[kind]}
    taken = muon_takes(build.build(sections).objective)
    assert taken
    assert all("block_" in name and name.endswith(".w") for name in taken)


def test_a_step_of_muon_is_nearly_orthogonal_at_the_scale_of_adamw():
    """0.2 sqrt(max(out, in)) times singular values near 1: entries of mean square 0.2**2, as Adam's (Liu et al.)."""
    objective = nn.Module()
    objective.blocks = nn.ModuleList([nn.Linear(48, 16, bias=False)])
    optimizer = optim.create(objective, optim.Config(name="muon"))
    optim.set_rates(optimizer, 0.1, 0.0)
    weight = objective.blocks[0].weight
    before, weight.grad = weight.detach().clone(), torch.randn(16, 48) * torch.logspace(0, 1, 16)[:, None]
    optimizer.step()
    moved = (before - weight.detach()) / (0.1 * 0.2 * 48**0.5)
    values = torch.linalg.svdvals(moved)
    assert 0.6 < values.min() <= values.max() < 1.3


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
        ({"name": "sgd"}, "optim.name='sgd' is not offered; choose one of adamw, lamb, lars, lion, muon"),
        ({"batch_size": 0}, "optim.batch_size=0 must be at least 1"),
        ({"length": "long"}, "optim.length='long' is not a duration"),
        ({"warmup": "2 weeks"}, "optim.warmup='2 weeks' is not a duration"),
        ({"warmup": "11 epochs"}, "optim.warmup='11 epochs' is 110 steps, longer than the run of 100 steps"),
        ({"layer_decay": 2.0}, "optim.layer_decay=2.0 must be at least 0 and at most 1"),
        ({"warmup_lr": -1.0}, "optim.warmup_lr=-1.0 must be at least 0"),
        ({"ema": 1.5}, "optim.ema=1.5 must be at least 0 and at most 1"),
        ({"betas": [0.9]}, "optim.betas=[0.9] of adamw must be two numbers, at least 0 and below 1"),
        ({"betas": [0.9, 1.0]}, "optim.betas=[0.9, 1.0] of adamw must be two numbers, at least 0 and below 1"),
        ({"name": "lars", "betas": [0.9, 0.9]}, "optim.betas=[0.9, 0.9] of lars must be one number, the momentum, at"),
    ],
)
def test_what_makes_no_schedule_is_refused(options, message):
    with pytest.raises(ConfigError) as error:
        rates(**options)
    assert message in str(error.value)
