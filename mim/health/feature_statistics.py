"""What a set of features is like, without labels: how many directions they use, and how they spread.

    RankMe       Garrido et al. 2023, "RankMe", arXiv 2210.02885, equation 1
    alpha-ReQ    Agrawal et al. 2022, "alpha-ReQ", NeurIPS, section 3; the fit is that of its published code
    LiDAR        Thilak et al. 2023, "LiDAR", arXiv 2312.04000, section 3.2
    uniformity   Wang & Isola 2020, arXiv 2005.10242, section 4.1.2, with t = 2
    CKA          Kornblith et al. 2019, arXiv 1905.00414, section 3, linear

All compute in float64. RankMe and uniformity look at the features as they are, as published; the others at deviations
from the mean. CKA is the published, biased one: with fewer images than dimensions it is too large.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-7  # added to each share of a spectrum (RankMe, LiDAR)
RIDGE = 1e-4  # added to the scatter within an image (LiDAR)
FITTED = 10, 50  # eigenvalues beyond the first ten, up to the fiftieth, are those of alpha-ReQ's power law
NEGLIGIBLE = 1e-10  # eigenvalues below this share of the largest are rounding
ROWS = 1024  # of a piece of all pairs


def effective_rank(spectrum: Tensor) -> float:
    """Exp of the entropy of the shares of a spectrum (k,) of values >= 0: from 1 to k; of nothing but zeros 1."""
    total = spectrum.sum()
    if total <= 0:
        return 1.0
    shares = spectrum / total + EPSILON
    return float((-(shares * shares.log()).sum()).exp())


def rankme(features: Tensor) -> float:
    """RankMe of features (n, D): the effective rank of their singular values, at most min(n, D)."""
    return effective_rank(torch.linalg.svdvals(features.double()))


def eigenvalues(features: Tensor) -> Tensor:
    """Of the covariance of features (n, D), descending, without those that are rounding."""
    x = features.double()
    found = torch.linalg.svdvals(x - x.mean(dim=0)).square() / max(len(x) - 1, 1)
    return found[found > NEGLIGIBLE * found[0]]


def alpha_req(features: Tensor) -> float | None:
    """The alpha of eigenvalues that decay as i^-alpha; None where fewer than 5 of the covariance are not zero.

    Least squares of logarithms with the weight 1/i, over `FITTED`; of a shorter spectrum over its last four fifths.
    """
    values = eigenvalues(features)
    if len(values) < 5:
        return None
    first, last = min(FITTED[0], len(values) // 5), min(FITTED[1], len(values))
    i = torch.arange(first + 1, last + 1, dtype=torch.float64, device=values.device)
    x, y, weight = i.log(), values[first:last].log(), 1 / i
    x, y = x - (weight * x).sum() / weight.sum(), y - (weight * y).sum() / weight.sum()
    return float(-(weight * x * y).sum() / (weight * x * x).sum())


def lidar(features: Tensor) -> float:
    """LiDAR of features (n, q, D) of q views of each of n images: at most min(n - 1, D)."""
    x = features.double()
    n, q, width = x.shape
    means = x.mean(dim=1)  # (n, D)
    between = means - means.mean(dim=0)
    within = (x - means.unsqueeze(1)).flatten(0, 1)  # (n q, D)
    scatter = within.T @ within / max(n * (q - 1), 1) + RIDGE * torch.eye(width, dtype=x.dtype, device=x.device)
    # The eigenvalues of W^-1/2 B W^-1/2 are those of L^-1 B L^-T with W = L L^T.
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(scatter), between.T, upper=False)  # (D, n)
    return effective_rank(torch.linalg.svdvals(whitened).square() / max(n - 1, 1))


def uniformity(features: Tensor) -> float:
    """Log of the mean of exp(-2 d^2) over all pairs of n >= 2 directions of features (n, D): from about -4 to 0."""
    x = F.normalize(features.double(), dim=1)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for start in range(0, len(x), ROWS):
        distances = torch.cdist(x[start : start + ROWS], x)  # (b, n)
        total += (-2 * distances.square()).exp().sum()
    pairs = len(x) * (len(x) - 1)
    return float(((total - len(x)) / pairs).log())  # less the pairs of a row with itself


def linear_cka(one: Tensor, other: Tensor) -> float:
    """Linear CKA of two features (n, D), (n, D') of the same n images, from 0 to 1; 0 where one of them is constant."""
    x, y = (features.double() - features.double().mean(dim=0) for features in (one, other))
    if min(x.shape[1], y.shape[1]) > len(x):  # the same numbers from the products of images
        xx, yy = x @ x.T, y @ y.T
        cross, norms = (xx * yy).sum(), xx.norm() * yy.norm()
    else:
        cross, norms = (y.T @ x).square().sum(), (x.T @ x).norm() * (y.T @ y).norm()
    return float(cross / norms) if norms > 0 else 0.0


def spread(features: Tensor) -> Tensor:
    """Standard deviation of each dimension of features (n, D) over the images: (D,)."""
    return features.double().std(dim=0)
