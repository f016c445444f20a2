"""Cross-entropy and accuracy of predicted codes, one of each per sample."""

import math

import pytest
import torch

from mim.code_loss import code_loss


def test_equal_logits_cost_the_log_of_the_number_of_codes():
    loss, _ = code_loss(torch.zeros(2, 3, 7), torch.randint(7, (2, 3)))
    assert loss.tolist() == pytest.approx([math.log(7)] * 2)


def test_loss_and_accuracy_are_means_over_the_positions_of_each_sample():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 3.0]]], requires_grad=True)
    loss, accuracy = code_loss(logits, torch.tensor([[1, 0], [1, 1]]))
    cost = [math.log(1 + math.exp(2)), math.log(2), math.log(1 + math.exp(-1)), math.log(1 + math.exp(-3))]
    assert loss.tolist() == pytest.approx([sum(cost[:2]) / 2, sum(cost[2:]) / 2])
    assert accuracy.tolist() == [0.5, 1.0]
    assert loss.requires_grad
    assert not accuracy.requires_grad


def test_half_precision_logits_are_summed_in_single_precision():
    logits = torch.zeros(1, 4, 8192, dtype=torch.bfloat16)
    loss, _ = code_loss(logits, torch.zeros(1, 4, dtype=torch.int64))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(8192), rel=1e-6)
