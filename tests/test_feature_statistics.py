"""Statistics of features: each against its formula in numpy, or planted features of a known answer."""

import math

import numpy as np
import pytest
import torch

from mim.health import feature_statistics as statistics


def gaussian(n, width, *, seed=0, scales=None):
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x if scales is None else x * scales


def planted(spectrum, n=200, *, seed=0):
    """Features (n, D), centred, of which the covariance has exactly these eigenvalues."""
    x = gaussian(n, len(spectrum), seed=seed)
    left, _, right = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)
    return left * (torch.as_tensor(spectrum, dtype=torch.float64) * (n - 1)).sqrt() @ right


def test_rankme_is_the_published_formula():
    x = gaussian(60, 20, scales=torch.arange(1.0, 21)).numpy() + 0.3
    sigma = np.linalg.svd(x, compute_uv=False)
    shares = sigma / sigma.sum() + 1e-7
    assert statistics.rankme(torch.from_numpy(x)) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-12)


def test_rankme_of_equal_directions_is_their_number():
    assert statistics.rankme(planted([1.0] * 12 + [0.0] * 20)) == pytest.approx(12, rel=1e-4)
    assert statistics.rankme(torch.ones(50, 8)) == pytest.approx(1, abs=1e-4)
    assert statistics.rankme(torch.zeros(50, 8)) == 1


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.3])
@pytest.mark.parametrize("width", [8, 40, 120])
def test_alpha_req_is_that_of_a_planted_power_law(alpha, width):
    spectrum = torch.arange(1, width + 1, dtype=torch.float64) ** -alpha
    assert statistics.alpha_req(planted(spectrum) + 5.0) == pytest.approx(alpha, rel=1e-6)


def test_alpha_req_of_a_noisy_spectrum_is_the_weighted_fit_of_the_published_code():
    x = gaussian(300, 64, scales=torch.linspace(0.1, 1.1, 64, dtype=torch.float64))
    values = np.linalg.eigvalsh(np.cov(x.numpy().T))[::-1]
    ranks = np.arange(10, 50)
    design = np.stack([-np.log(ranks + 1), np.ones(40)], axis=1)
    weight = 1 / (ranks + 1)[:, None]
    fit = np.linalg.solve(design.T @ (design * weight), (weight * design).T @ np.log(values[ranks]))
    assert statistics.alpha_req(x) == pytest.approx(fit[0], rel=1e-9)


def test_alpha_req_of_hardly_any_directions_is_none():
    assert statistics.alpha_req(planted([1.0, 1.0, 0.0, 0.0, 0.0, 0.0])) is None
    assert statistics.alpha_req(torch.ones(10, 6)) is None


def test_lidar_is_the_published_formula():
    """With an eigendecomposition of W^-1/2 B W^-1/2, as the paper writes it."""
    x = (gaussian(30, 1 * 6).unsqueeze(1) + 0.5 * gaussian(30 * 5, 6, seed=1).view(30, 5, 6)).numpy()
    means = x.mean(axis=1)
    between = np.cov(means.T)
    within = (x - means[:, None]).reshape(-1, 6)
    within = within.T @ within / (30 * 4) + 1e-4 * np.eye(6)
    values, vectors = np.linalg.eigh(within)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    spectrum = np.linalg.eigvalsh(root @ between @ root)
    shares = spectrum / spectrum.sum() + 1e-7
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert statistics.lidar(torch.from_numpy(x)) == pytest.approx(expected, rel=1e-9)


def test_lidar_counts_the_directions_in_which_images_differ_and_their_crops_do_not():
    images = torch.zeros(200, 1, 16, dtype=torch.float64)
    images[:, 0, :4] = planted([1.0] * 4)
    noise = torch.zeros(200, 8, 16, dtype=torch.float64)
    noise[..., 4:] = gaussian(200 * 8, 12, seed=2).view(200, 8, 12)
    found = statistics.lidar(images + noise - noise.mean(dim=1, keepdim=True))
    assert found == pytest.approx(4, rel=0.01)
    assert statistics.rankme((images + noise).flatten(0, 1)) > 10  # which cannot tell them apart


def test_uniformity_is_the_published_formula_in_any_pieces(monkeypatch):
    x = gaussian(40, 5)
    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    pairs = [np.exp(-2 * np.sum((unit[i] - unit[j]) ** 2)) for i in range(40) for j in range(i)]
    for rows in (1024, 7):
        monkeypatch.setattr(statistics, "ROWS", rows)
        assert statistics.uniformity(x) == pytest.approx(math.log(np.mean(pairs)), rel=1e-9)


def test_uniformity_of_one_point_is_zero_and_of_opposite_ones_known():
    assert statistics.uniformity(torch.ones(10, 4)) == pytest.approx(0, abs=1e-6)
    assert statistics.uniformity(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])) == pytest.approx(-8)


@pytest.mark.parametrize("widths", [(6, 9), (50, 6), (50, 60)])
def test_cka_is_the_published_formula_whether_images_or_dimensions_are_more(widths):
    one, other = gaussian(40, widths[0]), gaussian(40, widths[1], seed=3)
    other[:, :5] += one[:, :5]
    centre = np.eye(40) - 1 / 40
    k, m = (centre @ x.numpy() @ x.numpy().T @ centre for x in (one, other))
    expected = np.trace(k @ m) / math.sqrt(np.trace(k @ k) * np.trace(m @ m))  # HSIC over the roots of its own
    assert statistics.linear_cka(one, other) == pytest.approx(expected, rel=1e-9)


def test_cka_sees_neither_rotation_nor_scale_nor_an_offset():
    x = gaussian(30, 8)
    rotation = torch.linalg.qr(gaussian(8, 8, seed=4)).Q
    assert statistics.linear_cka(x, 3 * x @ rotation + 7) == pytest.approx(1)
    assert statistics.linear_cka(x, torch.ones(30, 4)) == 0
