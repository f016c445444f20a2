"""The discrete VAE: its published layout, its likelihood and KL, its schedules, and that it learns."""

import math

import pytest
import torch
import torch.nn.functional as F

from tokenizer import dvae

SMALL = dvae.Config(num_codes=16, channels=1, width=8, n_init=8, num_groups=3, blocks_per_group=1)


def a_batch(size=4, channels=1, pixels=16):
    images = torch.rand(size, channels, pixels, pixels, generator=torch.Generator().manual_seed(0))
    return {"images": images, "noise": torch.arange(size) + 7}


def smooth_pictures(size, pixels):
    return F.interpolate(torch.rand(size, 1, 3, 3), size=(pixels, pixels), mode="bilinear")


@pytest.fixture(scope="module")
def published():
    with torch.device("meta"):
        return dvae.build(dvae.Config())


def test_the_default_has_the_published_number_of_parameters(published):
    assert sum(p.numel() for p in published.encoder.parameters()) == 53_786_240  # 53.8 M
    assert sum(p.numel() for p in published.decoder.parameters()) == 43_829_766  # 43.8 M
    assert published.stride == 8


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("encoder.blocks.input.w", (256, 3, 7, 7)),
        ("encoder.blocks.group_1.block_1.res_path.conv_1.w", (64, 256, 3, 3)),
        ("encoder.blocks.group_1.block_1.res_path.conv_4.w", (256, 64, 1, 1)),
        ("encoder.blocks.group_2.block_1.id_path.w", (512, 256, 1, 1)),
        ("encoder.blocks.output.conv.w", (8192, 2048, 1, 1)),
        ("decoder.blocks.input.w", (128, 8192, 1, 1)),
        ("decoder.blocks.group_1.block_1.id_path.b", (2048,)),
        ("decoder.blocks.group_1.block_1.res_path.conv_1.w", (512, 128, 1, 1)),
        ("decoder.blocks.group_4.block_2.res_path.conv_4.w", (256, 64, 3, 3)),
        ("decoder.blocks.output.conv.w", (6, 256, 1, 1)),
    ],
)
def test_parameters_have_the_published_names_and_shapes(published, name, shape):
    assert tuple(published.state_dict()[name].shape) == shape


def test_the_identity_path_is_a_convolution_only_where_the_width_changes(published):
    found = {name for name in published.state_dict() if name.startswith("encoder") and name.endswith("id_path.w")}
    assert found == {f"encoder.blocks.group_{g}.block_1.id_path.w" for g in (2, 3, 4)}


def test_the_likelihood_is_a_density_on_the_open_interval():
    x = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for mean, scale in ((0.0, 0.5), (1.5, 0.2), (-0.7, 0.9)):
        density = torch.exp(-dvae.logit_laplace_nll(x, torch.tensor(mean), torch.tensor(math.log(scale))))
        assert density.mean() == pytest.approx(1, abs=1e-3)


def test_the_likelihood_equals_the_formula_of_the_paper():
    x, mean, b = 0.3, -0.4, 0.25
    density = math.exp(-abs(math.log(x / (1 - x)) - mean) / b) / (2 * b * x * (1 - x))
    nll = dvae.logit_laplace_nll(torch.tensor(x), torch.tensor(mean), torch.tensor(math.log(b)))
    assert nll == pytest.approx(-math.log(density), rel=1e-5)


def test_kl_is_zero_at_uniform_logits_and_ln_v_at_a_one_hot():
    uniform, one_hot = torch.full((1, 32, 2, 2), 3.0), torch.zeros(1, 32, 2, 2)
    one_hot[:, 5] = 200.0
    assert torch.allclose(dvae.kl_to_uniform(uniform), torch.zeros(1, 2, 2), atol=1e-5)
    assert torch.allclose(dvae.kl_to_uniform(one_hot), torch.full((1, 2, 2), math.log(32)))


def test_one_nat_of_kl_weighs_beta_over_192_at_stride_8():
    cfg = dvae.Config(num_codes=16, width=8, n_init=4, blocks_per_group=1, likelihood="mse")
    out = dvae.build(cfg).loss(a_batch(channels=3), torch.tensor(1.0))
    assert torch.allclose(out["loss"] - out["recon_mse"], 6.6 / 192 * out["kl"], atol=1e-5)


def test_schedules_go_from_start_to_end_in_the_published_fractions():
    tokenizer = dvae.build(SMALL)
    values = [
        {name: tokenizer.loss(a_batch(1), torch.tensor(p))[name].item() for name in ("temperature", "kl_weight")}
        for p in (0.0, 2500 / 3e6, 75_000 / 3e6, 1.0)
    ]
    assert values[0] == {"temperature": 1.0, "kl_weight": 0.0}
    assert values[1]["kl_weight"] == pytest.approx(3.3, rel=1e-3)
    assert values[2]["temperature"] == pytest.approx((1 + 1 / 16) / 2, rel=1e-3)
    assert values[3] == pytest.approx({"temperature": 1 / 16, "kl_weight": 6.6})


@pytest.mark.parametrize("likelihood", ["logit_laplace", "mse"])
def test_the_gradient_reaches_every_parameter(likelihood):
    torch.manual_seed(0)
    tokenizer = dvae.build(dvae.Config(**{**vars(SMALL), "likelihood": likelihood}))
    out = tokenizer.loss(a_batch(), torch.tensor(0.5))
    assert out["loss"].shape == out["recon_mse"].shape == out["kl"].shape == (4,)
    out["loss"].mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tokenizer.parameters())
    assert not any(value.requires_grad for name, value in out.items() if name != "loss")


def test_the_loss_of_a_sample_does_not_depend_on_its_batch():
    tokenizer, batch = dvae.build(SMALL), a_batch()
    whole = tokenizer.loss(batch, torch.tensor(0.5))
    half = tokenizer.loss({name: value[2:] for name, value in batch.items()}, torch.tensor(0.5))
    assert torch.allclose(whole["loss"][2:], half["loss"], atol=1e-5)
    assert torch.equal(whole["codes"][2:], half["codes"])


def test_the_loss_reads_the_images_at_the_tokenizer_s_size():
    tokenizer, batch = dvae.build(SMALL), a_batch()
    both = {**batch, "images": torch.zeros(4, 1, 64, 64), "tokenizer_images": batch["images"]}
    assert torch.equal(
        tokenizer.loss(both, torch.tensor(0.5))["loss"], tokenizer.loss(batch, torch.tensor(0.5))["loss"]
    )


def test_logits_are_computed_in_float32_under_autocast():
    tokenizer = dvae.build(SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        logits = tokenizer.encoder(a_batch()["images"])
        loss = tokenizer.loss(a_batch(), torch.tensor(0.5))["loss"]
    assert logits.dtype == loss.dtype == torch.float32


def test_codes_are_the_most_likely_ones_in_row_major_order():
    tokenizer = dvae.build(SMALL)
    images = torch.rand(2, 1, 16, 24)
    codes = tokenizer.encode(images)
    assert codes.shape == (2, 24)
    assert codes.dtype == torch.int64
    logits = tokenizer.encoder((1 - 2 * dvae.EPSILON) * images + dvae.EPSILON)
    assert codes[1, 6 * 2 + 3] == logits[1, :, 2, 3].argmax()  # row 2, column 3 of the 4 x 6 grid


def test_decoding_codes_equals_decoding_their_one_hot():
    torch.manual_seed(0)
    tokenizer = dvae.build(SMALL)
    codes = torch.randint(16, (2, 24))
    one_hot = F.one_hot(codes.unflatten(1, (4, 6)), 16).permute(0, 3, 1, 2).float()  # (2, 16, 4, 6)
    expected = (torch.sigmoid(tokenizer.decoder(one_hot)[:, :1]) - dvae.EPSILON) / (1 - 2 * dvae.EPSILON)
    images = tokenizer.decode(codes, (4, 6))
    assert images.shape == (2, 1, 16, 24)
    assert torch.allclose(images, expected.clamp(0, 1), atol=1e-6)


def test_a_size_that_does_not_divide_names_the_nearest_that_does():
    tokenizer = dvae.build(SMALL)
    assert tokenizer.grid((16, 24)) == (4, 6)
    with pytest.raises(ValueError, match=r"30x33 .* stride of 4; use 32x32"):
        tokenizer.grid((30, 33))
    with pytest.raises(ValueError, match="use 4x16"):
        tokenizer.encode(torch.rand(1, 1, 1, 15))


def test_an_unknown_likelihood_is_refused_by_naming_the_known():
    with pytest.raises(ValueError, match='"gauss" is unknown; use "logit_laplace" or "mse"'):
        dvae.build(dvae.Config(likelihood="gauss"))


def test_many_codes_are_in_use_before_the_first_step():
    torch.manual_seed(0)
    tokenizer = dvae.build(dvae.Config(num_codes=256, channels=1, width=16, n_init=8, blocks_per_group=1))
    codes = tokenizer.encode(smooth_pictures(32, pixels=64))
    assert codes.unique().numel() > 20  # with the published initialisation: 1 to 4


def test_short_trainings_keep_their_codes_and_beat_the_mean_colour():
    """Three seeds: how many codes one of them ends with is chance; that all of them keep some is not."""
    kept = []
    for seed in range(3):
        torch.manual_seed(seed)
        options = {**vars(SMALL), "num_codes": 32, "num_groups": 2, "kl_weight": 0.3, "temperature_decay": 0.7}
        tokenizer = dvae.build(dvae.Config(**options))
        optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=1e-2)
        images = smooth_pictures(16, pixels=8)
        for step in range(100):
            batch = {"images": images, "noise": torch.arange(16) + 16 * step}
            tokenizer.loss(batch, torch.tensor(step / 100))["loss"].mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        codes = tokenizer.encode(images)
        error = (tokenizer.decode(codes, (4, 4)) - images).square().mean()
        assert error < 0.5 * (images - images.mean(dim=(2, 3), keepdim=True)).square().mean()
        kept.append(codes.unique().numel())
    assert min(kept) >= 4
    assert sum(kept) / len(kept) >= 8
