"""The cost of a step: operations as the closed form has them, bytes as a real step holds them."""

import pytest
import torch
from torch import nn

from mim import build, optim
from mim.config import ConfigError
from mim.planning import footprint

WIDTH, DEPTH, PATCH, PATCHES = 32, 2, 8, 16  # of the tiny recipe at 32 pixels


def meta(sections):
    with torch.device("meta"):
        return build.build(sections, load_frozen=False)


@pytest.fixture
def measured(recipe):
    """`measured(objective, **options)`: the footprint of a tiny recipe."""

    def measure(objective="mae", **options):
        sections = recipe(objective)
        if objective == "beit":
            sections["tokenizer"] = {"recipe": "dvae_small_cifar10"}
            sections["objective"]["num_codes"] = 512
            sections["encoder"]["patch_size"] = 4
        options = {"rows": 4, "micro_batches": 1, "precision": "no"} | options
        optimizer = optim.Config(**{key: options.pop(key) for key in ("name", "ema") if key in options})
        return footprint.measure(meta(sections), optimizer, **options)

    return measure


def encoder_flops(tokens):
    """(forward, backward) of the tiny ViT: a product forward is two backward, attention backward two and a half."""
    stem = 2 * min(tokens - 1, PATCHES) * (PATCH * PATCH * 3) * WIDTH
    linear = DEPTH * 2 * tokens * 12 * WIDTH**2
    attention = DEPTH * 2 * 2 * tokens**2 * WIDTH
    return stem + linear + attention, stem + 2 * linear + 2.5 * attention  # no gradient of the image


def test_an_encoder_that_drops_patches_does_the_operations_of_the_visible_ones(measured):
    found = measured()
    part = found.parts["encoder"]
    assert (part.forward, part.backward) == encoder_flops(PATCHES // 2 + 1)
    assert found.tokens == {
        "patches": 16, "masked": 8, "visible": 8, "in the encoder": 9, "in the decoder / head": 17,
    }  # fmt: skip


def test_no_gradient_goes_through_a_frozen_encoder(recipe):
    sections = recipe("classify")
    sections["objective"]["frozen"] = True
    found = footprint.measure(meta(sections), optim.Config(ema=0.9), rows=4, micro_batches=1, precision="no")
    part = found.parts["encoder"]
    assert (part.forward, part.backward, part.trained) == (encoder_flops(PATCHES + 1)[0], 0, 0)
    assert found.parts["decoder / head"].backward > 0
    assert found.weights["gradients"] == found.weights["average"] == (3 * WIDTH + 3) * 4


def test_the_operations_of_an_image_do_not_depend_on_the_batch(measured):
    for objective in ("mae", "beit", "tokenize"):
        few, many = measured(objective), measured(objective, rows=12, micro_batches=3)
        assert few.parts == many.parts
        assert few.flops() > 0


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_the_gradients_of_a_convolution_cost_twice_its_forward_pass(kind, groups):
    """torch's own formula multiplies the weight's by the number of groups."""
    convolution, x = kind(8, 16, 3, stride=2, groups=groups), torch.randn(2, 8, 9, 9, requires_grad=True)
    with footprint.operations() as forward:
        y = convolution(x)
    with footprint.operations() as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops() > 0


def test_every_parameter_belongs_to_one_part(measured, recipe):
    found = measured()
    objective = meta(recipe()).objective
    assert sum(part.parameters for part in found.parts.values()) == sum(p.numel() for p in objective.parameters())
    assert found.parts["encoder"].parameters == sum(p.numel() for p in objective.encoder.parameters())


def test_a_frozen_tokenizer_only_runs_forward(measured):
    part = measured("beit").parts["tokenizer"]
    assert part.forward > 0
    assert (part.trained, part.backward) == (0, 0)


def test_a_tokenizer_in_training_has_the_operations_of_its_run(measured):
    found = measured("tokenize")
    assert list(found.parts) == ["tokenizer"]
    assert 1.5 < found.parts["tokenizer"].backward / found.parts["tokenizer"].forward < 2
    assert found.tokens == {"codes": 16}


def test_an_encoder_that_is_entered_by_its_layers_is_told_from_the_head(measured, monkeypatch):
    from mim.objectives.mae import MAE

    def forward(self, batch, progress):
        early, late = self.encoder.layers(batch["images"], [0, -1])
        return {"loss": self.decoder_embed(early.patches + late.patches).mean(dim=(1, 2))}

    monkeypatch.setattr(MAE, "forward", forward)
    found = measured()
    encoder, head = found.parts["encoder"], found.parts["decoder / head"]
    assert (encoder.forward, encoder.backward) == encoder_flops(PATCHES + 1)
    assert (head.forward, head.backward) == (2 * PATCHES * WIDTH * 16, 2 * 2 * PATCHES * WIDTH * 16)
    assert found.tokens["in the encoder"] == PATCHES + 1


@pytest.mark.parametrize("objective", ["mae", "tokenize"])
def test_bytes_are_those_of_a_real_step(measured, recipe, objective):
    found = measured(objective)
    built = build.build(recipe(objective), load_frozen=False)
    batch = footprint._batch(built, 4)
    with footprint.Live() as live:
        held = live.bytes
        loss = built.objective(batch, torch.zeros(()))["loss"]
        activations = live.bytes - held
        loss.sum().backward()
    assert found.activations == activations
    assert found.peak == live.peak
    assert live.peak > activations > 0


def test_live_bytes_rise_with_a_tensor_and_fall_with_its_end():
    x = torch.ones(1000)
    with footprint.Live() as live:
        y = x * 2
        assert live.bytes == 4000
        z = y.view(10, 100).add_(1)  # neither a view nor a change in place takes memory
        assert live.bytes == 4000
        w = z.half()
        del y, z
        assert live.bytes == 2000
        del w
    assert (live.bytes, live.peak) == (0, 6000)


def test_activations_grow_with_the_micro_batch_and_weights_do_not(measured):
    small, large = measured(rows=8), measured(rows=32)
    assert large.activations / small.activations == pytest.approx(4, rel=0.02)
    assert large.weights == small.weights
    assert small.total <= large.total_at(8) <= small.total + small.weights["gradients"]  # on the safe side


def test_gradients_live_through_the_next_micro_batch(measured):
    one, two = measured(rows=32), measured(rows=32, micro_batches=2)
    stem = 4 * (PATCH * PATCH * 3) * WIDTH  # its gradient, once more in the order of its convolution
    assert one.peak < two.peak <= one.peak + two.weights["gradients"] + stem


def test_weights_are_counted_with_what_the_optimizer_keeps(measured, recipe):
    found = measured(ema=0.9)
    objective = meta(recipe()).objective
    trained = 4 * sum(p.numel() for p in objective.parameters() if p.requires_grad)
    assert [found.weights[name] for name in ("gradients", "optimizer", "average", "frozen")] == [
        trained,
        2 * trained,
        trained,
        0,
    ]
    assert found.total == found.peak + sum(found.weights.values()) - trained


@pytest.mark.parametrize("name", ["lion", "muon"])
def test_an_optimizer_with_fewer_moments_holds_less(measured, name):
    adamw, other = measured(), measured(name=name)
    assert 0.5 <= other.weights["optimizer"] / adamw.weights["optimizer"] < 0.8
    assert adamw.total - other.total == adamw.weights["optimizer"] - other.weights["optimizer"]


def test_half_precision_holds_less(measured):
    assert measured(rows=64, precision="bf16").activations < 0.8 * measured(rows=64).activations


def test_a_shape_that_depends_on_values_is_refused(measured, monkeypatch):
    from mim.objectives.mae import MAE

    monkeypatch.setattr(
        MAE, "forward", lambda self, batch, progress: {"loss": batch["images"][batch["mask"].any(1)].sum()}
    )
    with pytest.raises(ConfigError, match=r"objective\.name=mae makes a shape that depends on values"):
        measured()


def test_a_tensor_that_is_shared_stays_shared():
    network = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    network["b"].weight = network["a"].weight
    footprint._fake(network)
    assert network["b"].weight is network["a"].weight
    assert len(list(network.parameters())) == 3
