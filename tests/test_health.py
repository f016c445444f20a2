"""Health of a run: the numbers of the objective itself, of its features and heads, and the same on every layout."""

import math

import pytest
import torch

from mim import build
from mim.config import ConfigError
from mim.data import stream
from mim.evals import health
from mim.health import feature_statistics as statistics
from mim.probing.features import Wanted, bank
from tests.conftest import TINY, shaken
from tests.test_cli import mim, trained  # noqa: F401  (fixtures)
from tests.test_eval_command import evaluated, torchrun

QUICK = {"lidar_images": 12, "lidar_views": 3, "attention_images": 5, "batch_size": 8}
OBJECTIVES = ("mae", "simmim", "beit", "beit2", "mpp")


def numbers(loaded, **options):
    return dict(health.run(loaded, health.Config(**{**QUICK, **options})))


def seen(loaded):
    """The held-out images as one batch, with masks and codes."""
    _, val = build.open_data(loaded.config)
    views = loaded.views
    options = {"view": views.evaluation, "sizes": views.sizes, "mask": views.mask, "batch_size": len(val)}
    batch = stream.to_device(next(iter(stream.evaluate(val, **options))), torch.device("cpu"))
    if "tokenizer" in loaded.frozen:
        batch["codes"] = loaded.frozen["tokenizer"].encode(batch.get("tokenizer_images", batch["images"]))
    return batch


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_the_objectives_own_on_held_out_images(loaded_run, objective):
    loaded = loaded_run(objective)
    shaken(loaded.objective)
    found, expected = numbers(loaded), loaded.objective(seen(loaded), torch.ones(()))
    for name, value in expected.items():
        assert found[f"val_{name}"] == pytest.approx(float(value.double().mean()), rel=1e-5), name
    trivial = min(value for name, value in found.items() if name in ("baseline_mean_patch", "baseline_copy",
                                                                     "baseline_unigram"))  # fmt: skip
    assert found["skill"] == pytest.approx(1 - found["val_loss"] / trivial)


def test_the_mean_patch_of_normalised_targets_loses_the_unbiased_variance(loaded_run):
    """Of 192 values with variance 1 by the unbiased estimate, so 191 / 192; noise in the images keeps it so."""
    assert numbers(loaded_run("mae"))["baseline_mean_patch"] == pytest.approx(191 / 192, rel=1e-3)


def test_a_network_that_predicts_the_mean_has_the_loss_of_the_baseline_and_no_skill(loaded_run):
    for objective, head in (("mae", "decoder_pred"), ("simmim", "head")):
        loaded = loaded_run(objective)
        for parameter in getattr(loaded.objective, head).parameters():
            parameter.data.zero_()
        found = numbers(loaded)
        assert found["val_loss"] == pytest.approx(found["baseline_mean_patch"], rel=1e-6)
        assert found["skill"] <= 1e-6


def test_the_unigram_is_the_entropy_of_the_masked_codes_and_counts_for_each_prediction(loaded_run):
    for objective, predictions in (("beit", 1), ("beit2", 2)):
        loaded = loaded_run(objective)
        batch = seen(loaded)
        counts = torch.bincount(batch["codes"][batch["mask"]])
        shares = [count / counts.sum().item() for count in counts.tolist() if count]
        found = numbers(loaded)
        entropy = -sum(share * math.log(share) for share in shares)
        assert found["baseline_unigram"] == pytest.approx(predictions * entropy)
        assert found["baseline_unigram_accuracy"] == pytest.approx(max(shares))


def test_features_are_judged_as_the_bank_has_them(loaded_run):
    loaded = loaded_run("mae")
    _, val = build.open_data(loaded.config)
    columns = bank(loaded, val, Wanted([1, 2]), batch_size=QUICK["batch_size"]).columns
    first, last = columns["1/mean"], columns["2/mean"]
    found = numbers(loaded)
    assert found["rankme"] == statistics.rankme(last)
    assert found["uniformity"] == statistics.uniformity(last)
    assert found["feature_std"] == pytest.approx(float(last.double().std(dim=0).mean()))
    assert found["cka_first_last"] == found["cka/1"] == statistics.linear_cka(first, last)


def test_features_that_are_all_alike_are_seen(loaded_run):
    loaded = loaded_run("simmim")
    for parameter in loaded.encoder.final_norm.parameters():
        parameter.data.zero_()
    loaded.encoder.final_norm.bias.data.fill_(1.0)
    found = numbers(loaded)
    assert found["rankme"] == pytest.approx(1, abs=1e-4)
    assert found["feature_std"] == 0
    assert found["uniformity"] == pytest.approx(0, abs=1e-6)


def test_features_that_overflow_end_the_look_and_not_the_run(loaded_run, capsys):
    loaded = loaded_run("mae")
    loaded.encoder.final_norm.weight.data.fill_(3e38)
    found = numbers(loaded)
    assert "baseline_mean_patch" in found
    assert not {"rankme", "lidar", "attention_entropy"} & found.keys()
    assert "features of the encoder are not finite" in capsys.readouterr().err


def test_units_that_cannot_fire_are_counted_by_block(loaded_run):
    loaded = loaded_run("mae")
    loaded.encoder.vit.blocks[1].mlp.fc1.bias.data[:32] = -1e4
    found = numbers(loaded)
    assert found["dead_neurons/2"] >= 0.25
    assert found["dead_neurons/1"] < 0.25
    assert found["dead_neurons"] == pytest.approx((found["dead_neurons/1"] + found["dead_neurons/2"]) / 2)


def test_heads_without_keys_look_everywhere_alike(loaded_run):
    loaded = loaded_run("mae")
    loaded.encoder.vit.blocks[0].attn.qkv.weight.data[:32] = 0  # queries
    loaded.encoder.vit.blocks[0].attn.qkv.bias.data.zero_()
    found = numbers(loaded)
    assert found["attention_entropy/1"] == pytest.approx(1, rel=1e-5)
    assert found["heads_uniform"] >= 2
    assert found["attention_entropy_max"] == pytest.approx(1, rel=1e-5)


def test_an_encoder_without_attention_maps_leaves_them_out_and_says_so_once(loaded_run, recipe, capsys):
    health.say_once.cache_clear()
    loaded = loaded_run("simmim")
    sections = {**recipe("simmim"), "encoder": {"name": "dense", **TINY["dense"]}, "mask": {"name": "random"}}
    built = build.build(sections)
    loaded.objective, loaded.encoder, loaded.views = built.objective.eval(), built.encoder, built.views
    loaded.config = built.sections
    for _ in range(2):
        found = numbers(loaded)
        assert "rankme" in found
        assert not any(name.startswith(("attention", "heads")) for name in found)
    assert capsys.readouterr().err.count("health without attention") == 1


def test_a_tokenizers_run_is_sent_to_its_score_card(loaded_run):
    with pytest.raises(ConfigError, match="mim eval codebook"):
        numbers(loaded_run("tokenize"))


def test_two_processes_give_the_numbers_of_one_to_the_last_bit(mim, trained):  # noqa: F811
    options = ("health", trained, *(f"{name}={value}" for name, value in {**QUICK, "batch_size": 3}.items()))
    one = evaluated(mim, *options)
    assert {"val_loss", "baseline_copy", "skill", "rankme", "lidar", "dead_neurons", "attention_entropy"} <= one.keys()
    assert torchrun(*options) == one
