"""A frozen classifier as DeiT's teacher: it sees the student's own images, and what does not fit is refused."""

import pytest
import timm
import torch
from conftest import TINY
from safetensors.torch import save_file

from mim import build, classifying_teacher, frozen_networks, train
from mim.config import ConfigError, from_yaml, to_yaml
from mim.data.shards import Dataset
from mim.watch import stopping
from tests.test_train import lines, run, tensors

MODEL = "resnet10t"  # small, with a BatchNorm: evaluation mode shows


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of weights of a timm model with three classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "resnet.safetensors"
    network = timm.create_model(MODEL, num_classes=3)
    torch.nn.init.normal_(network.get_classifier().weight)
    save_file(network.state_dict(), path)
    return path


@pytest.fixture
def sections(recipe, weights):
    """A student that learns from timm's model, its images mixed and erased."""
    found = recipe("classify")
    found["encoder"]["num_registers"] = 1
    distill = {"kind": "hard"}
    found["objective"] = {"name": "classify", "pool": "class", "mixup_alpha": 0.8, "erase_rate": 0.5, "head_std": 0.02}
    found["objective"]["distill"] = distill
    found["teacher"] = {"model": MODEL, "init": str(weights), "image_size": 48}
    return found


@pytest.fixture
def built(sections, shards):
    return build.build(sections, dataset=Dataset.open(shards / "train"))


def refusal(sections) -> str:
    sections["objective"]["num_classes"] = sections["objective"].get("num_classes", 3)
    with pytest.raises(ConfigError) as error:
        build.build(sections)
    assert "\n" not in str(error.value)
    return str(error.value)


def a_batch():
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {"images": images, "labels": torch.tensor([0, 1, 2, 0]), "weight": torch.ones(4)}


@torch.no_grad()
def test_timms_model_sees_the_images_at_its_size_normalised_by_its_own_numbers(built, weights):
    batch = a_batch()
    frozen_networks.write_targets(built.frozen, batch)
    network = timm.create_model(MODEL, num_classes=3, checkpoint_path=str(weights)).eval()
    images = torch.nn.functional.interpolate(batch["images"], (48, 48), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    assert batch["teacher_logits"].allclose(network((images - mean) / std), atol=1e-5)


def test_a_teacher_is_frozen_and_stands_outside_the_objective(built):
    teacher = built.frozen["teacher"]
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    batch = a_batch()
    frozen_networks.write_targets(built.frozen, batch)
    assert not batch["teacher_logits"].requires_grad
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in built.objective.parameters()}


def test_the_teacher_sees_what_the_student_sees_mixed_and_erased(sections, shards, tmp_path, monkeypatch):
    seen, taught = [], []
    forward, learn = classifying_teacher.Classifier.forward, train.frozen_networks.write_targets

    def watched(self, images):
        seen.append(images.clone())
        return forward(self, images)

    def noted(frozen, batch):
        learn(frozen, batch)
        taught.append(batch)

    monkeypatch.setattr(classifying_teacher.Classifier, "forward", watched)
    monkeypatch.setattr(frozen_networks, "write_targets", noted)
    path = tmp_path / "student.yaml"
    path.write_text(to_yaml({**sections, "train": {"workers": 0}}))
    assert run(str(path), tmp_path / "run") == stopping.DONE
    assert len(seen) == len(taught) == 2
    for images, batch in zip(seen, taught, strict=True):
        assert torch.equal(images, batch["images"])
        assert "soft_labels" in batch


def test_a_student_of_our_own_run_resumes_bit_for_bit_and_opens_without_its_teacher(recipe, sections, tmp_path):
    teacher = tmp_path / "teacher.yaml"
    teacher.write_text(to_yaml({**recipe("classify"), "train": {"workers": 0}}))
    run(str(teacher), tmp_path / "teacher")
    sections["teacher"] = {"path": str(tmp_path / "teacher")}
    sections["optim"]["length"] = "3 steps"
    path = tmp_path / "student.yaml"
    path.write_text(to_yaml({**sections, "train": {"workers": 0, "log_every": "1 steps"}}))
    run(str(path), tmp_path / "whole")
    run(str(path), tmp_path / "stopped", stop_at=2)
    run(str(path), tmp_path / "stopped")
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")
    mine, theirs = tensors(tmp_path / "stopped"), tensors(tmp_path / "whole")
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    assert not any("teacher" in name for name in theirs)
    saved = from_yaml(tmp_path / "whole" / "config.yaml")["teacher"]
    assert saved["step"] == 2
    (tmp_path / "teacher").rename(tmp_path / "elsewhere")
    loaded = build.load_run(tmp_path / "whole")
    assert loaded.frozen == {}
    assert loaded.objective.logits(a_batch()).shape == (4, 3)


def test_our_runs_teacher_gives_the_logits_of_its_objective(recipe, sections, tmp_path):
    teacher = tmp_path / "teacher.yaml"
    teacher.write_text(to_yaml({**recipe("classify"), "train": {"workers": 0}}))
    run(str(teacher), tmp_path / "teacher")
    sections["teacher"] = {"path": str(tmp_path / "teacher")}
    sections["objective"]["num_classes"] = 3
    batch = a_batch()
    frozen_networks.write_targets(build.build(sections).frozen, batch)
    expected = build.load_run(tmp_path / "teacher").objective.logits(batch)
    assert torch.equal(batch["teacher_logits"], expected)


# ---- refusals ------------------------------------------------------------------------------------


def test_a_missing_teacher_is_refused(sections):
    del sections["teacher"]
    assert "objective.distill needs a teacher; add teacher: {path: RUN}" in refusal(sections)


def test_a_teacher_that_nobody_asks_is_refused(sections, weights):
    sections["objective"]["distill"] = None
    sections["teacher"] = {"encoder": {"name": "vit", **TINY["vit"]}, "init": "x", "image_size": 32}
    with pytest.raises(ConfigError, match="reads nothing of it; set objective"):
        build.build({**sections, "objective": {**sections["objective"], "num_classes": 3}}, load_frozen=False)


def test_a_teacher_of_other_classes_is_refused(sections):
    sections["objective"]["num_classes"] = 5
    assert "knows 3 classes, but objective.num_classes=5" in refusal(sections)


def test_a_run_without_a_head_is_no_teacher(recipe, sections, tmp_path):
    path = tmp_path / "mae.yaml"
    path.write_text(to_yaml({**recipe("mae"), "train": {"workers": 0}}))
    run(str(path), tmp_path / "mae")
    sections["teacher"] = {"path": str(tmp_path / "mae")}
    assert "trains MAE, which has no head that classifies" in refusal(sections)


def test_a_file_without_a_head_is_no_teacher(sections, tmp_path):
    save_file(timm.create_model(MODEL, num_classes=0).state_dict(), tmp_path / "body.safetensors")
    sections["teacher"]["init"] = str(tmp_path / "body.safetensors")
    assert "has no head that classifies (fc.weight" in refusal(sections)


def test_weights_of_another_model_are_refused(sections, tmp_path):
    save_file({"fc.weight": torch.zeros(3, 8), "stem": torch.zeros(2)}, tmp_path / "other.safetensors")
    sections["teacher"]["init"] = str(tmp_path / "other.safetensors")
    assert f"does not fit teacher.model={MODEL}" in refusal(sections)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init": None}, "needs its weights"),
        ({"pretrained": True}, "give one"),
        ({"init": "nowhere.pth"}, "is no file"),
        ({"model": "resnet_of_mine"}, "is not a timm model"),
        ({"temperature": 3}, "teacher.temperature is not a known key"),
    ],
)
def test_a_section_that_cannot_be_is_refused(sections, change, message):
    sections["teacher"] |= change
    assert message in refusal(sections)
