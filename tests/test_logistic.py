"""Logistic regression: the solution of scikit-learn, whatever block of rows is summed at once."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from mim.probing import logistic
from mim.probing.logistic import fit, scale_of


def digits():
    """Features (1797, 64) and labels in a fixed shuffle."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return torch.from_numpy(found.data[order]), torch.from_numpy(found.target[order]).long()


def noise(n=60, width=5, classes=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, width, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (n,), generator=generator)


@pytest.mark.parametrize("c", [1e-3, 1e-1, 1.0])
def test_the_solution_is_that_of_scikit_learn(c):
    x, labels = digits()
    scale = scale_of(x[:1200])
    x = scale(x)
    ours = fit(x[:1200], labels[:1200], c=c, num_classes=10, tolerance=1e-8)
    theirs = LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(x[:1200].numpy(), labels[:1200].numpy())
    assert ours.converged
    assert np.abs(ours.weights.numpy() - theirs.coef_).max() < 2e-3 * np.abs(theirs.coef_).max()
    bias = ours.bias - ours.bias.mean()  # a constant over the classes changes nothing, and nothing decides it
    assert np.abs(bias.numpy() - theirs.intercept_ + theirs.intercept_.mean()).max() < 2e-3
    accuracy = (ours(x[1200:]).argmax(dim=1) == labels[1200:]).double().mean().item()
    assert accuracy == pytest.approx(theirs.score(x[1200:].numpy(), labels[1200:].numpy()), abs=1e-3)


def test_the_gradient_is_that_of_the_loss():
    x, labels = noise()
    weights = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    expected = F.cross_entropy(x @ weights.T + bias, labels)
    expected.backward()
    loss, by_weights, by_bias = logistic._loss_and_gradient(x, labels, weights.detach(), bias.detach())
    assert torch.allclose(loss, expected.detach())
    assert torch.allclose(by_weights, weights.grad)
    assert torch.allclose(by_bias, bias.grad)


def test_blocks_of_rows_add_up_to_the_whole(monkeypatch):
    x, labels = noise()
    whole = fit(x, labels, c=1.0, num_classes=3, tolerance=1e-8)
    monkeypatch.setattr(logistic, "LOGITS_AT_ONCE", 21)  # 7 rows of 3 classes
    assert torch.allclose(fit(x, labels, c=1.0, num_classes=3, tolerance=1e-8).weights, whole.weights, atol=1e-5)


def test_a_solution_to_begin_from_changes_the_way_but_not_the_end():
    x, labels = noise()
    cold = fit(x, labels, c=1.0, num_classes=3, tolerance=1e-8)
    warm = fit(x, labels, c=1.0, num_classes=3, tolerance=1e-8, start=fit(x, labels, c=0.01, num_classes=3))
    assert torch.allclose(warm.weights, cold.weights, atol=1e-4)


def test_a_fit_that_was_cut_short_says_so():
    x, labels = digits()
    assert not fit(scale_of(x)(x), labels, c=1.0, num_classes=10, max_steps=2).converged


def test_a_strong_penalty_leaves_the_frequencies_of_the_classes():
    x, _ = noise()
    found = fit(x, torch.tensor([0, 1, 1] * 20), c=1e-9, num_classes=2)
    assert found.weights.abs().max() < 1e-6
    assert found.bias.softmax(dim=0).tolist() == pytest.approx([1 / 3, 2 / 3], abs=1e-4)


def test_a_fit_works_where_no_gradients_are_kept():
    x, labels = noise()
    with torch.no_grad():
        assert fit(x, labels, c=1.0, num_classes=3).converged


def test_a_constant_feature_is_harmless():
    x, labels = noise()
    x[:, 2] = 1e6
    scaled = scale_of(x)(x)
    assert torch.equal(scaled[:, 2], torch.zeros(len(x), dtype=torch.float64))
    assert torch.allclose(scaled[:, :2].std(dim=0, correction=0), torch.ones(2, dtype=torch.float64))
    assert fit(scaled, labels, c=1.0, num_classes=3).converged
