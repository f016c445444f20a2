"""What heads and units do, on attention and units of a known answer."""

import math

import pytest
import torch
from torch import nn

from mim.health import activity


def looks(weights, grid=(2, 3), patch_size=8):
    return activity.looks(weights, grid, patch_size)[0]


def test_a_head_that_looks_everywhere_alike_has_the_largest_entropy_and_the_mean_distance():
    found = looks(torch.full((1, 2, 7, 7), 1 / 7))
    places = [(row, column) for row in range(2) for column in range(3)]
    mean = sum(math.dist(a, b) for a in places for b in places) / 36 * 8
    assert found.tolist() == [[pytest.approx(1), pytest.approx(mean, rel=1e-6)]] * 2


def test_a_head_that_looks_at_the_right_neighbour_has_no_entropy_and_a_distance_of_one_patch():
    """The last of a row looks at its left neighbour; there is one prefix token, which looks at itself."""
    weights = torch.zeros(1, 1, 7, 7)
    for query, key in enumerate([0, 2, 3, 2, 5, 6, 5]):
        weights[0, 0, query, key] = 1
    assert looks(weights).tolist() == [[0, pytest.approx(8)]]


def test_half_of_the_mass_on_each_of_two_tokens_is_ln_2():
    weights = torch.zeros(1, 1, 4, 4)
    weights[..., :2] = 0.5
    assert looks(weights, (2, 2))[0, 0] == pytest.approx(math.log(2) / math.log(4))


class Mlp(nn.Module):
    """Two units that never fire, one that fires for the second image alone, one that always does."""

    def __init__(self, convolution=False):
        super().__init__()
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(4, 4, 1) if convolution else nn.Linear(4, 4)

    def forward(self, x):
        return self.fc2(self.act(x))


@pytest.mark.parametrize("convolution", [False, True])
def test_units_are_counted_in_the_images_where_they_are_positive_at_some_place(convolution):
    x = torch.full((2, 3, 4, 4), -1.0)  # (B, h, w, units)
    x[1, 2, 3, 2] = 1
    x[:, 0, 0, 3] = 1
    network = nn.Sequential(Mlp(convolution))
    with activity.fired(network) as fired:
        for rows in x.split(1):
            network(rows.permute(0, 3, 1, 2) if convolution else rows)
    assert {name: counts.tolist() for name, counts in fired.items()} == {"0.fc2": [0, 0, 1, 2]}
    network(torch.ones(1, 4, 2, 2) if convolution else torch.ones(1, 2, 4))
    assert fired["0.fc2"].tolist() == [0, 0, 1, 2]  # nothing watches any more


def test_gammas_are_the_mean_magnitudes_of_each_block(loaded_run):
    encoder = loaded_run("mae", layer_scale=0.1).encoder
    encoder.vit.blocks[1].ls1.gamma.data.fill_(-0.3)
    assert activity.gammas(encoder) == {1: pytest.approx(0.1), 2: pytest.approx(0.2)}
    assert activity.gammas(loaded_run("mae").encoder) == {}
