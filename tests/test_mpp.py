"""Masked patch prediction: which patches are corrupted and how, and the colours that are predicted."""

import math

import pytest
import torch
import torch.nn.functional as F

from mim.encoders import vit
from mim.objectives import mpp
from mim.patches import mask_to_ids, patchify, unpatchify

SIZE, GRID, N, MASKED = (64, 80), (8, 10), 80, 40
PROGRESS = torch.tensor(0.0)


def an_encoder(channels=3):
    torch.manual_seed(0)
    cfg = vit.Config("vit_tiny_patch16_224", width=32, depth=2, num_heads=2, patch_size=8)
    return vit.build(cfg, image_size=SIZE, channels=channels)


def an_objective(channels=3, **changes):
    return mpp.build(an_encoder(channels), mpp.Config(**changes)).eval()


def a_batch(rows=3, channels=3):
    generator = torch.Generator().manual_seed(0)
    return {
        "images": torch.rand(rows, channels, *SIZE, generator=generator),
        "mask": torch.stack([torch.randperm(N, generator=generator) < MASKED for _ in range(rows)]),
        "num_masked": MASKED,
        "noise": torch.randint(2**62, (rows,), generator=generator),
    }


def ids_of(batch):
    return mask_to_ids(batch["mask"], MASKED)[1]


def what_the_encoder_sees(objective, batch):
    """The images and the mask of replaced patches that a forward hands to the encoder."""
    seen, forward = [], objective.encoder.forward
    objective.encoder.forward = lambda images, **options: (
        seen.append((images, options["mask"])) or forward(images, **options)
    )
    objective(batch, PROGRESS)
    objective.encoder.forward = forward
    return seen[0]


# ---- corruption ----------------------------------------------------------------------------------


def test_of_the_corrupted_patches_eight_tenths_are_replaced_one_is_swapped_and_one_stays():
    objective, batch = an_objective(), a_batch(rows=16)
    images, replaced = what_the_encoder_sees(objective, batch)
    changed = (patchify(images, 8) != patchify(batch["images"], 8)).any(dim=2)  # (B, N)
    assert replaced.sum(dim=1).tolist() == [32] * 16
    assert changed.sum(dim=1).tolist() == [4] * 16
    assert not (changed & replaced).any()
    assert batch["mask"][changed | replaced].all()


def test_a_swapped_patch_is_another_patch_of_the_same_image():
    objective, batch = an_objective(), a_batch(rows=16)
    images, _ = what_the_encoder_sees(objective, batch)
    before, after = patchify(batch["images"], 8), patchify(images, 8)
    for row, old, new in zip(range(16), before, after, strict=True):
        for place in (old != new).any(dim=1).nonzero().flatten().tolist():
            sources = (old == new[place]).all(dim=1).nonzero().flatten().tolist()
            assert len(sources) == 1, row
            assert sources != [place]


def test_swapped_patches_come_from_anywhere_but_their_own_place():
    objective, batch = an_objective(swap_ratio=1.0, mask_ratio=0.0), a_batch(rows=100)
    numbers = torch.arange(N).float().expand(100, N)  # every patch holds its number
    images = unpatchify(numbers[..., None].expand(100, N, 192), GRID, 3)
    ids = torch.arange(MASKED).expand(100, MASKED)
    sources = patchify(objective.swap(images, ids, batch["noise"]), 8)[:, :MASKED, 0].long()  # (100, 40)
    assert (sources != ids).all()
    counts = torch.bincount(sources.flatten(), minlength=N)
    assert counts.sum() == 4000
    assert counts.min() > 20  # 50 each, but for one's own place: a standard deviation of 7
    assert counts.max() < 80


def test_the_draws_of_a_sample_are_a_function_of_its_noise_alone():
    objective, batch = an_objective(), a_batch(rows=6)
    images, replaced = what_the_encoder_sees(objective, batch)
    part = {key: value[2:5] if torch.is_tensor(value) else value for key, value in batch.items()}
    part_images, part_replaced = what_the_encoder_sees(objective, part)
    assert torch.equal(part_images, images[2:5])
    assert torch.equal(part_replaced, replaced[2:5])
    other_images, other_replaced = what_the_encoder_sees(objective, {**batch, "noise": batch["noise"] + 1})
    assert (other_images != images).flatten(1).any(dim=1).all()
    assert (other_replaced != replaced).any(dim=1).all()


def test_every_corrupted_patch_has_its_turn_in_every_part():
    objective, batch = an_objective(), a_batch(rows=300)
    ids = torch.arange(MASKED).expand(300, MASKED)
    replaced, swapped = objective.shares(ids, batch["noise"])
    for found, share in ((replaced, 0.8), (swapped, 0.1)):
        frequency = torch.bincount(found.flatten(), minlength=MASKED) / 300
        assert (frequency - share).abs().max() < 4 * math.sqrt(share * (1 - share) / 300)


@pytest.mark.parametrize(("count", "parts"), [(1, (1, 0)), (5, (4, 0)), (8, (6, 1)), (13, (10, 1)), (98, (78, 10))])
def test_counts_are_rounded_and_never_more_than_there_are(count, parts):
    objective = an_objective()
    replaced, swapped = objective.shares(torch.arange(count).expand(2, count), torch.tensor([1, 2]))
    assert (replaced.shape[1], swapped.shape[1]) == parts
    assert len(set(torch.cat([replaced, swapped], dim=1)[0].tolist())) == sum(parts)


# ---- colours -------------------------------------------------------------------------------------


def test_a_colour_has_three_bits_of_the_mean_of_each_channel():
    objective = an_objective()
    values = torch.tensor([0.0, 0.124, 0.126, 0.5, 0.874, 0.876, 1.0])
    for red, expected in zip(values, [0, 0, 1, 4, 6, 7, 7], strict=True):
        images = torch.stack([red, values[3], values[6]]).view(1, 3, 1, 1).expand(1, 3, *SIZE)
        assert objective.colours(images).tolist() == [[expected * 64 + 4 * 8 + 7] * N]


def test_the_colour_is_that_of_the_mean_and_not_of_a_pixel():
    noisy = torch.cat([torch.zeros(1, 1, 64, 40), torch.ones(1, 1, 64, 40)], dim=3)
    mixed = noisy[..., torch.randperm(80, generator=torch.Generator().manual_seed(0))]
    means = F.avg_pool2d(mixed, 8).flatten()
    expected = (means * 8).long().clamp(max=7)
    assert an_objective(1).colours(mixed)[0].tolist() == expected.tolist()


@pytest.mark.parametrize(("channels", "colours"), [(1, 8), (2, 64), (3, 512), (4, 4096)])
def test_every_channel_has_three_bits(channels, colours):
    objective, batch = an_objective(channels), a_batch(channels=channels)
    assert objective.head.out_features == colours
    assert objective.colours(batch["images"]).max() < colours
    assert objective.colours(torch.ones(1, channels, *SIZE)).unique().tolist() == [colours - 1]
    assert objective(batch, PROGRESS)["loss"].isfinite().all()


def test_more_colours_than_a_head_should_have_are_refused():
    with pytest.raises(ValueError, match=r"8\*\*5 = 32768 colours for images of 5 channels, more than 8192; use"):
        an_objective(5)


# ---- loss ----------------------------------------------------------------------------------------


def test_the_loss_is_the_cross_entropy_over_all_corrupted_patches_also_those_that_stay():
    objective, batch = an_objective(), a_batch()
    torch.nn.init.normal_(objective.head.weight, std=0.5)
    images, replaced = what_the_encoder_sees(objective, batch)
    logits = objective.head(objective.encoder(images, mask=replaced, mask_token=objective.mask_token).patches)
    colours = objective.colours(batch["images"])  # of the images before the corruption
    entropy = F.cross_entropy(logits.flatten(0, 1), colours.flatten(), reduction="none").view(3, N)
    right = (logits.argmax(dim=2) == colours) & batch["mask"]
    out = objective(batch, PROGRESS)
    assert torch.allclose(out["loss"], (entropy * batch["mask"]).sum(dim=1) / MASKED, atol=1e-5)
    assert torch.allclose(out["accuracy"], right.sum(dim=1) / MASKED)


def test_pixels_of_replaced_patches_cannot_be_seen_and_those_of_kept_ones_can():
    """The colours are held fixed, so that pixels act only as input."""
    objective, batch = an_objective(), a_batch()
    colours = objective.colours(batch["images"])
    objective.colours = lambda images: colours
    objective.swap = lambda images, ids, noise: images
    replaced, _ = objective.shares(ids_of(batch), batch["noise"])
    hidden = torch.zeros_like(batch["mask"]).scatter_(1, replaced, True)
    before = objective(batch, PROGRESS)["loss"]
    for which, same in ((hidden, True), (batch["mask"] & ~hidden, False)):
        patches = patchify(batch["images"], 8)
        images = unpatchify(torch.where(which[..., None], 1 - patches, patches), GRID, 3)
        after = objective({**batch, "images": images}, PROGRESS)["loss"]
        assert torch.equal(after, before) == same


def test_an_untrained_head_knows_nothing():
    assert an_objective()(a_batch(), PROGRESS)["loss"].mean().item() == pytest.approx(math.log(512), abs=0.1)


# ---- picture, learning, refusing -----------------------------------------------------------------


def test_a_picture_shows_the_predicted_colours_of_patches(monkeypatch):
    objective, batch = an_objective(), a_batch()
    colours = objective.colours(batch["images"])
    monkeypatch.setattr(objective.head, "forward", lambda tokens: F.one_hot(colours, 512).float())
    picture = objective.reconstruct(batch, {})
    assert picture.shape == batch["images"].shape
    assert torch.equal(objective.colours(picture), colours)
    assert torch.equal(F.avg_pool2d(picture, 8).repeat_interleave(8, 2).repeat_interleave(8, 3), picture)
    means = F.avg_pool2d(batch["images"], 8)
    assert (F.avg_pool2d(picture, 8) - means).abs().max() <= 1 / 16 + 1e-6  # the middle of the right level


def test_a_few_steps_learn_the_colours_of_one_batch():
    objective, batch = an_objective().train(), a_batch()
    batch["images"] = (batch["images"] + torch.rand(3, 3, 1, 1)) / 2  # images of different colours
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    for _ in range(40):
        out = objective(batch, PROGRESS)
        optimizer.zero_grad()
        out["loss"].mean().backward()
        optimizer.step()
    assert out["accuracy"].mean() > 0.8


@pytest.mark.parametrize(("mask_ratio", "swap_ratio"), [(0.9, 0.2), (-0.1, 0.5), (0.0, 0.0)])
def test_shares_that_are_none_are_refused(mask_ratio, swap_ratio):
    with pytest.raises(ValueError, match=rf"objective\.mask_ratio={mask_ratio} and objective\.swap_ratio={swap_ratio}"):
        an_objective(mask_ratio=mask_ratio, swap_ratio=swap_ratio)
