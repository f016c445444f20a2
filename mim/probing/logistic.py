"""Multinomial logistic regression by L-BFGS: the linear probe that has one number to choose and one solution.

Minimises C * sum of cross-entropies + |W|^2 / 2, bias unpenalised: the very problem of scikit-learn's
`LogisticRegression(C=C)`, which the tests compare it with, here on whatever device the features are on. DINOv2 (Oquab
et al. 2023, arXiv 2304.07193, section 7.1 and their log_regression.py) and CLIP (Radford et al. 2021, arXiv
2103.00020, appendix A.3) judge frozen features so. Everything is float64: the features take n * D * 8 bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS_AT_ONCE = 2**25  # numbers, 256 MiB


class Scale(NamedTuple):
    """What standardises features: their mean and std (D,) over the samples of a fit."""

    mean: Tensor
    std: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return (x.double() - self.mean) / self.std


class Classifier(NamedTuple):
    """A fitted linear classifier: weights (classes, D), bias (classes,), float64."""

    weights: Tensor
    bias: Tensor
    converged: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weights.T + self.bias  # (n, classes)


def scale_of(x: Tensor) -> Scale:
    """Mean and std of features (n, D) in float64; a constant feature has std 1, so that it becomes 0."""
    std, mean = torch.std_mean(x.double(), dim=0, correction=0)
    return Scale(mean, torch.where(std > 1e-12 * (mean.abs() + 1), std, 1.0))


def fit(
    x: Tensor,
    labels: Tensor,
    *,
    c: float,
    num_classes: int,
    start: Classifier | None = None,
    max_steps: int = 1000,
    tolerance: float = 1e-5,
) -> Classifier:
    """Fit features (n, D) to labels (n,); `c` is scikit-learn's C, `start` a solution to begin from.

    Stops when no entry of the gradient of the mean over the samples is above `tolerance`; `converged` tells whether it
    came so far within `max_steps`.
    """
    x = x.double()
    n, width = x.shape
    weights = x.new_zeros(num_classes, width) if start is None else start.weights.clone()
    bias = x.new_zeros(num_classes) if start is None else start.bias.clone()
    penalty = 1 / (c * n)
    optimizer = torch.optim.LBFGS(
        [weights, bias],
        max_iter=max_steps,
        max_eval=2 * max_steps,
        tolerance_grad=tolerance,
        tolerance_change=1e-15,  # the gradient decides
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        loss, weights.grad, bias.grad = _loss_and_gradient(x, labels, weights, bias)
        weights.grad += penalty * weights
        return loss + penalty / 2 * weights.square().sum()

    optimizer.step(closure)
    closure()  # the line search may have ended elsewhere
    assert weights.grad is not None
    assert bias.grad is not None
    steepest = max(float(weights.grad.abs().max()), float(bias.grad.abs().max()))
    return Classifier(weights, bias, steepest <= 10 * tolerance)


def _loss_and_gradient(x: Tensor, labels: Tensor, weights: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy (0-d) and its gradients, a block of rows at a time.

    Samples come last: a softmax over few classes is slow along the last dimension.
    """
    n, num_classes = len(x), len(bias)
    loss, by_weights, by_bias = x.new_zeros(()), torch.zeros_like(weights), torch.zeros_like(bias)
    for rows, y in zip(x.split(block := max(1, LOGITS_AT_ONCE // num_classes)), labels.split(block), strict=True):
        log_probs = F.log_softmax(weights @ rows.T + bias[:, None], dim=0)  # (classes, b)
        loss -= log_probs.gather(0, y[None]).sum() / n
        errors = log_probs.exp_()
        errors.scatter_add_(0, y[None], -errors.new_ones(1, len(y)))  # probabilities minus the truth
        by_weights += errors @ rows / n
        by_bias += errors.sum(dim=1) / n
    return loss, by_weights, by_bias
