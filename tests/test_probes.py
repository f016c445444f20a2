"""What probes share: labels are numbered, a part is set aside by the keys of the samples, accuracies are shares."""

import pytest
import torch

from mim.config import ConfigError
from mim.probing.bank import Bank
from mim.probing.probes import accuracies, choosing_part, ranks_in_class, samples


def a_bank(labels, name="train", width=3):
    """Features that tell the row."""
    x = torch.arange(len(labels)).float()[:, None].expand(-1, width).clone()
    return Bank([f"{name}.tar/{i}" for i in range(len(labels))], torch.tensor(labels), {"-1/mean": x})


def both(train, val=(0, 1)):
    return samples(a_bank(list(train)), a_bank(list(val), "val"), where="a test")


# ---- labels --------------------------------------------------------------------------------------


def test_samples_without_a_label_are_left_out_with_their_features_and_keys():
    train, _ = both([0, -1, 1, 0])
    assert train.labels.tolist() == [0, 1, 0]
    assert train.keys == ["train.tar/0", "train.tar/2", "train.tar/3"]
    assert train.features("-1/mean", torch.device("cpu"))[:, 0].tolist() == [0, 2, 3]


def test_classes_are_numbered_by_the_training_split_and_others_are_never_right():
    train, val = both([7, 3, 7, 3], [3, 5, 7, 9])
    assert train.labels.tolist() == [1, 0, 1, 0]
    assert val.labels.tolist() == [0, -1, 1, -1]
    assert train.num_classes == val.num_classes == 2


def test_a_part_keeps_features_labels_and_keys_together():
    train, _ = both([0, 1, -1, 1, 0])
    part = train.part(torch.tensor([3, 1]))
    assert part.keys == ["train.tar/4", "train.tar/1"]
    assert part.features("-1/mean", torch.device("cpu"))[:, 0].tolist() == [4, 1]
    assert part.labels.tolist() == [0, 1]
    assert train.part(train.labels == 1).keys == ["train.tar/1", "train.tar/3"]


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        ([-1, -1], [0, 1], "the training split has no labels, which a test cannot learn"),
        ([2, 2, -1], [0, 1], "the training split has one class alone"),
        ([0, 1], [-1, -1], "the held-out split has no labels"),
    ],
)
def test_labels_that_are_lacking_are_refused(train, val, message):
    with pytest.raises(ConfigError, match=message):
        both(train, val)


# ---- the part that chooses -----------------------------------------------------------------------


def test_the_choosing_part_is_a_share_of_every_class():
    train, _ = both([0] * 50 + [1] * 20 + [2])
    which = choosing_part(train, ratio=0.1, seed=0)
    assert [int((which & (train.labels == c)).sum()) for c in range(3)] == [5, 2, 0]


def test_the_choosing_part_depends_on_keys_and_seed_and_not_on_the_order_of_the_rows():
    train, _ = both([0, 1] * 40)
    chosen = {train.keys[i] for i in choosing_part(train, ratio=0.2, seed=0).nonzero().flatten()}
    shuffled = train.part(torch.randperm(80, generator=torch.Generator().manual_seed(0)))
    again = {shuffled.keys[i] for i in choosing_part(shuffled, ratio=0.2, seed=0).nonzero().flatten()}
    assert chosen == again
    other = {train.keys[i] for i in choosing_part(train, ratio=0.2, seed=1).nonzero().flatten()}
    assert chosen != other


def test_places_in_a_class_count_from_zero():
    train, _ = both([0, 1, 1, 0, 0])
    places = ranks_in_class(train, "anything")
    assert sorted(places[train.labels == 0].tolist()) == [0, 1, 2]
    assert sorted(places[train.labels == 1].tolist()) == [0, 1]


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5])
def test_a_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(ConfigError, match=f"choice_ratio={ratio} must lie between 0 and 1"):
        choosing_part(both([0, 1] * 4)[0], ratio=ratio, seed=0)


def test_nothing_to_choose_by_is_refused():
    with pytest.raises(ConfigError, match="every class of the training split has a single sample"):
        choosing_part(both([0, 1, 2])[0], ratio=0.1, seed=0)


# ---- accuracies ----------------------------------------------------------------------------------


def test_accuracies_count_the_label_among_the_k_best():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [0.0, 0.0, 1.0]])
    labels = torch.tensor([0, 1, 1, -1])
    assert float(accuracies(logits, labels)) == 0.25
    assert float(accuracies(logits, labels, k=2)) == 0.5
    assert float(accuracies(logits, labels, k=5)) == 0.75
    assert accuracies(logits.expand(2, 3, 4, 3), labels).shape == (2, 3)
