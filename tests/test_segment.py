"""Segmentation: the loss is mmsegmentation's and splits, heads read what they should, and a frozen encoder stays."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY

from mim import config, optim
from mim.contracts import IGNORE
from mim.encoders import dense, vit
from mim.objectives import segment

SIZE = (32, 32)
HEADS = ("linear", "setr_pup", "upernet")
PROGRESS = torch.tensor(0.5)


def an_encoder(**changes):
    torch.manual_seed(0)
    return vit.build(vit.Config(**TINY["vit"] | changes), image_size=SIZE, channels=3)


def an_objective(encoder=None, **changes):
    cfg = segment.Config(**{**TINY["segment"], "dropout": 0.0, **changes})
    torch.manual_seed(1)
    return segment.build(encoder or an_encoder(), cfg)


def a_batch(rows=3):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (rows, *SIZE), generator=generator)
    labels[:, :4] = IGNORE
    return {"images": torch.rand(rows, 3, *SIZE, generator=generator), "label_maps": labels, "weight": torch.ones(rows)}


def part(batch, rows):
    return {name: value[rows] for name, value in batch.items()}


def gradients(objective, batches, total):
    objective.zero_grad()
    for batch in batches:
        (objective(batch, PROGRESS)["loss"] * batch["weight"]).sum().div(total).backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


# ---- loss ----------------------------------------------------------------------------------------


def test_the_mean_loss_is_that_of_mmsegmentation():
    """`CrossEntropyLoss` with its defaults: no reduction, ignored pixels 0, then the mean over all of them."""
    objective = an_objective(auxiliary_weight=0.0).train()
    batch = a_batch()
    scores = F.interpolate(objective.scores(batch["images"])[0], SIZE, mode="bilinear", align_corners=False)
    expected = F.cross_entropy(scores, batch["label_maps"], reduction="none", ignore_index=255).mean()
    assert torch.allclose(objective(batch, PROGRESS)["loss"].mean(), expected, atol=1e-6)


def test_the_auxiliary_loss_counts_with_its_weight():
    batch = a_batch()
    without = an_objective(auxiliary_weight=0.0)
    both = an_objective(without.encoder, auxiliary_weight=0.4).train()
    both.head.load_state_dict(without.head.state_dict())
    both.pyramid.load_state_dict(without.pyramid.state_dict())
    out, alone = both(batch, PROGRESS), without.train()(batch, PROGRESS)
    assert torch.allclose(out["loss"], alone["loss"] + 0.4 * out["auxiliary_loss"], atol=1e-6)
    assert "auxiliary_loss" not in both.eval()(batch, PROGRESS)


@pytest.mark.parametrize("head", HEADS)
def test_any_split_into_micro_batches_gives_the_same_gradient(head):
    objective = an_objective(head=head).train()
    batch = a_batch()
    batch["label_maps"][0, 8:] = IGNORE  # images with unequal numbers of labelled pixels
    whole = gradients(objective, [batch], 3)
    split = gradients(objective, [part(batch, slice(0, 1)), part(batch, slice(1, 3))], 3)
    assert whole.keys() == split.keys()
    for name, gradient in whole.items():
        assert torch.allclose(split[name], gradient, atol=1e-6), name


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_an_image_without_a_label_has_no_loss_and_no_gradient(norm):
    objective = an_objective(norm=norm).train()
    batch = part(a_batch(), slice(0, 1))
    batch["label_maps"][:] = IGNORE
    out = objective(batch, PROGRESS)
    assert out["loss"].tolist() == [0]
    assert out["pixel_accuracy"].tolist() == [0]
    out["loss"].sum().backward()
    assert not [n for n, p in objective.named_parameters() if p.grad is not None and p.grad.any()]


def test_rows_that_pad_change_nothing_for_the_others():
    objective = an_objective(norm="batch").train()
    batch = a_batch()
    padded = {name: torch.cat([value, value[:1]]) for name, value in batch.items()}
    padded["weight"][3] = 0
    padded["images"][3] = 0.5
    found = objective(padded, PROGRESS)["loss"][:3]
    assert torch.allclose(found, objective(batch, PROGRESS)["loss"], atol=1e-5)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_loss_is_in_single_precision_under_mixed_precision(norm):
    objective = an_objective(norm=norm).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = objective(a_batch(), PROGRESS)
    assert out["loss"].dtype == torch.float32
    assert torch.allclose(out["loss"], objective(a_batch(), PROGRESS)["loss"], rtol=0.02)


def test_pixel_accuracy_is_over_labelled_pixels():
    objective = an_objective()
    batch = a_batch()
    batch["label_maps"] = objective.eval().score_pixels(batch["images"]).argmax(dim=1)
    batch["label_maps"][0, :16] = IGNORE
    batch["label_maps"][1, :8] = (batch["label_maps"][1, :8] + 1) % 5
    assert objective(batch, PROGRESS)["pixel_accuracy"].tolist() == [1.0, 0.75, 1.0]


# ---- heads and encoders --------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("head", HEADS)
def test_every_head_trains_all_of_its_parameters_and_scores_every_pixel(head, norm):
    objective = an_objective(head=head, norm=norm).train()
    objective(a_batch(), PROGRESS)["loss"].sum().backward()
    assert not [n for n, p in objective.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    scores = objective.eval().score_pixels(a_batch()["images"])
    assert scores.shape == (3, 5, *SIZE)
    assert scores.dtype == torch.float32


@pytest.mark.parametrize(("depth", "layers"), [(12, [4, 6, 8, 12]), (24, [8, 12, 16, 24]), (2, [1, 1, 1, 2])])
def test_upernet_reads_the_blocks_of_beit(depth, layers):
    with torch.device("meta"):
        objective = an_objective(an_encoder(depth=depth))
    assert [level.block + 1 for level in objective.levels] == layers


def test_upernet_reads_raw_blocks_and_trains_no_norm_that_nobody_reads():
    objective = an_objective()
    images = a_batch()["images"]
    found = objective.maps(images)
    expected = objective.encoder.layers(images, [0, 0, 0, 1])
    for one, features in zip(found, expected, strict=True):
        assert torch.equal(one.flatten(2).transpose(1, 2), features.patches)
    assert not any(p.requires_grad for p in objective.encoder.final_norm.parameters())


@pytest.mark.parametrize("head", ["linear", "setr_pup"])
def test_the_other_heads_read_the_normed_output(head):
    objective = an_objective(head=head)
    images = a_batch()["images"]
    (found,) = objective.maps(images)
    assert torch.equal(found.flatten(2).transpose(1, 2), objective.encoder(images).patches)


def test_rows_of_a_map_are_rows_of_the_image():
    objective = an_objective(an_encoder(), head="linear")
    images = torch.rand(1, 3, 16, 32)  # a grid of 2 x 4
    assert objective.maps(images)[0].shape == (1, 32, 2, 4)
    assert objective.score_pixels(images).shape == (1, 5, 16, 32)


def test_an_encoder_with_stages_gives_them_as_they_are():
    torch.manual_seed(0)
    encoder = dense.build(dense.Config(**TINY["dense"]), image_size=SIZE, channels=3)
    objective = an_objective(encoder)
    assert [tuple(level) for level in objective.levels] == [(0, 16, 4), (1, 32, 8)]
    assert [tuple(x.shape[1:]) for x in objective.maps(a_batch()["images"])] == [(16, 8, 8), (32, 4, 4)]
    assert objective.pyramid is None


def test_the_rate_of_the_head_is_not_scaled_and_blocks_decay_with_depth():
    objective = an_objective(an_encoder(depth=3))
    groups = optim.parameter_groups(objective, optim.Config(lr=1.0, layer_decay=0.5))
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert {s for n, s in scales.items() if not n.startswith("encoder.")} == {1.0}
    assert scales["encoder.vit.patch_embed.proj.weight"] == 0.5**4
    assert [scales[f"encoder.vit.blocks.{i}.mlp.fc1.weight"] for i in range(3)] == [0.125, 0.25, 0.5]


def test_drop_path_of_the_encoder_is_at_work_in_training_alone():
    objective = an_objective(an_encoder(drop_path_rate=0.5))
    batch = a_batch()

    def draw(mode, seed):
        torch.manual_seed(seed)
        return objective.train(mode)(batch, PROGRESS)["loss"]

    assert not torch.equal(draw(True, 1), draw(True, 2))
    assert torch.equal(draw(True, 1), draw(True, 1))
    assert torch.equal(draw(False, 1), draw(False, 2))


@pytest.mark.parametrize("head", HEADS)
def test_a_frozen_encoder_neither_learns_nor_drops_paths_nor_enters_the_optimizer(head):
    objective = an_objective(an_encoder(drop_path_rate=0.5), head=head, frozen=True).train()
    assert not objective.encoder.training
    assert objective.head.training
    objective(a_batch(), PROGRESS)["loss"].sum().backward()
    assert not any(p.grad is not None for p in objective.encoder.parameters())
    names = [n for group in optim.parameter_groups(objective, optim.Config(lr=1.0)) for n in group["names"]]
    assert names
    assert not [name for name in names if name.startswith("encoder.")]


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": None}, "objective.num_classes is null"),
        ({"num_classes": 300}, "objective.num_classes=300 must lie between 2 and 255"),
        ({"head": "fpn"}, "objective.head='fpn' is unknown; choose linear, setr_pup, upernet"),
        ({"norm": "layer"}, "objective.norm='layer' is unknown"),
        ({"channels": 10}, "objective.channels=10 must be a multiple of 8"),
        ({"dropout": 1.0}, "objective.dropout=1.0 must be at least 0 and below 1"),
        ({"auxiliary_weight": -1.0}, "objective.auxiliary_weight=-1.0 must be at least 0"),
        ({"layers": [1, 1, 1, 2], "head": "linear"}, "objective.head=linear reads the last alone"),
        ({"layers": [1, 2]}, "must be four blocks in ascending order"),
        ({"layers": [2, 1, 1, 2]}, "must be four blocks in ascending order"),
        ({"layers": [1, 1, 2, 3]}, "must be four blocks in ascending order"),
        ({"layers": [1, 1, 1, 1]}, "must end with 2, the last block"),
    ],
)
def test_what_cannot_be_is_refused_with_its_key(changes, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace(".", r"\.")):
        an_objective(**changes)


def test_layers_of_an_encoder_with_stages_are_refused():
    encoder = dense.build(dense.Config(**TINY["dense"]), image_size=SIZE, channels=3)
    with pytest.raises(ValueError, match=r"this one has stages of strides \[4, 8\], which are all read"):
        an_objective(encoder, layers=[1, 1, 2, 2])


def test_an_auxiliary_head_is_optional_and_a_config_reads_from_a_recipe():
    _, cfg = config.component("mim.objectives", {"name": "segment", "num_classes": 3, "auxiliary_weight": 0}, "test")
    assert segment.build(an_encoder(), cfg).auxiliary is None
