"""The change of a step is read from the state of AdamW as it was."""

import pytest
import torch
from torch import nn

from mim.movement import update_ratio


def test_the_ratio_is_that_of_the_true_change_in_every_step():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    network[0].bias.data.fill_(100.0)  # which is no matrix, and would drown the rest
    groups = [{"params": network[0].parameters(), "weight_decay": 0.3}, {"params": network[2].parameters(), "lr": 3e-3}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True)
    matrices = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    for _ in range(5):
        before = [parameter.detach().clone() for parameter in matrices]
        optimizer.zero_grad()
        network(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        change = sum(float((new - old).square().sum()) for new, old in zip(matrices, before, strict=True))
        expected = (change / sum(float(old.square().sum()) for old in before)) ** 0.5
        assert update_ratio(optimizer) == pytest.approx(expected, rel=1e-4)


def test_before_the_first_step_nothing_has_moved():
    assert update_ratio(torch.optim.AdamW(nn.Linear(3, 3).parameters())) == 0
