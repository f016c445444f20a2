"""The closed-form probe: right on separable data, at chance on noise, and the solution of its equation."""

import pytest
import torch

from mim.evals import ridge
from mim.probing import features
from mim.probing.features import Split, ridge_accuracy

STRENGTHS = [1e-3, 1e-2, 1e-1, 1.0]


def clusters(num, classes=3, width=8, spread=0.1, seed=0):
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (num,), generator=generator)
    return Split(centres[labels] + spread * torch.randn(num, width, generator=generator), labels)


def noise(num, classes=4, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Split(torch.randn(num, width, generator=generator), torch.randint(classes, (num,), generator=generator))


def test_separable_classes_are_all_found():
    assert ridge_accuracy(clusters(300), clusters(100, seed=1), strengths=STRENGTHS) == 1.0


def test_noise_is_at_chance():
    assert ridge_accuracy(noise(2000), noise(2000, seed=1), strengths=STRENGTHS) == pytest.approx(0.25, abs=0.05)


def test_the_scale_and_offset_of_a_feature_do_not_matter():
    train, val = clusters(300, spread=0.8), clusters(200, spread=0.8, seed=1)
    scale, offset = torch.logspace(-3, 3, 8), torch.linspace(-50, 50, 8)
    other = [Split(s.features * scale + offset, s.labels) for s in (train, val)]
    plain = ridge_accuracy(train, val, strengths=[0.1])
    assert plain < 1.0
    assert ridge_accuracy(*other, strengths=[0.1]) == pytest.approx(plain, abs=0.01)


def test_the_fit_solves_its_equation():
    """The gradient of sum |xw - y|^2 + s n |w|^2 vanishes, with the bias outside the penalty."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(50, 6, generator=generator), torch.randint(3, (50,), generator=generator)
    weights = next(features._fits(x, labels, [0.3]))
    assert weights.shape == (7, 3)
    y = torch.nn.functional.one_hot(labels).double()
    residual = torch.cat([x, torch.ones(50, 1)], dim=1).double() @ weights - y
    gradient = x.double().T @ residual + 0.3 * 50 * weights[:-1]
    assert torch.allclose(gradient, torch.zeros(6, 3, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(residual.sum(dim=0), torch.zeros(3, dtype=torch.float64), atol=1e-9)


def test_a_huge_ridge_leaves_only_the_frequencies_of_the_classes():
    x, labels = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1] * 20)
    weights = next(features._fits(x, labels, [1e9]))
    assert weights[:-1].abs().max() < 1e-6
    assert weights[-1].tolist() == pytest.approx([1 / 3, 2 / 3], abs=1e-6)


def test_the_strength_is_chosen_on_the_training_split_alone(monkeypatch):
    asked = []
    accuracies = features._accuracies

    def recorded(train, val, strengths):
        asked.append((len(train.labels), len(val.labels), len(strengths)))
        return accuracies(train, val, strengths)

    monkeypatch.setattr(features, "_accuracies", recorded)
    ridge_accuracy(clusters(300), clusters(77, seed=1), strengths=[0.1, 1.0])
    assert asked == [(270, 30, 2), (300, 77, 1)]


def test_a_good_strength_is_found_where_many_features_are_noise():
    """Nearly as many features as samples: the weakest ridge fits the noise, a stronger one does not."""
    train, val = clusters(300, spread=1.0), clusters(400, spread=1.0, seed=1)
    padded = []
    for i, split in enumerate((train, val)):
        extra = torch.randn(len(split.labels), 250, generator=torch.Generator().manual_seed(10 + i))
        padded.append(Split(torch.cat([split.features, extra], dim=1), split.labels))
    chosen = ridge_accuracy(*padded, strengths=[1e-6, 1.0])
    weak, strong = (ridge_accuracy(*padded, strengths=[strength]) for strength in (1e-6, 1.0))
    assert chosen == strong > weak


def test_the_evaluation_beats_chance_on_pictures_of_other_colours(loaded_run):
    assert dict(ridge.run(loaded_run("mae"), ridge.Config()))["ridge"] > 0.9
