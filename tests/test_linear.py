"""The linear probe: as good as scikit-learn's regression, chosen without the held-out split, from a run's features."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from mim.config import ConfigError
from mim.data.make import make
from mim.evals import linear
from mim.evals.linear import Config, fits, heads, regression
from mim.log import Pace
from mim.probing.bank import Bank
from mim.probing.probes import samples

CPU = torch.device("cpu")
QUICK = {"min_updates": 40, "epochs": 1, "base_lrs": [0.01, 0.1], "weight_decays": [0.0]}


@pytest.fixture(scope="module")
def digits():
    """Both splits of scikit-learn's digits: 64 features of 10 classes."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    x = torch.from_numpy(found.data[order]).float()
    labels = torch.from_numpy(found.target[order]).long()
    keys = [f"digits.tar/{i}" for i in order]
    parts = (slice(0, 1000), slice(1000, None))
    train, val = (Bank(keys[part], labels[part], {"-1/mean": x[part]}) for part in parts)
    return samples(train, val, where="a test")


def of_scikit_learn(train, val, c):
    """Its accuracy on the same, standardised features."""
    scaler = StandardScaler().fit(train.features("-1/mean", CPU).numpy())
    x, queries = (scaler.transform(s.features("-1/mean", CPU).numpy()) for s in (train, val))
    fitted = LogisticRegression(C=c, tol=1e-6, max_iter=2000).fit(x, train.labels.numpy())
    return fitted.score(queries, val.labels.numpy())


# ---- how good ------------------------------------------------------------------------------------


def test_lbfgs_agrees_with_scikit_learn_to_a_tenth_of_a_point(digits):
    found = dict(regression(*digits, CPU, Config(inverse_penalties=[0.03, 0.3])))
    assert found["linear"] == pytest.approx(of_scikit_learn(*digits, found["linear_c"]), abs=1e-3)


def test_the_sweep_is_not_worse_than_the_regression_by_more_than_a_point(digits):
    sweep = dict(
        heads(*digits, CPU, Config(base_lrs=[1e-2, 1e-1], weight_decays=[0.05], probe_batch_size=128, min_updates=300))
    )
    best = dict(regression(*digits, CPU, Config(solver="lbfgs", inverse_penalties=[0.01, 0.1])))
    assert sweep["linear"] > best["linear"] - 0.01
    assert sweep["linear_top5"] > 0.99


def test_lars_learns_too(digits):
    found = dict(heads(*digits, CPU, Config(solver="lars", base_lrs=[4.0], probe_batch_size=250, min_updates=300)))
    assert found["linear"] > 0.93


def test_each_c_is_fitted_as_if_it_were_alone(digits):
    together = dict(fits(*digits, "-1/mean", CPU, [0.001, 0.01], pace=Pace("test", 3)))
    assert together[0.01] == pytest.approx(
        dict(fits(*digits, "-1/mean", CPU, [0.01], pace=Pace("test", 3)))[0.01], abs=2e-3
    )


def test_the_c_is_chosen_by_a_part_of_the_training_split(digits):
    """With the labels of the held-out split turned round, the same one is chosen."""
    train, val = digits
    turned = samples(
        Bank(train.keys, train.labels, {"-1/mean": train.features("-1/mean", CPU)}),
        Bank(val.keys, (val.labels + 1) % 10, {"-1/mean": val.features("-1/mean", CPU)}),
        where="a test",
    )
    options = Config(inverse_penalties=[1e-4, 1e-2])
    right, wrong = dict(regression(train, val, CPU, options)), dict(regression(*turned, CPU, options))
    assert right["linear_c"] == wrong["linear_c"] == 1e-2
    assert right["linear"] > 0.9 > 0.1 > wrong["linear"]


def test_random_labels_are_at_chance(digits):
    train, val = digits
    generator = torch.Generator().manual_seed(0)
    train, val = (s.part(torch.ones(len(s), dtype=torch.bool)) for s in (train, val))
    for part in (train, val):
        part.labels = torch.randint(10, (len(part),), generator=generator)
    found = dict(regression(train, val, CPU, Config(inverse_penalties=[1e-3])))
    assert found["linear"] == pytest.approx(0.1, abs=0.04)


# ---- of a run ------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["adamw", "lbfgs"])
def test_the_evaluation_tells_pictures_of_other_colours_apart(loaded_run, solver):
    options = QUICK if solver == "adamw" else {}
    with torch.no_grad():  # as evaluations run
        found = dict(linear.run(loaded_run("mae"), Config(solver=solver, **options)))
    assert found["linear"] > 0.9
    assert "linear_top5" not in found  # of three classes


def test_layers_and_poolings_are_columns_of_their_own(loaded_run):
    found = dict(linear.run(loaded_run("mae"), Config(layers=[1, -1], pools=["mean", "class"], **QUICK)))
    columns = [f"linear_{layer}/{pool}" for layer in (1, -1) for pool in ("mean", "class")]
    assert [key for key in found if "/" in key] == columns
    assert found["linear"] in [found[column] for column in columns]


def test_two_runs_give_the_same_numbers(loaded_run):
    once, again = (dict(linear.run(loaded_run("mae"), Config(layers=[1, -1], **QUICK))) for _ in range(2))
    assert once == again


def test_the_published_settings_are_there_and_what_is_given_replaces_them(digits, monkeypatch):
    seen = []
    monkeypatch.setattr(
        linear.sweep, "judge", lambda make, t, v, plan, *, rates, **o: seen.append((plan, rates)) or iter(())
    )
    list(heads(*digits, CPU, Config(solver="lars", base_lrs=[0.1])))
    plan, rates = seen[0]
    assert (plan.optimizer, plan.batch_size, plan.epochs) == ("lars", 16384, 90)
    assert rates == [(0.1, 0.0)]


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "sgd"}, "solver='sgd' is unknown; choose adamw, lars or lbfgs"),
        ({"pools": ["tokens"]}, "tokens are many vectors of an image, linear reads one; use mean"),
        ({"solver": "lbfgs", "inverse_penalties": [0.0, 1.0]}, "must be positive numbers, C of scikit-learn"),
        ({"base_lrs": []}, r"base_lrs=\[\] must be a list"),
        ({"choice_ratio": 1.5}, "choice_ratio=1.5 must lie between 0 and 1"),
        ({"layers": [7]}, "layer 7 does not exist"),
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"probe_batch_size": 0}, "probe_batch_size=0 must be at least 1"),
        ({"warmup_ratio": 2.0}, "warmup_ratio=2.0 must lie between 0 and 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(loaded_run, options, message):
    with pytest.raises(ConfigError, match=message):
        dict(linear.run(loaded_run("mae"), Config(**options)))


def test_data_without_labels_or_a_held_out_split_are_refused(loaded_run, shards, image_folder, tmp_path):
    loaded = loaded_run("mae")
    loaded.config["data"]["path"] = str(shards / "train")
    with pytest.raises(ConfigError, match="there is no held-out split"):
        dict(linear.run(loaded, Config()))
    make(image_folder, tmp_path / "unlabelled", val_ratio=0.2, workers=1)
    loaded.config["data"]["path"] = str(tmp_path / "unlabelled")
    with pytest.raises(ConfigError, match="has no labels"):
        dict(linear.run(loaded, Config()))


def test_a_single_class_is_refused(loaded_run):
    with pytest.raises(ConfigError, match="the training split has one class alone, which linear cannot learn"):
        dict(linear.run(loaded_run("mae"), Config(train_limit=1)))


def test_a_tokenizer_run_is_refused(loaded_run):
    with pytest.raises(ConfigError, match="has no encoder"):
        dict(linear.run(loaded_run("tokenize"), Config()))
