"""mIoU: torchmetrics' numbers, windows that cover the image, label maps at their own size, and a picture."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mim.config import ConfigError
from mim.contracts import IGNORE
from mim.data.label_map import colours
from mim.data.shards import Dataset
from mim.data.stream import evaluate, to_device
from mim.evals import miou
from mim.evals.miou import Config, confusion, means, run, slide, starts, table


def two_maps(absent=()):
    """A prediction that is right half of the time, and a truth with ignored pixels; `absent` classes are in neither."""
    generator = torch.Generator().manual_seed(0)
    truth, other = torch.randint(7, (2, 4, 9, 11), generator=generator)
    pred = torch.where(torch.rand(truth.shape, generator=generator) < 0.5, truth, other)
    for label in absent:
        truth[truth == label], pred[pred == label] = 0, 1
    truth[torch.rand(truth.shape, generator=generator) < 0.2] = IGNORE
    return pred, truth


@pytest.mark.parametrize("absent", [(), (3,), (0, 3, 6)])
def test_the_numbers_are_those_of_torchmetrics(absent):
    classification = pytest.importorskip("torchmetrics.classification")
    pred, truth = two_maps(absent)
    counts = confusion(pred, truth, 7)
    theirs = classification.MulticlassConfusionMatrix(7, ignore_index=IGNORE)(pred, truth)
    assert torch.equal(counts, theirs)
    found = means(counts)
    options = {"num_classes": 7, "ignore_index": IGNORE}
    assert found["miou"] == pytest.approx(classification.MulticlassJaccardIndex(**options)(pred, truth).item())
    for name, average in (("mean_accuracy", "macro"), ("pixel_accuracy", "micro")):
        accuracy = classification.MulticlassAccuracy(average=average, **options)(pred, truth)
        assert found[name] == pytest.approx(accuracy.item()), name


def test_a_class_that_is_only_predicted_counts_as_wrong_and_one_that_is_nowhere_not_at_all():
    counts = torch.tensor([[8, 2, 0, 0], [0, 10, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert means(counts)["miou"] == pytest.approx((8 / 10 + 10 / 12) / 2)
    counts[0, 2] = 2
    assert means(counts)["miou"] == pytest.approx((8 / 12 + 10 / 12 + 0) / 3)
    assert means(counts)["mean_accuracy"] == pytest.approx((8 / 12 + 10 / 10) / 2)


def test_counts_of_parts_add_up_to_those_of_the_whole():
    pred, truth = two_maps()
    parts = [confusion(a, b, 7) for a, b in zip(pred.split(3), truth.split(3), strict=True)]
    assert torch.equal(sum(parts), confusion(pred, truth, 7))
    assert sum(parts).dtype == torch.int64


def test_the_table_shows_the_largest_classes_first_and_says_what_it_leaves_out():
    counts = torch.diag(torch.arange(30))
    counts[1, 2] = 1
    lines = table(counts, [f"class{i}" for i in range(30)])
    assert lines[1].split() == ["class29", f"{29 / 436:.1%}", "100.0%", "100.0%"]
    assert len(lines) == 1 + miou.TABLE + 2
    assert lines[-2:] == ["and 9 rarer classes", "1 classes are neither in the truth nor predicted"]


# ---- windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("whole", "expected"), [(512, [0]), (513, [0, 1]), (853, [0, 341]), (854, [0, 341, 342])])
def test_windows_begin_where_mmsegmentation_s_do(whole, expected):
    assert starts(whole, 512, 341) == expected


class Local(nn.Module):
    """Scores of a pixel from its own value alone, and a constant that tells the window's left border."""

    num_classes = 2

    def score_pixels(self, images):
        return torch.cat([images, torch.ones_like(images) * images.shape[3]], dim=1)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_windows_give_every_pixel_the_score_of_its_own_place(batch_size):
    images = torch.rand(2, 1, 20, 27)
    scores = slide(Local(), images, window=(8, 10), overlap=1 / 3, batch_size=batch_size)
    assert torch.allclose(scores[:, :1], images, atol=1e-6)
    assert torch.allclose(scores[:, 1:], torch.full_like(images, 10))


def test_what_several_windows_see_is_the_mean_of_their_scores():
    class Counting(Local):
        def score_pixels(self, images):
            self.calls = getattr(self, "calls", 0) + 1
            return torch.full((len(images), 2, *images.shape[2:]), float(self.calls))

    scores = slide(Counting(), torch.zeros(1, 1, 4, 6), window=(4, 4), overlap=0.5, batch_size=1)
    assert scores[0, 0, 0].tolist() == [1, 1, 1.5, 1.5, 2, 2]


# ---- a run ---------------------------------------------------------------------------------------


@pytest.fixture
def loaded(loaded_run):
    return loaded_run("segment")


class Oracle(nn.Module):
    """Knows the label maps of the images it is shown, by their pixels."""

    num_classes = 5
    reads = ("images", "label_maps")

    def __init__(self, loaded, dataset):
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(1))
        self.truth = {}
        for batch in evaluate(
            dataset, view=loaded.views.evaluation, sizes=loaded.views.sizes, batch_size=4, label_maps=True
        ):
            batch = to_device(batch, torch.device("cpu"))
            self.truth |= {
                image.numpy().tobytes(): truth
                for image, truth in zip(batch["images"], batch["label_maps"], strict=True)
            }

    def score_pixels(self, images):
        truth = torch.stack([self.truth[image.numpy().tobytes()] for image in images])
        truth = torch.where(truth == IGNORE, 0, truth)
        return nn.functional.one_hot(truth, 5).permute(0, 3, 1, 2).float()


def test_who_knows_the_truth_gets_everything_and_the_baseline_does_not(loaded, drawn_shapes):
    loaded.objective = Oracle(loaded, Dataset.open(drawn_shapes / "val"))
    found = dict(run(loaded, Config(batch_size=3)))
    assert found["miou"] == found["mean_accuracy"] == found["pixel_accuracy"] == 1.0
    assert 0 < found["miou_majority"] < 0.25  # of five classes
    assert {value for key, value in found.items() if key.startswith("iou/")} == {1.0}
    errors = np.asarray(found["segmentation"])[:, -130:]
    assert not (errors == [255, 38, 38]).all(axis=2).any()  # nothing is wrong


def test_the_baseline_is_the_best_that_one_class_can_have(loaded, drawn_shapes):
    counts = np.zeros(256, int)
    held_out = Dataset.open(drawn_shapes / "val")
    for batch in evaluate(
        held_out, view=loaded.views.evaluation, sizes=loaded.views.sizes, batch_size=9, label_maps=True
    ):
        counts += np.bincount(batch["label_maps"].flatten(), minlength=256)
    labelled = counts[:IGNORE]
    expected = labelled.max() / labelled.sum() / (labelled > 0).sum()
    assert dict(run(loaded, Config(num_images=0)))["miou_majority"] == pytest.approx(expected)


def test_the_size_of_batches_changes_nothing(loaded):
    one, other = (dict(run(loaded, Config(batch_size=size, num_images=0))) for size in (1, 5))
    assert one.keys() == other.keys()
    assert all(one[key] == pytest.approx(other[key], abs=1e-6) for key in one)


def test_sliding_judges_label_maps_as_they_are_stored(loaded, drawn_shapes):
    seen = []
    original = loaded.objective.score_pixels
    loaded.objective.score_pixels = lambda images: (seen.append(tuple(images.shape)), original(images))[1]
    whole = dict(run(loaded, Config(num_images=0)))
    assert {shape[2:] for shape in seen} == {(32, 32)}
    seen.clear()
    slid = dict(run(loaded, Config(slide=True, short=40, batch_size=4, num_images=0, limit=3)))
    assert {shape[2:] for shape in seen} == {(32, 32)}  # windows of images of 40 x 48 pixels
    assert sum(shape[0] for shape in seen) == 3 * 2 * 2
    assert slid.keys() <= whole.keys()


def test_the_picture_has_a_row_for_each_image_and_the_palette_s_colours(loaded, drawn_shapes):
    found = dict(run(loaded, Config(num_images=3, height=32)))["segmentation"]
    assert isinstance(found, Image.Image)
    assert found.size == (4 * 36, 3 * 36)
    truth = np.asarray(found)[2:34, 38:70].reshape(-1, 3)
    known = {tuple(colour) for colour in colours().tolist()}
    assert {tuple(pixel) for pixel in truth.tolist()} <= known


def test_a_run_of_another_objective_is_refused_in_one_sentence(loaded_run):
    with pytest.raises(ConfigError, match="is a run of mae, which predicts no label maps; miou needs one of segment"):
        dict(run(loaded_run("mae"), Config()))


def test_without_a_held_out_split_it_says_how_to_get_one(loaded, drawn_shapes):
    loaded.config["data"]["path"] = str(drawn_shapes / "train")
    with pytest.raises(ConfigError, match=r"there is no held-out split; give data\.val_path, or make shards with"):
        dict(run(loaded, Config()))
