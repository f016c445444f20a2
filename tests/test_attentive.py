"""The attentive probe: it is attention, it finds what a mean drowns, and it refuses what does not fit."""

import pytest
import torch
import torch.nn.functional as F

from mim.config import ConfigError
from mim.evals import attentive
from mim.evals.attentive import AttentiveHeads, Config
from mim.evals.linear import LinearHeads
from mim.probing.bank import Bank
from mim.probing.probes import samples
from mim.probing.sweep import Plan, Rate, grid, judge

RATES = grid([1e-3, 3e-3], [0.0])
QUICK = {"min_updates": 25, "epochs": 1, "base_lrs": [1e-2, 3e-2], "weight_decays": [0.0], "probe_batch_size": 32}


def test_the_head_is_attention_of_one_query():
    """Keys and values made in full, as AIM's program does."""
    heads = AttentiveHeads(12, 5, RATES, num_heads=3, name=("x",))
    generator = torch.Generator().manual_seed(0)
    for parameter in heads.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    x = torch.randn(4, 7, 12, generator=generator)
    found = heads.scores(x)
    assert found.shape == (2, 5, 4)
    for i in range(2):
        inputs = heads.query[i].expand(4, 1, 12), x @ heads.key[i], x @ heads.value[i]
        read = F.scaled_dot_product_attention(
            *(t.unflatten(-1, (3, 4)).transpose(1, 2) for t in inputs)
        )  # (b, H, 1, d)
        scores = read.transpose(1, 2).reshape(4, 12) @ heads.weight[i].T + heads.bias[i]
        assert torch.allclose(found[i].T, scores, atol=1e-3, rtol=1e-4)


def needle(num, name, seed):
    """One patch of sixteen tells the class, wherever it lies; it has a mark, the others say nothing."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % 3
    x = torch.randn(num, 16, 8, generator=generator)
    x[..., 7] = 0
    place = torch.randint(16, (num,), generator=generator)
    told = torch.cat([F.one_hot(labels, 3), torch.zeros(num, 4), torch.full((num, 1), 3.0)], dim=1)
    x[torch.arange(num), place] = told
    return Bank([f"{name}/{i}" for i in range(num)], labels, {"-1/tokens": x, "-1/mean": x.mean(dim=1)})


def test_it_finds_a_patch_that_the_mean_drowns():
    train, val = samples(needle(300, "train", 0), needle(150, "val", 1), where="a test")
    plan = Plan("adamw", batch_size=50, epochs=40, min_updates=0, warmup_ratio=0.1, seed=0)

    def accuracy(column, make):
        parts = [s.part(torch.arange(len(s))) for s in (train, val)]
        for part in parts:
            part.columns = {column: part.columns[column]}
        return dict(judge(make, *parts, plan, rates=[Rate(0.1, 0.0)], choice_ratio=0.1, title="found"))["found"]

    attends = accuracy("-1/tokens", lambda _, rates: AttentiveHeads(8, 3, rates, num_heads=1, name=("x",)))
    averages = accuracy("-1/mean", lambda _, rates: LinearHeads(8, 3, rates, name=("x",)))
    assert attends > 0.9
    assert averages < 0.7


def test_the_order_of_the_patches_does_not_matter():
    heads = AttentiveHeads(8, 3, RATES, num_heads=2, name=("x",)).eval()
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(heads.scores(x), heads.scores(x.flip(1)), atol=1e-6)


# ---- of a run ------------------------------------------------------------------------------------


def test_the_evaluation_tells_pictures_of_other_colours_apart_and_repeats_itself(loaded_run):
    with torch.no_grad():  # as evaluations run
        once, again = (dict(attentive.run(loaded_run("mae"), Config(**QUICK))) for _ in range(2))
    assert once["attentive"] > 0.9
    assert once == again
    assert list(once) == ["attentive", "attentive_lr", "attentive_weight_decay"]


def test_each_layer_is_told(loaded_run):
    found = dict(attentive.run(loaded_run("mae"), Config(layers=[1, 2], **QUICK)))
    assert {"attentive_1/tokens", "attentive_2/tokens"} <= set(found)


def test_more_patches_than_fit_are_refused_before_anything_is_embedded(loaded_run, monkeypatch):
    """96 images of 16 patches, 32 wide: 192 KiB in one layer, 384 KiB in two."""
    monkeypatch.setattr(attentive, "labelled_samples", None)
    tight = 300 * 2**10 / 2**30
    with pytest.raises(ConfigError, match=r"the patches of 96 images in 2 layers take 0\.0 GiB, more than max_gib"):
        dict(attentive.run(loaded_run("mae"), Config(layers=[1, 2], max_gib=tight)))
    with pytest.raises(ConfigError, match="use train_limit and val_limit with 75 images in all"):
        dict(attentive.run(loaded_run("mae"), Config(layers=[1, 2], max_gib=tight)))
    attentive.refuse_too_much(loaded_run("mae"), Config(layers=[1], max_gib=tight))
    attentive.refuse_too_much(loaded_run("mae"), Config(layers=[1, 2], train_limit=40, max_gib=tight))


@pytest.mark.parametrize("num_heads", [5, 0, -4])
def test_heads_that_do_not_divide_the_width_are_refused(loaded_run, num_heads):
    with pytest.raises(ConfigError, match=f"num_heads={num_heads} must divide the width of the encoder, 32"):
        dict(attentive.run(loaded_run("mae"), Config(num_heads=num_heads)))


def test_a_tokenizer_run_is_refused(loaded_run):
    with pytest.raises(ConfigError, match="has no encoder"):
        dict(attentive.run(loaded_run("tokenize"), Config()))
