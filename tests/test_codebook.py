"""Codes on held-out images: counted exactly, with the baseline that tells a skewed codebook from a good prediction."""

import pytest
import torch

from mim import build
from mim.config import ConfigError
from mim.evals import codebook


class Colours:
    """A tokenizer whose code of a patch is the channel that is brightest there, of five codes."""

    num_codes, stride = 5, 8

    def parameters(self):
        return iter([torch.zeros(())])

    def encode(self, images):
        patches = torch.nn.functional.avg_pool2d(images, 8)  # (B, 3, 4, 4)
        return patches.argmax(dim=1).flatten(1)


@pytest.fixture
def loaded(loaded_run):
    found = loaded_run("beit")
    found.frozen["tokenizer"] = Colours()
    found.views.mask.keywords["ratio"] = 0.5
    return found


def predicting(accuracy):
    """An objective that is right on a share of the masked positions of each image."""

    def objective(batch, progress):
        assert batch["codes"].shape == batch["mask"].shape
        return {"accuracy": torch.full((len(batch["images"]),), accuracy)}

    return objective


def test_usage_and_perplexity_are_those_of_all_held_out_codes(loaded):
    """Three of five codes occur, about equally often: the classes are as frequent in the held-out split."""
    loaded.objective = predicting(0.25)
    found = dict(codebook.run(loaded, codebook.Config()))
    assert found["usage"] == pytest.approx(3 / 5)
    assert 2.5 < found["perplexity"] <= 3.0 + 1e-5


def test_accuracy_is_the_mean_over_all_images_whatever_the_batches(loaded):
    loaded.objective = predicting(0.25)
    for batch_size in (5, 100):
        assert dict(codebook.run(loaded, codebook.Config(batch_size=batch_size)))["accuracy"] == pytest.approx(0.25)


def test_the_baseline_always_says_the_most_frequent_code(loaded):
    """With one code for everything the baseline is perfect; with three it is about a third."""
    loaded.objective = predicting(0.25)
    assert dict(codebook.run(loaded, codebook.Config()))["unigram_accuracy"] == pytest.approx(1 / 3, abs=0.15)
    loaded.frozen["tokenizer"].encode = lambda images: torch.full((len(images), 16), 2)
    found = dict(codebook.run(loaded, codebook.Config()))
    assert found["unigram_accuracy"] == 1.0
    assert found["usage"] == pytest.approx(1 / 5)
    assert found["perplexity"] == pytest.approx(1.0)


def test_the_baseline_is_counted_on_the_training_split(loaded):
    """The held-out split must not choose its own baseline."""
    loaded.objective = predicting(0.0)
    train, val = build.open_data(loaded.config)
    assert len(train) != len(val)
    asked = []
    encode = loaded.frozen["tokenizer"].encode

    def noting(images):
        asked.append(len(images))
        return encode(images)

    loaded.frozen["tokenizer"].encode = noting
    dict(codebook.run(loaded, codebook.Config(train_limit=10)))
    assert asked == [len(val), 10]


def test_a_tokenizer_run_has_a_score_card_and_pictures_but_no_accuracy(loaded_run):
    found = dict(codebook.run(loaded_run("tokenize"), codebook.Config()))
    shares = {"usage", "surprise", "distinct", "stable_shift", "stable_jitter", "recon_mae", "probe"}
    assert set(found) == {*shares, "perplexity", "dead", "codes", "patches"}
    assert all(0 <= found[name] <= 1 for name in shares)
    assert 1 <= found["perplexity"] <= 16
    assert found["dead"] <= 16 * (1 - found["usage"])


def test_a_run_without_a_tokenizer_is_refused(loaded_run):
    with pytest.raises(ConfigError, match="has no tokenizer; this evaluation needs"):
        dict(codebook.run(loaded_run("mae"), codebook.Config()))
