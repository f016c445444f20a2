"""Accuracy on held-out images: what torchmetrics says, whatever the batches, and classes matched by name."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy

from mim import build
from mim.config import ConfigError
from mim.contracts import LoadedRun
from mim.data import stream
from mim.data.make import make
from mim.evals import accuracy

CLASSES = 8
CPU = torch.device("cpu")


class Guess(nn.Module):
    """Logits at random, a fixed function of the image."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        self.head = nn.Linear(3 * 16 * 16, classes)

    def logits(self, batch):
        return 20 * self.head(batch["images"].flatten(1))


def folder_of(root, names, count):
    """Images of noise, `count` of the first class, one fewer of each further one."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for j in range(count - i):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / name / f"{j}.png")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Datasets of 8 classes, of other sizes: one to train, one held out."""
    root = tmp_path_factory.mktemp("data")
    names = [f"class{i}" for i in range(CLASSES)]
    for part, count in (("train", 8), ("val", 14)):
        make(folder_of(root / "images" / part, names, count), root / part, labels_from_folders=True, workers=1)
    return root


@pytest.fixture
def classifier(data, tmp_path):
    """`classifier(objective, val)`: a run of an objective that guesses."""

    def load(objective=None, val=data / "val"):
        sections = {
            "data": {"path": str(data / "train"), "val_path": str(val), "image_size": 16, "view": {"name": "crop"}},
            "encoder": {"name": "vit", "model": "vit_tiny_patch16_224", "width": 24, "depth": 1, "num_heads": 2,
                        "patch_size": 8},
            "mask": {"name": "random", "ratio": 0.5},
            "objective": {"name": "mae", "decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 2},
            "optim": {"batch_size": 8, "length": "2 steps", "warmup": "1 steps", "lr": 1e-3},
        }  # fmt: skip
        built = build.build(sections)
        torch.manual_seed(3)
        found = built.objective if objective == "mae" else objective or Guess()
        return LoadedRun(found, built.encoder, {}, built.views, built.sections, 0, tmp_path / "run")

    return load


def measured(loaded, **options):
    return dict(accuracy.run(loaded, accuracy.Config(**options)))


def seen(loaded):
    """Logits and labels of the held-out images."""
    _, val = build.open_data(loaded.config)
    (batch,) = stream.evaluate(val, view=loaded.views.evaluation, sizes=loaded.views.sizes, batch_size=1000)
    batch = stream.to_device(batch, CPU)
    return loaded.objective.logits(batch).detach(), batch["labels"]


def test_the_numbers_are_those_of_torchmetrics(classifier):
    loaded = classifier()
    logits, labels = seen(loaded)
    found = measured(loaded, batch_size=7)
    options = {"preds": logits, "target": labels, "num_classes": CLASSES}
    assert found["accuracy"] == pytest.approx(multiclass_accuracy(**options, average="micro").item(), abs=1e-6)
    assert found["top5"] == pytest.approx(multiclass_accuracy(**options, average="micro", top_k=5).item(), abs=1e-6)
    assert found["class_accuracy"] == pytest.approx(multiclass_accuracy(**options, average="macro").item(), abs=1e-6)
    assert found["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found["count"] == len(labels) == sum(range(14 - CLASSES + 1, 15))
    assert 0 < found["accuracy"] < found["top5"] < 1
    assert found["accuracy"] != found["class_accuracy"]


def test_each_class_has_a_number_of_its_own_where_it_is_asked_for(classifier):
    loaded = classifier()
    logits, labels = seen(loaded)
    found = measured(loaded, per_class=True)
    expected = multiclass_accuracy(logits, labels, num_classes=CLASSES, average="none").tolist()
    assert [found[f"class/class{i}"] for i in range(CLASSES)] == pytest.approx(expected, abs=1e-6)
    assert not any(name.startswith("class/") for name in measured(loaded))


def test_the_size_of_a_batch_changes_nothing_that_is_counted(classifier):
    loaded = classifier()
    first, *others = (measured(loaded, batch_size=size) for size in (3, 16, 500))
    for other in others:
        assert other.pop("loss") == pytest.approx(first["loss"], rel=1e-6)
        assert other == {name: value for name, value in first.items() if name != "loss"}


def test_a_held_out_dataset_that_numbers_its_classes_otherwise_is_matched_by_name(classifier, data, tmp_path):
    """Only two of the classes are held out, so their labels are 0 and 1 instead of 2 and 5."""
    for name in ("class2", "class5"):
        shutil.copytree(data / "images/val" / name, tmp_path / "images" / name)
    make(tmp_path / "images", tmp_path / "val", labels_from_folders=True, workers=1)
    whole, found = measured(classifier(), per_class=True), measured(classifier(val=tmp_path / "val"), per_class=True)
    assert [found[f"class/class{i}"] for i in (2, 5)] == [whole[f"class/class{i}"] for i in (2, 5)]
    assert found["class_accuracy"] == pytest.approx((whole["class/class2"] + whole["class/class5"]) / 2)


def test_a_class_that_was_never_trained_is_refused_by_name(classifier, tmp_path):
    make(folder_of(tmp_path / "images", ["class1", "zebra"], 3), tmp_path / "val", labels_from_folders=True, workers=1)
    with pytest.raises(ConfigError, match="has the class 'zebra', which is none of the 8 classes of"):
        measured(classifier(val=tmp_path / "val"))


def test_a_head_with_fewer_outputs_than_classes_is_refused(classifier):
    with pytest.raises(ConfigError, match=r"has 8 classes, but the head of .* has 6"):
        measured(classifier(Guess(classes=6)))


def test_with_few_classes_there_are_no_first_five(classifier, data, tmp_path):
    names = ["class0", "class1"]
    make(folder_of(tmp_path / "images", names, 4), tmp_path / "val", labels_from_folders=True, workers=1)
    assert "top5" not in measured(classifier(Guess(classes=5), val=tmp_path / "val"))


@pytest.mark.parametrize("hidden", ["labels", "weight"])
def test_images_without_a_label_and_rows_that_only_pad_are_not_counted(classifier, monkeypatch, hidden):
    loaded = classifier()
    logits, labels = seen(loaded)
    kept = torch.arange(len(labels)) % 3 > 0
    whole = stream.evaluate

    def some(*args, **options):
        for batch in whole(*args, **options):
            rows = torch.arange(len(batch["keys"])) % 3 > 0
            batch[hidden] = batch[hidden].where(rows, -1 if hidden == "labels" else 0)
            yield batch

    monkeypatch.setattr(stream, "evaluate", some)
    found = measured(loaded, batch_size=9)
    assert found["count"] == kept.sum()
    assert found["accuracy"] == pytest.approx((logits.argmax(dim=1) == labels)[kept].float().mean().item())
    assert found["loss"] == pytest.approx(nn.functional.cross_entropy(logits[kept], labels[kept]).item(), rel=1e-5)


def test_a_run_that_tells_no_classes_is_refused_with_what_to_do(classifier):
    with pytest.raises(ConfigError, match=r"is a run of mae, which tells no classes; fine-tune it first, with"):
        measured(classifier("mae"))
