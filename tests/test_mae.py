"""Masked autoencoder: the published loss, on the masked patches, of each sample alone."""

import re

import pytest
import torch
from peers import distance, gradients, shake

from benchmarks.peer_models import mae_weights
from mim.build import IMAGENET_MEAN, IMAGENET_STD
from mim.encoders import vit
from mim.objectives import mae
from mim.patches import gather, mask_to_ids, patchify, sincos_positions, unpatchify

SIZE, N, MASKED = (32, 32), 16, 12
PROGRESS = torch.tensor(0.0)


def an_objective(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), **changes):
    torch.manual_seed(0)
    cfg = vit.Config("vit_tiny_patch16_224", width=32, depth=2, num_heads=2, patch_size=8, positions="sincos",
                     mean=list(mean), std=list(std))  # fmt: skip
    options = {"decoder_width": 24, "decoder_depth": 1, "decoder_num_heads": 2} | changes
    return mae.build(vit.build(cfg, image_size=SIZE, channels=3), mae.Config(**options)).eval()


def a_batch(rows=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    random = torch.rand(rows, N, generator=generator)  # from which the published program draws its mask
    mask = torch.ones(rows, N, dtype=torch.bool).scatter_(1, random.argsort(dim=1)[:, : N - MASKED], False)
    images = torch.rand(rows, 3, *SIZE, generator=generator)
    noise = torch.randint(2**62, (rows,), generator=generator)
    return {"images": images, "mask": mask, "num_masked": MASKED, "noise": noise, "random": random}


def repainted(images, which):
    """Other pixels in the patches where `which` (B, N) is True."""
    patches = patchify(images, 8)
    return unpatchify(torch.where(which[..., None], 1 - patches, patches), (4, 4), 3)


# ---- parity with the published program -----------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["normalised", "plain"])
def peer(request):
    """Ours and transformers' with the same weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    theirs = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=32,
            patch_size=8, decoder_hidden_size=24, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
            decoder_intermediate_size=96, mask_ratio=MASKED / N, norm_pix_loss=request.param, layer_norm_eps=1e-6,
        )
    ).eval()  # fmt: skip
    # transformers 5.23 leaves the fixed positions of a fresh model at zero: it believes that they are initialised.
    theirs.vit.embeddings.patch_embeddings.projection._is_hf_initialized = False
    theirs.vit.embeddings.initialize_weights()
    theirs.decoder.initialize_weights(N)
    shake(theirs)
    ours = an_objective(mean=IMAGENET_MEAN, std=IMAGENET_STD, norm_pix_loss=request.param)
    found = mae_weights(theirs.state_dict())
    missing = ours.state_dict().keys() - found.keys()
    assert missing == {"encoder.vit.pos_embed"}  # fixed: must be equal already
    ours.load_state_dict(found, strict=False)
    return ours, theirs


def test_the_loss_is_that_of_the_published_program(peer):
    ours, theirs = peer
    for seed in range(3):
        batch = a_batch(rows=1, seed=seed)
        reference = theirs(ours.encoder.normalize(batch["images"]), noise=batch["random"])
        assert torch.equal(reference.mask.bool(), batch["mask"])
        (loss,) = ours(batch, PROGRESS)["loss"]
        assert loss.item() == pytest.approx(reference.loss.item(), rel=1e-5)


def test_the_loss_of_a_batch_is_the_mean_of_its_rows(peer):
    ours, theirs = peer
    batch = a_batch(rows=5)
    reference = theirs(ours.encoder.normalize(batch["images"]), noise=batch["random"]).loss
    assert ours(batch, PROGRESS)["loss"].mean().item() == pytest.approx(reference.item(), rel=1e-5)


def test_gradients_are_those_of_the_published_program(peer):
    ours, theirs = peer
    batch = a_batch(rows=5)
    theirs(ours.encoder.normalize(batch["images"]), noise=batch["random"]).loss.backward()
    ours(batch, PROGRESS)["loss"].mean().backward()
    reference, mine = mae_weights(gradients(theirs)), gradients(ours)
    assert mine.keys() == reference.keys()
    for name, gradient in mine.items():
        assert distance(gradient, reference[name]) < 1e-5, name


def test_positions_of_encoder_and_decoder_are_the_published_ones(peer):
    ours, theirs = peer
    assert torch.allclose(ours.encoder.vit.pos_embed, theirs.vit.embeddings.position_embeddings, atol=1e-6)
    decoder = theirs.decoder.decoder_pos_embed[0]
    assert decoder[1:].any()
    assert not decoder[0].any()  # the class token has none
    assert torch.allclose(ours.positions((4, 4), torch.device("cpu")), decoder[1:], atol=1e-6)


# ---- what is seen and what is compared -----------------------------------------------------------


def test_the_target_of_visible_patches_does_not_matter():
    """Features are held fixed, so that visible pixels act only as targets."""
    objective, batch = an_objective(norm_pix_loss=False), a_batch()
    features = objective.encoder(batch["images"], ids_keep=mask_to_ids(batch["mask"], MASKED)[0])
    objective.encoder.forward = lambda images, **_: features
    before = objective(batch, PROGRESS)["loss"]
    assert torch.equal(
        objective({**batch, "images": repainted(batch["images"], ~batch["mask"])}, PROGRESS)["loss"], before
    )
    assert (objective({**batch, "images": repainted(batch["images"], batch["mask"])}, PROGRESS)["loss"] != before).all()


def test_the_prediction_does_not_see_the_masked_pixels():
    objective, batch = an_objective(norm_pix_loss=False), a_batch()
    repaint = {**batch, "images": repainted(batch["images"], batch["mask"])}
    assert torch.equal(objective.reconstruct(batch, {}), objective.reconstruct(repaint, {}))


def test_the_loss_is_the_mean_squared_error_of_the_masked_patches():
    objective, batch = an_objective(norm_pix_loss=False), a_batch()
    ids_keep, ids_mask, ids_restore = mask_to_ids(batch["mask"], MASKED)
    tokens = objective.decode(objective.encoder(batch["images"], ids_keep=ids_keep), ids_keep, ids_mask, (4, 4))
    pred = gather(objective.decoder_pred(tokens), ids_restore)  # (B, N, P)
    error = (pred - patchify(batch["images"], 8)).square().mean(dim=2)  # (B, N)
    expected = (error * batch["mask"]).sum(dim=1) / MASKED
    assert torch.allclose(objective(batch, PROGRESS)["loss"], expected, atol=1e-6)


@pytest.mark.parametrize("normalised", [True, False])
def test_the_loss_of_a_row_does_not_depend_on_the_others(normalised):
    objective, batch = an_objective(norm_pix_loss=normalised), a_batch(rows=4)
    together = objective(batch, PROGRESS)["loss"]
    for row in range(4):
        part = {k: v[row : row + 1] if torch.is_tensor(v) else v for k, v in batch.items()}
        assert torch.allclose(objective(part, PROGRESS)["loss"], together[row], atol=1e-6)


def test_normalised_targets_have_zero_mean_and_unit_unbiased_variance_in_each_patch():
    target, mean, std = an_objective(norm_pix_loss=True).target(a_batch()["images"])
    assert torch.allclose(target.mean(dim=2), torch.zeros(3, N), atol=1e-5)
    assert torch.allclose(target.var(dim=2, unbiased=True), torch.ones(3, N), atol=1e-3)
    assert torch.allclose(target * std + mean, patchify(a_batch()["images"], 8), atol=1e-5)


def test_a_patch_of_one_colour_has_a_finite_target():
    objective, batch = an_objective(norm_pix_loss=True), a_batch()
    batch["images"] = torch.full_like(batch["images"], 0.4)
    assert objective(batch, PROGRESS)["loss"].isfinite().all()


def test_targets_are_the_pixels_as_the_encoder_normalises_them():
    objective = an_objective(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), norm_pix_loss=False)
    images = a_batch()["images"]
    assert torch.equal(objective.target(images)[0], patchify(objective.encoder.normalize(images), 8))


def test_decoder_tokens_are_the_visible_ones_then_the_masked_ones_each_at_its_position():
    """With the decoder reduced to nothing: the features of visible patches, then the mask token."""
    objective, batch = an_objective(), a_batch()
    objective.decoder_blocks = torch.nn.ModuleList()
    objective.decoder_norm = torch.nn.Identity()
    ids_keep, ids_mask, _ = mask_to_ids(batch["mask"], MASKED)
    features = objective.encoder(batch["images"], ids_keep=ids_keep)
    tokens = objective.decode(features, ids_keep, ids_mask, (4, 4))
    tokens = tokens - sincos_positions((4, 4), 24)[torch.cat([ids_keep, ids_mask], dim=1)]
    assert torch.allclose(tokens[:, : N - MASKED], objective.decoder_embed(features.patches), atol=1e-6)
    assert torch.allclose(tokens[:, N - MASKED :], objective.mask_token.expand(3, MASKED, 24), atol=1e-6)


# ---- partial decoding ----------------------------------------------------------------------------


def test_a_share_of_the_masked_patches_is_decoded_and_compared_and_no_other(monkeypatch):
    objective, batch = an_objective(norm_pix_loss=False, decode_ratio=0.25), a_batch()
    seen = []
    monkeypatch.setattr(objective.decoder_pred, "forward", lambda tokens: seen.append(tokens.shape) or torch.zeros(1))
    _, ids_mask, _ = mask_to_ids(batch["mask"], MASKED)
    chosen = objective.choose(ids_mask, batch["noise"])
    assert chosen.shape == (3, 3)
    error = gather(patchify(batch["images"], 8), chosen).square().mean(dim=(1, 2))  # of a prediction of zeros
    assert torch.allclose(objective(batch, PROGRESS)["loss"], error, atol=1e-6)
    assert seen == [(3, 3, 24)]


def test_the_decoded_patches_are_masked_ones_drawn_for_each_sample_by_its_noise():
    objective, batch = an_objective(decode_ratio=0.5), a_batch(rows=64)
    _, ids_mask, _ = mask_to_ids(batch["mask"], MASKED)
    chosen = objective.choose(ids_mask, batch["noise"])  # (64, 6)
    assert batch["mask"].gather(1, chosen).all()
    assert (chosen.diff(dim=1) > 0).all()  # ascending, so no patch comes twice
    assert torch.equal(objective.choose(ids_mask[5:9], batch["noise"][5:9]), chosen[5:9])
    other = objective.choose(ids_mask, batch["noise"] + 1)
    assert (other != chosen).any(dim=1).sum() > 60
    share = torch.zeros(64, N).scatter_(1, chosen, 1.0).sum(dim=0) / batch["mask"].sum(dim=0)
    assert (share - 0.5).abs().max() < 0.2  # every masked patch has its turn


def test_the_whole_of_the_masked_patches_needs_no_noise_and_at_least_one_is_decoded():
    batch = a_batch()
    assert an_objective().reads == ("images", "mask")
    few = an_objective(decode_ratio=0.01)
    assert few.reads == ("images", "mask", "noise")
    assert few.choose(mask_to_ids(batch["mask"], MASKED)[1], batch["noise"]).shape == (3, 1)


def test_partial_decoding_does_not_change_what_is_reconstructed():
    batch = a_batch()
    whole, part = an_objective(), an_objective(decode_ratio=0.25)
    assert torch.equal(part.reconstruct(batch, {}), whole.reconstruct(batch, {}))
    assert (part(batch, PROGRESS)["loss"] != whole(batch, PROGRESS)["loss"]).all()


@pytest.mark.parametrize("ratio", [0.0, 1.5])
def test_a_share_that_is_none_is_refused(ratio):
    with pytest.raises(ValueError, match=rf"objective\.decode_ratio={ratio} must be above 0 and at most 1"):
        an_objective(decode_ratio=ratio)


# ---- reconstruction ------------------------------------------------------------------------------


@pytest.mark.parametrize("normalised", [True, False])
def test_a_perfect_prediction_reconstructs_the_image(normalised, monkeypatch):
    objective = an_objective(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), norm_pix_loss=normalised)
    batch = a_batch()
    ids_keep, ids_mask, _ = mask_to_ids(batch["mask"], MASKED)
    target = gather(objective.target(batch["images"])[0], torch.cat([ids_keep, ids_mask], dim=1))
    monkeypatch.setattr(objective.decoder_pred, "forward", lambda tokens: target)
    assert torch.allclose(objective.reconstruct(batch, {}, true_statistics=True), batch["images"], atol=1e-5)


def test_without_the_true_statistics_nothing_of_the_masked_pixels_is_in_the_picture():
    objective, batch = an_objective(), a_batch()
    repaint = {**batch, "images": repainted(batch["images"], batch["mask"])}
    found, again = (objective.reconstruct(b, {}) for b in (batch, repaint))
    assert torch.allclose(found, again, atol=1e-6)
    assert not torch.equal(objective.reconstruct(batch, {}, true_statistics=True), found)


def test_a_reconstruction_stays_in_the_range_of_images(monkeypatch):
    objective, batch = an_objective(norm_pix_loss=False), a_batch()
    monkeypatch.setattr(objective.decoder_pred, "forward", lambda tokens: torch.full((3, N, 192), 3.0))
    assert torch.equal(objective.reconstruct(batch, {}), torch.ones(3, 3, *SIZE))


# ---- learning and refusing -----------------------------------------------------------------------


def test_a_few_steps_lower_the_loss_on_one_batch():
    objective, batch = an_objective(norm_pix_loss=False).train(), a_batch()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = objective(batch, PROGRESS)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_an_encoder_that_cannot_drop_is_refused():
    class Dense:
        can_drop = False

    with pytest.raises(ValueError, match=r"objective\.name=mae needs an encoder that can drop patches") as error:
        mae.build(Dense(), mae.Config())
    able = [name for name in ("vit", "eva", "beit", "dense") if re.search(rf"\b{name}\b", str(error.value))]
    assert able == ["vit", "eva"]  # tests/test_contracts.py: these can


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_num_heads": 5}, "decoder_width=24 must divide by 4 .* objective.decoder_num_heads=5"),
        ({"decoder_width": 30}, "decoder_width=30 must divide by 4"),
        ({"decoder_width": 0}, "decoder_width=0 must"),
        ({"decoder_num_heads": 0}, "decoder_num_heads=0 must be at least 1"),
        ({"decoder_depth": -1}, "decoder_depth=-1 must be at least 1"),
    ],
)
def test_a_decoder_that_cannot_be_is_refused_with_its_numbers(changes, message):
    with pytest.raises(ValueError, match=f"objective.{message}"):
        an_objective(**changes)
