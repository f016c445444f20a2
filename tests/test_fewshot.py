"""Few-shot: the published classifiers, on shots that are drawn by name."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge

from mim.config import ConfigError
from mim.evals import fewshot
from mim.evals.fewshot import METHODS, Config, few_shot
from mim.probing.bank import Bank
from mim.probing.probes import ranks_in_class, samples

CPU = torch.device("cpu")


def clusters(num, name, seed, spread=0.3, width=6, classes=3):
    centres = 3 * torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % classes
    x = 10 + centres[labels] + spread * torch.randn(num, width, generator=generator)
    return Bank([f"{name}/{i}" for i in range(num)], labels, {"-1/mean": x})


def both(**options):
    return samples(clusters(60, "train", 0, **options), clusters(90, "val", 1, **options), where="a test")


@pytest.mark.parametrize("method", METHODS)
def test_separable_classes_are_found_from_one_shot(method):
    assert few_shot(*both(), CPU, shots=1, cfg=Config(method=method, draws=2)) == [1.0, 1.0]


@pytest.mark.parametrize("method", METHODS)
def test_noise_is_at_chance(method):
    train, val = (
        Bank([f"{n}/{i}" for i in range(1200)], torch.arange(1200) % 3, {"-1/mean": torch.randn(1200, 6)})
        for n in ("train", "val")
    )
    found = few_shot(*samples(train, val, where="a test"), CPU, shots=5, cfg=Config(method=method, draws=4))
    assert sum(found) / 4 == pytest.approx(1 / 3, abs=0.06)


@pytest.mark.parametrize("shots", [2, 20])
def test_ridge_solves_its_problem_in_either_form(shots):
    """Two shots of three classes are fewer than the seven features, twenty are more."""
    train, val = both(spread=2.0)
    support = train.part(ranks_in_class(train, "x") < shots)
    x, queries = (s.features("-1/mean", CPU).double() for s in (support, val))
    found = fewshot.ridge(x, support.labels, queries, 3, Config(l2=7.0))
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0) + 1e-5
    inputs = [F.pad((rows - mean) / std, (0, 1), value=100.0).numpy() for rows in (x, queries)]
    reference = Ridge(alpha=7.0, fit_intercept=False, solver="svd")
    reference.fit(inputs[0], (2 * F.one_hot(support.labels) - 1).numpy())
    assert torch.allclose(found, torch.from_numpy(reference.predict(inputs[1])), atol=1e-6)


def test_the_nearest_mean_is_that_of_the_smallest_angle():
    x = torch.tensor([[1.0, 0.0], [5.0, 0.5], [0.0, 1.0], [0.5, 5.0]], dtype=torch.float64)
    queries = torch.tensor([[9.0, 1.0], [1.5, 9.0]], dtype=torch.float64)
    scores = fewshot.nearest_mean(x, torch.tensor([0, 0, 1, 1]), queries, 2, Config())
    assert scores.argmax(dim=1).tolist() == [0, 1]
    assert scores.abs().max() <= 1


def test_logistic_features_have_no_length_and_no_offset():
    train, val = both()
    x, queries = (s.features("-1/mean", CPU).double() for s in (train, val))
    plain = fewshot.logistic_regression(x, train.labels, queries, 3, Config())
    other = fewshot.logistic_regression(3 * x + 5, train.labels, 3 * queries + 5, 3, Config())
    assert torch.allclose(plain, other, atol=1e-3)


# ---- draws ---------------------------------------------------------------------------------------


def supports(monkeypatch, shots, **options):
    """The labels and features that the classifier is given at each draw."""
    given = []

    def spy(x, labels, queries, num_classes, cfg):
        given.append((x, labels))
        return torch.zeros(len(queries), num_classes)

    monkeypatch.setitem(METHODS, "ridge", spy)
    few_shot(*both(), CPU, shots=shots, cfg=Config(**options))
    monkeypatch.undo()
    return given


def test_every_class_gives_its_shots_and_one_shot_is_among_the_five(monkeypatch):
    one, five = supports(monkeypatch, 1), supports(monkeypatch, 5)
    for (x, labels), (more, of_more) in zip(one, five, strict=True):
        assert torch.bincount(labels).tolist() == [1, 1, 1]
        assert torch.bincount(of_more).tolist() == [5, 5, 5]
        assert {tuple(row) for row in x.tolist()} < {tuple(row) for row in more.tolist()}


def test_draws_differ_from_each_other_and_come_again(monkeypatch):
    first, again = supports(monkeypatch, 1, draws=3), supports(monkeypatch, 1, draws=3)
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(first, again, strict=True))
    assert len({tuple(x.flatten().tolist()) for x, _ in first}) == 3
    assert not torch.equal(supports(monkeypatch, 1, seed=1)[0][0], first[0][0])


# ---- of a run ------------------------------------------------------------------------------------


def test_the_evaluation_yields_mean_and_std_for_each_number_of_shots(loaded_run):
    with torch.no_grad():  # as evaluations run
        found = dict(fewshot.run(loaded_run("mae"), Config(shots=[5, 1])))
    assert list(found) == ["fewshot_1", "fewshot_1_std", "fewshot_5", "fewshot_5_std"]
    assert found["fewshot_5"] > 0.8
    assert 0 <= found["fewshot_5_std"] < 0.2


def test_a_single_draw_has_no_std(loaded_run):
    assert list(dict(fewshot.run(loaded_run("mae"), Config(shots=[1], draws=1)))) == ["fewshot_1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "svm"}, "method='svm' is unknown; choose ridge, nearest_mean, logistic"),
        ({"shots": []}, "must be numbers of at least 1"),
        ({"shots": [0]}, "must be numbers of at least 1"),
        ({"l2": 0.0}, "l2=0 and inverse_penalty=4000 must be above 0"),
        ({"draws": 0}, "draws=0 must be numbers of at least 1"),
        ({"shots": [500]}, "shots=500, but a class of the training split has [0-9]+ labelled images; use fewer"),
        ({"pool": "tokens"}, "tokens are many vectors of an image, few-shot reads one"),
    ],
)
def test_settings_that_make_no_sense_are_refused(loaded_run, options, message):
    with pytest.raises(ConfigError, match=message):
        dict(fewshot.run(loaded_run("mae"), Config(**options)))
