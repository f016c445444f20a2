"""Nearest neighbours: right on separable data, at chance on noise, and votes weighed as published."""

import math

import pytest
import torch

from mim.evals import knn
from mim.evals.knn import knn_accuracy
from mim.features import Split


def clusters(num, classes=4, width=16, spread=0.1, seed=0):
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % classes
    return Split(centres[labels] + spread * torch.randn(num, width, generator=generator), labels)


def noise(num, classes=4, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Split(torch.randn(num, width, generator=generator), torch.randint(classes, (num,), generator=generator))


def accuracy(bank, queries, k=5, temperature=0.07):
    return knn_accuracy(bank, queries, k=k, temperature=temperature)


def test_separable_classes_are_all_found():
    assert accuracy(clusters(200), clusters(100, seed=1)) == 1.0


def test_noise_is_at_chance():
    assert accuracy(noise(2000), noise(2000, seed=1)) == pytest.approx(0.25, abs=0.05)


def test_the_bank_finds_itself():
    bank = noise(50)
    assert accuracy(bank, bank, k=1) == 1.0


def test_a_bank_smaller_than_k_votes_as_a_whole():
    assert accuracy(clusters(8), clusters(40, seed=1), k=100) == 1.0


def test_queries_beyond_one_block_are_counted():
    bank, queries = clusters(40), clusters(1200, seed=1)
    queries.labels[600:] = (queries.labels[600:] + 1) % 4
    assert accuracy(bank, queries) == 0.5


def test_neighbours_are_those_of_the_smallest_angle_and_not_of_the_smallest_distance():
    """A long vector of the right direction beats a near one of the wrong direction."""
    directions = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    bank = Split(
        torch.cat([20 * directions, directions.roll(1, 0) * 0.0 + 0.5 * directions]), torch.arange(4).repeat(2)
    )
    queries = Split(torch.tensor([[0.3, 0.1], [-0.3, 0.1], [0.1, 0.3], [0.1, -0.3]]), torch.arange(4))
    assert accuracy(bank, queries, k=1) == 1.0


def test_a_large_common_offset_does_not_matter():
    bank, queries = clusters(200), clusters(100, seed=1)
    shifted = [Split(s.features + 100.0, s.labels) for s in (bank, queries)]
    assert accuracy(*shifted) == 1.0


def test_a_vote_weighs_exp_of_similarity_over_temperature():
    """One neighbour of class 0 at similarity 0.9 against two of class 1 at 0.8, by hand."""
    labels = torch.tensor([[0, 1, 1]])
    similarity = torch.tensor([[0.9, 0.8, 0.8]])
    votes = knn._vote(labels, (similarity / 0.1).exp(), 2)
    assert votes[0].tolist() == pytest.approx([math.exp(9), 2 * math.exp(8)], rel=1e-5)
    assert votes.argmax() == 0  # e > 2
    assert knn._vote(labels, (similarity / 0.2).exp(), 2).argmax() == 1  # sqrt(e) < 2


def test_the_temperature_decides_between_one_near_and_two_far_neighbours():
    angles = torch.tensor([0.0, 0.7, 0.7, 3.0, 3.4, 1.6, -1.6])
    bank = Split(torch.stack([angles.cos(), angles.sin()], dim=1), torch.tensor([0, 1, 1, 2, 2, 3, 3]))
    features = (bank.features - bank.features.mean(0)) / bank.features.std(0)
    query = bank.features[:1] * 1.0
    similarity = torch.nn.functional.cosine_similarity(features[:1], features)
    near, far = similarity[0].item(), similarity[1].item()
    flips_at = (near - far) / math.log(2)  # exp(near / t) = 2 exp(far / t)
    for temperature, right in ((0.8 * flips_at, 1.0), (1.2 * flips_at, 0.0)):
        assert accuracy(bank, Split(query, torch.tensor([0])), k=3, temperature=temperature) == right


def test_the_evaluation_beats_chance_on_pictures_of_other_colours(loaded_run):
    """An untrained encoder tells red from green from blue stripes."""
    assert dict(knn.run(loaded_run("mae"), knn.Config(k=5)))["knn"] > 0.9
