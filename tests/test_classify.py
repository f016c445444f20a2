"""Classification: heads as published, the probe that leaves its encoder alone, and labels that are missing."""

import math
import random

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import TINY
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from mim import build, config, optim, train
from mim.config import ConfigError
from mim.data.shards import Dataset
from mim.objectives import classify
from mim.pretrained import weights
from tests.test_distributed import torchrun
from tests.test_train import dataset, lines, run, tensors  # noqa: F401
from tests.test_train import recipe as run_recipe

PROGRESS = torch.tensor(0.5)
EVERYTHING = {
    "name": "classify",
    "num_classes": 2,
    "dropout_rate": 0.1,
    "label_smoothing": 0.1,
    "mixup_alpha": 0.8,
    "cutmix_alpha": 1.0,
    "erase_rate": 0.5,
    "head_std": 0.02,
}


def an_encoder(name="vit", **options):
    torch.manual_seed(0)
    module, cfg = config.component("mim.encoders", {"name": name, **TINY[name], **options}, "encoder")
    return module.build(cfg, image_size=(32, 32), channels=3)


def an_objective(encoder=None, **options):
    torch.manual_seed(0)
    return classify.build(encoder or an_encoder(), classify.Config(**{"num_classes": 3, "head_std": 0.02, **options}))


def a_batch(labels=(0, 1, 2, 1)):
    images = torch.rand(len(labels), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {"images": images, "labels": torch.tensor(labels), "weight": torch.ones(len(labels))}


def seed(number=0):
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


# ---- heads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["mean", "class"])
@torch.no_grad()
def test_the_logits_are_those_of_timms_classifier(pool):
    objective = an_objective(an_encoder(layer_scale=0.1), pool=pool).eval()
    for parameter in objective.parameters():
        nn.init.normal_(parameter, std=0.1)
    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, init_values=0.1,
        num_classes=3, global_pool="avg" if pool == "mean" else "token", dynamic_img_size=True,
    ).eval()  # fmt: skip
    state = {n.removeprefix("vit."): t for n, t in objective.encoder.state_dict().items() if n.startswith("vit.")}
    state |= {f"head.{n}": t for n, t in objective.head.state_dict().items()}
    if pool == "mean":
        state = {n: t for n, t in state.items() if not n.startswith("norm.")}
        state |= {f"fc_norm.{n}": t for n, t in objective.norm.state_dict().items()}
    theirs.load_state_dict(state)
    batch = a_batch()
    assert torch.equal(objective.logits(batch), theirs(objective.encoder.normalize(batch["images"])))


def test_the_final_norm_is_not_trained_where_the_mean_has_a_norm_of_its_own():
    assert not any(p.requires_grad for p in an_objective(pool="mean").encoder.final_norm.parameters())
    assert all(p.requires_grad for p in an_objective(pool="class").encoder.final_norm.parameters())


def test_the_head_starts_as_small_as_asked_and_without_bias():
    objective = classify.build(an_encoder(), classify.Config(num_classes=1000))
    assert objective.head.weight.std().item() == pytest.approx(2e-5, rel=0.05)
    assert not objective.head.bias.any()


def test_an_encoder_without_a_class_token_cannot_give_it():
    objective = an_objective(an_encoder("dense"), pool="class")
    with pytest.raises(ConfigError, match="has no class token"):
        objective(a_batch(), PROGRESS)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_classes": None},
        {"num_classes": 0},
        {"pool": "max"},
        {"dropout_rate": 1.5},
        {"mixup_alpha": -1.0},
        {"distill": classify.Distill(kind="firm"), "pool": "class"},
        {"distill": classify.Distill(temperature=0.0), "pool": "class"},
        {"distill": classify.Distill(), "pool": "mean"},
        {"distill": classify.Distill(), "pool": "class", "frozen": True},
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_key(wrong):
    with pytest.raises(ValueError, match=r"objective\.(num_classes|pool|dropout_rate|mixup_alpha|distill)"):
        an_objective(**wrong)


# ---- loss ----------------------------------------------------------------------------------------


def test_the_loss_of_hard_labels_is_the_smoothed_cross_entropy_of_timm():
    objective, batch = an_objective(label_smoothing=0.1).eval(), a_batch()
    out = objective(batch, PROGRESS)
    expected = LabelSmoothingCrossEntropy(0.1)(objective.logits(batch), batch["labels"])
    assert out["loss"].mean().item() == pytest.approx(expected.item(), abs=1e-6)
    assert torch.equal(out["accuracy"], (objective.logits(batch).argmax(dim=1) == batch["labels"]).float())


def test_the_loss_of_mixed_images_is_the_cross_entropy_of_soft_labels_and_tells_no_accuracy():
    objective = an_objective(mixup_alpha=0.8).eval()
    batch = objective.prepare(a_batch())
    out = objective(batch, PROGRESS)
    expected = SoftTargetCrossEntropy()(objective.logits(batch), batch["soft_labels"])
    assert out["loss"].mean().item() == pytest.approx(expected.item(), abs=1e-6)
    assert out.keys() == {"loss"}


def test_mixing_makes_a_loss_of_the_micro_batch_and_erasing_does_not():
    assert an_objective(mixup_alpha=0.8).per_micro_batch
    assert an_objective(cutmix_alpha=1.0).per_micro_batch
    assert not an_objective(erase_rate=0.25, label_smoothing=0.1).per_micro_batch


def test_preparing_changes_a_copy_by_the_seeds_alone():
    objective, batch = an_objective(mixup_alpha=0.8, cutmix_alpha=1.0, erase_rate=0.5), a_batch()
    seed(1)
    first = objective.prepare(batch)
    seed(1)
    again = objective.prepare(batch)
    assert all(torch.equal(first[key], again[key]) for key in ("images", "soft_labels", "weight"))
    seed(2)
    assert not torch.equal(objective.prepare(batch)["images"], first["images"])
    assert torch.equal(batch["images"], a_batch()["images"])


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"mixup_alpha": 0.8}, {"frozen": True}])
def test_an_unlabelled_sample_is_never_trained_on(options):
    """Neither the loss nor the gradient changes with it, and its weight is 0, so that no mean counts it."""
    objective = an_objective(**options).train()
    gradients = []
    for shade in (0.0, 1.0):
        batch = a_batch((0, -1, 1, -1, 2))  # partners of mixing: unlabelled with unlabelled
        batch["images"][[1, 3]] = shade
        seed()
        batch = objective.prepare(batch)
        assert batch["weight"].tolist() == [1, 0, 1, 0, 1]
        objective.zero_grad()
        out = objective(batch, PROGRESS)
        assert not out["loss"][[1, 3]].any()
        (out["loss"] * batch["weight"]).sum().backward()
        gradients.append([p.grad.clone() for p in objective.parameters() if p.grad is not None])
    assert gradients[0]
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_a_classifier_learns_a_batch_by_heart():
    objective, batch = an_objective().train(), a_batch()
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        out = objective(batch, PROGRESS)
        out["loss"].mean().backward()
        optimizer.step()
    assert out["accuracy"].mean() == 1
    assert out["loss"].mean() < 0.5


# ---- the linear probe ----------------------------------------------------------------------------


def test_a_probe_trains_its_head_alone():
    objective = an_objective(an_encoder(drop_path_rate=0.5), frozen=True).train()
    assert not objective.encoder.training
    assert objective.norm.training
    batch = a_batch()
    assert torch.equal(objective.encoder(batch["images"]).patches, objective.encoder(batch["images"]).patches)
    objective(batch, PROGRESS)["loss"].sum().backward()
    assert {n for n, p in objective.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}
    named = [n for g in optim.parameter_groups(objective, optim.Config(layer_decay=0.5)) for n in g["names"]]
    assert sorted(named) == ["head.bias", "head.weight"]


def test_a_probe_norms_its_features_as_batchnorm_without_affine_does():
    objective, images = classify.build(an_encoder(), classify.Config(num_classes=3, frozen=True)).train(), a_batch()
    theirs, seen = nn.BatchNorm1d(objective.encoder.width, eps=1e-6, affine=False), []
    objective.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    objective.logits({"images": images["images"]})
    pooled = objective.encoder(images["images"]).patches.mean(dim=1)
    assert seen[0].allclose(theirs(pooled), atol=1e-4)


# ---- distillation --------------------------------------------------------------------------------


def a_student(**options):
    distill = classify.Distill(**options)
    return an_objective(an_encoder(num_registers=1), pool="class", distill=distill)


def test_hard_distillation_gives_the_second_head_the_teachers_decisions():
    student, batch = a_student().eval(), a_batch()
    batch["teacher_logits"] = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    features = student.encoder(batch["images"]).prefix
    first, second = student.head(features[:, 0]), student.distill_head(features[:, 1])
    expected = F.cross_entropy(first, batch["labels"], reduction="none")
    expected = expected / 2 + F.cross_entropy(second, batch["teacher_logits"].argmax(dim=1), reduction="none") / 2
    assert student(batch, PROGRESS)["loss"].allclose(expected, atol=1e-6)


def test_soft_distillation_is_the_divergence_at_a_temperature_times_its_square():
    distill = classify.Distill(kind="soft", temperature=3.0)
    student, teacher = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    p, q = (teacher / 3).softmax(dim=1), (student / 3).softmax(dim=1)
    expected = 9 * (p * (p / q).log()).sum(dim=1)
    assert classify.distillation_loss(student, teacher, distill).allclose(expected, atol=1e-5)
    assert classify.distillation_loss(teacher, teacher, distill).allclose(torch.zeros(4), atol=1e-6)


@torch.no_grad()
def test_the_prediction_of_a_student_is_the_mean_of_both_softmaxes():
    student, batch = a_student().eval(), a_batch()
    nn.init.normal_(student.distill_head.weight)
    features = student.encoder(batch["images"]).prefix
    both = [student.head(features[:, 0]).softmax(dim=1), student.distill_head(features[:, 1]).softmax(dim=1)]
    assert student.logits(batch).softmax(dim=1).allclose(sum(both) / 2, atol=1e-6)


def test_a_student_needs_a_distillation_token():
    with pytest.raises(ConfigError, match=r"encoder\.num_registers=1"):
        an_objective(pool="class", distill=classify.Distill())


# ---- recipes -------------------------------------------------------------------------------------


def test_the_number_of_classes_is_the_datasets_and_is_saved(recipe, shards):
    sections = recipe("classify")
    sections["objective"] = {"name": "classify"}
    built = build.build(sections, dataset=Dataset.open(shards / "train"))
    assert built.sections["objective"]["num_classes"] == built.objective.num_classes == 3
    assert build.build(built.sections).objective.num_classes == 3


@pytest.mark.parametrize(("stated", "given", "message"), [(5, True, "has 3"), (None, False, "must state it")])
def test_classes_that_disagree_or_are_unknown_are_refused(recipe, shards, stated, given, message):
    sections = recipe("classify")
    sections["objective"] = {"name": "classify", "num_classes": stated}
    with pytest.raises(ConfigError, match=rf"objective\.num_classes.*{message}"):
        build.build(sections, dataset=Dataset.open(shards / "train") if given else None)


def test_a_dataset_without_labels_is_refused(recipe, shards, monkeypatch):
    unlabelled = Dataset.open(shards / "train")
    unlabelled.classes = None
    with pytest.raises(ConfigError, match="has no labels"):
        build.build(recipe("classify"), dataset=unlabelled)


def test_the_rate_of_a_layer_falls_with_its_distance_from_the_head():
    groups = optim.parameter_groups(an_objective(), optim.Config(layer_decay=0.5))
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scales["head.weight"] == scales["norm.weight"] == 1
    assert scales["encoder.vit.blocks.1.mlp.fc1.weight"] == 0.5
    assert scales["encoder.vit.blocks.0.mlp.fc1.weight"] == 0.25
    assert scales["encoder.vit.patch_embed.proj.weight"] == scales["encoder.vit.cls_token"] == 0.125
    assert "encoder.vit.norm.weight" not in scales


def test_drop_path_drops_in_training_alone():
    objective, batch = an_objective(an_encoder(drop_path_rate=0.5)), a_batch()
    losses = []
    for number in (1, 2):
        seed(number)
        losses.append(objective.train()(batch, PROGRESS)["loss"])
    assert not torch.equal(*losses)
    assert torch.equal(objective.eval()(batch, PROGRESS)["loss"], objective(batch, PROGRESS)["loss"])


# ---- runs ----------------------------------------------------------------------------------------


def sections_of(dataset, folder, objective, **changes):  # noqa: F811
    """A recipe of a few steps on two classes, with RandAugment."""
    path = run_recipe(dataset, folder, **changes)
    found = config.from_yaml(folder / "mae.yaml")
    found["objective"] = objective
    found["data"]["view"] = {"name": "rand_augment_crop"}
    del found["mask"]
    (folder / "mae.yaml").write_text(config.to_yaml(found))
    return path


def test_a_fine_tuning_with_everything_on_resumes_bit_for_bit_with_any_workers(dataset, tmp_path):  # noqa: F811
    path = sections_of(dataset, tmp_path, EVERYTHING, optim__layer_decay=0.75)
    run(path, tmp_path / "whole")
    random.random()  # what others drew between two starts of a run is nobody's business
    run(path, tmp_path / "stopped", "train.workers=2", stop_at=5)
    run(path, tmp_path / "stopped")
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")
    mine, theirs = tensors(tmp_path / "stopped"), tensors(tmp_path / "whole")
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    assert any(name.startswith("ema.head") for name in mine)
    loaded = build.load_run(tmp_path / "whole")
    assert torch.equal(loaded.objective.head.weight, theirs["ema.head.weight"])  # the average is what is judged
    assert not torch.equal(theirs["ema.head.weight"], theirs["model.head.weight"])


def test_a_probe_leaves_its_encoder_as_it_was_and_opens_without_data(dataset, tmp_path):  # noqa: F811
    objective = {"name": "classify", "frozen": True, "head_std": 0.01}
    path = sections_of(dataset, tmp_path, objective)
    run(path, tmp_path / "run", stop_at=1)
    before = tensors(tmp_path / "run")
    run(path, tmp_path / "run")
    after = tensors(tmp_path / "run")
    encoder = [name for name in after if name.startswith("model.encoder.")]
    assert encoder
    assert all(torch.equal(after[name], before[name]) for name in encoder)
    assert not torch.equal(after["model.head.weight"], before["model.head.weight"])
    assert not torch.equal(after["model.norm.running_mean"], before["model.norm.running_mean"])
    assert {name for name in after if name.startswith("ema.")} == {
        f"ema.{name}" for name in ("head.weight", "head.bias", "norm.running_mean", "norm.running_var")
    }
    assert "accuracy" in lines(tmp_path / "run")[-1]
    (tmp_path / "run" / "config.yaml").write_text(
        (tmp_path / "run" / "config.yaml").read_text().replace(str(dataset), "/nowhere")
    )
    loaded = build.load_run(tmp_path / "run")
    assert loaded.objective.logits(a_batch()).shape == (4, 2)


def test_a_fine_tuning_starts_from_the_averaged_encoder_of_a_run_of_mae(dataset, tmp_path):  # noqa: F811
    run(run_recipe(dataset, tmp_path, encoder__positions="sincos"), tmp_path / "mae", stop_at=3)
    found = build.load_run(tmp_path / "mae")
    sections = {**found.config, "objective": {"name": "classify", "num_classes": 2}, "mask": None}
    sections["encoder"] = {**sections["encoder"], "init": str(tmp_path / "mae"), "positions": "learn"}
    built = build.build(sections)
    weights.start(built, None, optimizer=False, resumed=False)
    for name, value in found.encoder.state_dict().items():
        assert torch.equal(built.encoder.state_dict()[name], value), name
    assert built.encoder.vit.pos_embed.requires_grad
    assert built.objective.head.weight.std() < 1e-4


def test_draws_of_a_step_are_named_for_torch_numpy_and_python():
    found = []
    for step in (3, 3, 4):
        train.seed_draws(0, step, 0, 0)
        found.append((torch.rand(()).item(), np.random.rand(), random.random()))
    assert found[0] == found[1]
    assert all(not math.isclose(a, b) for a, b in zip(found[0], found[2], strict=True))


def test_a_probe_on_two_processes_has_the_losses_and_statistics_of_one(dataset, tmp_path):  # noqa: F811
    """With 7 images a step the shares differ, so padding is at work too."""
    path = sections_of(dataset, tmp_path, {"name": "classify", "frozen": True, "head_std": 0.01}, optim__batch_size=7)
    run(path, tmp_path / "one")
    launched = torchrun(path, tmp_path / "two")
    assert launched.returncode == 0, launched.stderr
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [entry["loss"] for entry in two] == pytest.approx([entry["loss"] for entry in one], abs=1e-5)
    mine, theirs = tensors(tmp_path / "two"), tensors(tmp_path / "one")
    for name in ("model.norm.running_mean", "model.norm.running_var"):
        assert mine[name].allclose(theirs[name], atol=1e-5)
