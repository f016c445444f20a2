"""Nearest neighbours: right on separable data, at chance on noise, and votes weighed as published."""

import math

import pytest
import torch
import torch.nn.functional as F

from mim.config import ConfigError
from mim.evals import knn
from mim.evals.knn import knn_accuracy
from mim.probing.features import Split


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


# ---- one search for every k ----------------------------------------------------------------------


def brute_force(bank, queries, k, temperature=0.07):
    """All cosines at once, in float64, and a full sort."""
    mean, std = bank.features.double().mean(0), bank.features.double().std(0) + 1e-6
    keys, points = (F.normalize((s.features.double() - mean) / std, dim=1) for s in (bank, queries))
    similarity, order = (points @ keys.T).sort(dim=1, descending=True, stable=True)
    weights = (similarity[:, :k] / temperature).exp()
    votes = torch.zeros(len(points), 4, dtype=torch.float64).scatter_add_(1, bank.labels[order[:, :k]], weights)
    return (votes.argmax(1) == queries.labels).double().mean().item()


def test_every_k_of_one_search_equals_a_computation_by_brute_force(monkeypatch):
    """On overlapping clusters, so that every k has another answer, with pieces that divide nothing evenly."""
    monkeypatch.setattr(knn, "BANK_ROWS", 77)
    monkeypatch.setattr(knn, "QUERY_ROWS", 31)
    bank, queries = clusters(500, spread=1.6), clusters(203, spread=1.6, seed=1)
    ks = [1, 5, 20, 100, 500]
    found = knn.knn_accuracies(bank, queries, ks=ks, temperature=0.07, device=torch.device("cpu"))
    assert found == [brute_force(bank, queries, k) for k in ks]
    assert len(set(found)) > 2


def test_neighbours_are_those_of_a_full_sort_and_of_equal_ones_the_first(monkeypatch):
    """Every row of the bank comes three times, in different pieces."""
    monkeypatch.setattr(knn, "BANK_ROWS", 16)
    once = noise(20)
    bank = Split(once.features.repeat(3, 1), once.labels.repeat(3))
    queries = noise(7, seed=1)
    ((similarity, ids),) = knn.neighbours(bank, queries, range(0, 7, 512), 60, torch.device("cpu"))
    mean, std = bank.features.mean(0), bank.features.std(0) + 1e-6
    keys, points = (F.normalize((x - mean) / std, dim=1) for x in (bank.features, queries.features))
    expected = (points @ keys.T).sort(dim=1, descending=True, stable=True)
    assert torch.allclose(similarity, expected.values, atol=1e-6)
    assert (similarity < 0).any()
    assert (ids.view(7, 20, 3).diff(dim=2) == 20).all()  # i, i + 20, i + 40


def test_of_equal_neighbours_more_than_k_the_first_are_taken():
    """Ten copies of every row in one piece: three of the nearest ten are chosen, and always the same."""
    once, queries = noise(30), noise(40, seed=1)
    bank = Split(once.features.repeat_interleave(10, 0), once.labels.repeat_interleave(10))
    ((_, ids),) = knn.neighbours(bank, queries, range(0, 40, 512), 3, torch.device("cpu"))
    assert (ids[:, 0] % 10 == 0).all()
    assert torch.equal(ids - ids[:, :1], torch.arange(3).expand(40, 3))


def test_a_bank_without_labels_is_refused():
    empty = Split(torch.zeros(0, 16), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ConfigError, match="has no image with a label"):
        accuracy(empty, clusters(8))


# ---- the evaluation ------------------------------------------------------------------------------


def test_the_evaluation_beats_chance_on_pictures_of_other_colours(loaded_run):
    """An untrained encoder tells red from green from blue stripes."""
    assert dict(knn.run(loaded_run("mae"), knn.Config(k=5)))["knn"] > 0.9


def test_the_first_number_is_that_of_k_and_further_ones_are_named_by_k_and_column(loaded_run):
    found = dict(knn.run(loaded_run("mae"), knn.Config(k=5, ks=[1, 5, 1000], layers=[1, -1], pools=["class"])))
    names = ["knn", "knn_-1/class", "knn_1/mean", "knn_1/class"]
    assert list(found) == [key for name in names for key in (name, f"{name}_k1", f"{name}_k5")]
    assert all(found[name] == found[f"{name}_k5"] for name in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"k": 0}, "k=0 and ks=.* must be at least 1"), ({"ks": [5, -1]}, "ks=.* must be at least 1"),
     ({"temperature": 0.0}, "temperature=0 must be above 0")],
)  # fmt: skip
def test_numbers_that_nobody_can_mean_are_refused(loaded_run, options, message):
    with pytest.raises(ConfigError, match=message):
        dict(knn.run(loaded_run("mae"), knn.Config(**options)))
