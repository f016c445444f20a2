"""Noise by name, the Gumbel-softmax relaxation and the statistics of codes."""

import math

import pytest
import torch

from tokenizer.quantize import code_counts, gumbel_softmax, perplexity, uniform_noise, usage


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    seeds = torch.tensor([5, -1, 2**62 + 3, 0])
    whole = uniform_noise(seeds, (3, 4, 5))
    assert whole.shape == (4, 3, 4, 5)
    assert torch.equal(whole[2:], uniform_noise(seeds[2:], (3, 4, 5)))
    assert torch.equal(whole[1:2], uniform_noise(seeds[1:2].clone(), (3, 4, 5)))
    assert torch.equal(whole.flip(0), uniform_noise(seeds.flip(0), (3, 4, 5)))


def test_noise_is_the_same_in_every_version():
    # Trained tokenizers resume with the noise that they were trained with.
    noise = uniform_noise(torch.tensor([0, 1, -(2**63)]), (2,))
    assert torch.equal(
        (noise.double() * 2**24).long(), torch.tensor([[4017303, 520917], [7673997, 6296413], [15600825, 726137]])
    )


def test_noise_is_uniform_in_the_open_interval():
    noise = uniform_noise(torch.arange(64), (1 << 14,)).double()  # 2^20 values: standard error of the mean 0.0003
    assert noise.min() > 0
    assert noise.max() < 1
    assert abs(noise.mean() - 1 / 2) < 0.0015
    assert abs(noise.var() - 1 / 12) < 0.0005
    histogram = torch.histc(noise.float(), bins=256, min=0, max=1)
    chi_squared = ((histogram - 4096) ** 2 / 4096).sum()  # 255 degrees of freedom: 255 +- 23
    assert 150 < chi_squared < 370


@pytest.mark.parametrize("step", [1, 2, 1 << 20, 1 << 32, 1 << 45])
def test_neighbouring_seeds_give_uncorrelated_noise(step):
    noise = uniform_noise(torch.arange(32) * step, (1 << 13,)).double()
    correlations = torch.corrcoef(noise)[~torch.eye(32, dtype=torch.bool)]
    assert correlations.abs().max() < 6 / math.sqrt(1 << 13)
    assert noise.unique().numel() > 0.98 * noise.numel()  # nor are they the same values in another order


@pytest.mark.parametrize("step", [1, 2, 7, 64, 4096])
def test_neighbouring_indices_give_uncorrelated_noise(step):
    noise = uniform_noise(torch.arange(64), (1 << 13,)).double()
    pair = torch.stack([noise[:, :-step].flatten(), noise[:, step:].flatten()])
    assert abs(torch.corrcoef(pair)[0, 1]) < 5 / math.sqrt(pair.shape[1])


def test_the_largest_entry_of_a_relaxed_sample_is_distributed_as_the_softmax():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0]).view(1, 4, 1, 1).expand(1, 4, 100, 100)
    relaxed = gumbel_softmax(logits, torch.tensor([3]), torch.tensor(0.5))  # (1, 4, 100, 100)
    frequency = code_counts(relaxed.argmax(dim=1).flatten(1), 4) / 10_000
    assert torch.allclose(frequency, logits[0, :, 0, 0].softmax(0), atol=0.02)  # 4 standard errors
    assert torch.allclose(relaxed.sum(dim=1), torch.ones(1, 100, 100))


def test_a_low_temperature_gives_almost_a_one_hot():
    logits = torch.zeros(1, 8, 16, 16)
    hot, cold = (gumbel_softmax(logits, torch.tensor([0]), torch.tensor(t)).amax(dim=1).mean() for t in (1.0, 0.01))
    assert hot < 0.6
    assert cold > 0.97


def test_the_relaxation_is_computed_in_float32():
    relaxed = gumbel_softmax(torch.zeros(1, 4, 2, 2, dtype=torch.bfloat16), torch.tensor([0]), torch.tensor(1.0))
    assert relaxed.dtype == torch.float32


def test_counts_leave_out_rows_of_weight_zero():
    codes = torch.tensor([[0, 1, 1], [3, 3, 3]])
    assert code_counts(codes, 5).tolist() == [1, 2, 0, 3, 0]
    assert code_counts(codes, 5, torch.tensor([1.0, 0.0])).tolist() == [1, 2, 0, 0, 0]


def test_usage_and_perplexity_of_known_distributions():
    assert usage(torch.tensor([4, 0, 1, 0])) == 0.5
    assert perplexity(torch.full((8,), 3)) == pytest.approx(8)
    assert perplexity(torch.tensor([0, 9, 0])) == pytest.approx(1)
    assert usage(torch.zeros(3, dtype=torch.int64)) == 0  # before anything is counted
