"""SimMIM: raw pixels of masked patches, from one linear layer over any encoder that replaces tokens."""

import math

import pytest
import torch
from peers import distance, gradients, shake

from benchmarks.peer_models import renamed
from mim.build import IMAGENET_MEAN, IMAGENET_STD
from mim.contracts import Features
from mim.encoders import vit
from mim.objectives import simmim
from mim.patches import gather, mask_to_ids, patchify, unpatchify

SIZE, N, MASKED = (32, 32), 16, 10
PROGRESS = torch.tensor(0.0)


def an_objective(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)):
    torch.manual_seed(0)
    cfg = vit.Config("vit_tiny_patch16_224", width=32, depth=2, num_heads=2, patch_size=8,
                     mean=list(mean), std=list(std))  # fmt: skip
    return simmim.build(vit.build(cfg, image_size=SIZE, channels=3), simmim.Config()).eval()


def a_batch(rows=3):
    generator = torch.Generator().manual_seed(0)
    mask = torch.stack([torch.randperm(N, generator=generator) < MASKED for _ in range(rows)])
    return {"images": torch.rand(rows, 3, *SIZE, generator=generator), "mask": mask, "num_masked": MASKED}


def pixels_of(mask, size=8):
    """A mask (B, N) of a square grid as pixels (B, 1, H, W)."""
    side = math.isqrt(mask.shape[1])
    return mask.view(-1, 1, side, side).repeat_interleave(size, 2).repeat_interleave(size, 3)


def repainted(images, mask):
    return torch.where(pixels_of(mask), 1 - images, images)


# ---- parity --------------------------------------------------------------------------------------


@pytest.fixture
def peer():
    """Ours and transformers' program after SimMIM, with the same weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    theirs = transformers.ViTForMaskedImageModeling(
        transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=32,
            patch_size=8, encoder_stride=8, layer_norm_eps=1e-6,
        )
    ).eval()  # fmt: skip
    shake(theirs)
    ours = an_objective(IMAGENET_MEAN, IMAGENET_STD)
    ours.load_state_dict(ours_of(theirs.state_dict()))
    return ours, theirs


def ours_of(state):
    """Their tensors under our names; the rows of the head from (channel, row, column) to (row, column, channel)."""
    renames = [
        ("vit.embeddings.mask_token", "mask_token"),
        ("vit.embeddings.", "encoder.vit.embeddings."),
        ("vit.layers", "encoder.vit.blocks"),
        ("vit.layernorm.", "encoder.vit.norm."),
        ("decoder.0", "head"),
    ]
    found = renamed(state, renames)
    weight, bias = found["head.weight"], found["head.bias"]
    found["head.weight"] = weight.reshape(3, 64, 32).transpose(0, 1).reshape(192, 32)
    found["head.bias"] = bias.reshape(3, 64).T.reshape(192)
    return found


def test_the_loss_is_that_of_the_published_program_whose_denominator_has_1e_5_more(peer):
    ours, theirs = peer
    batch = a_batch(rows=5)
    reference = theirs(ours.encoder.normalize(batch["images"]), bool_masked_pos=batch["mask"]).loss
    assert ours(batch, PROGRESS)["loss"].mean().item() == pytest.approx(reference.item(), rel=1e-5)


def test_gradients_are_those_of_the_published_program(peer):
    ours, theirs = peer
    batch = a_batch(rows=5)
    theirs(ours.encoder.normalize(batch["images"]), bool_masked_pos=batch["mask"]).loss.backward()
    ours(batch, PROGRESS)["loss"].mean().backward()
    reference, mine = ours_of(gradients(theirs)), gradients(ours)
    assert mine.keys() == reference.keys()
    for name, gradient in mine.items():
        assert distance(gradient, reference[name]) < 1e-5, name


def test_predicted_images_are_those_of_the_published_program(peer):
    ours, theirs = peer
    batch = a_batch()
    theirs.decoder[0].weight.data.mul_(0.02)  # so that no pixel leaves [0, 1], where pictures are clamped
    theirs.decoder[0].bias.data.mul_(0.02)
    ours.load_state_dict(ours_of(theirs.state_dict()))
    reference = theirs(ours.encoder.normalize(batch["images"]), bool_masked_pos=batch["mask"]).reconstruction
    found = ours.encoder.normalize(ours.reconstruct(batch, {}))
    assert distance(found, reference) < 1e-5


# ---- what is seen and what is compared -----------------------------------------------------------


def test_the_loss_is_the_mean_absolute_error_of_the_masked_pixels_as_the_encoder_normalises_them():
    objective, batch = an_objective((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), a_batch()
    features = objective.encoder(batch["images"], mask=batch["mask"], mask_token=objective.mask_token)
    pred = unpatchify(objective.head(features.patches), (4, 4), 3)
    error = (pred - objective.encoder.normalize(batch["images"])).abs().mean(dim=1, keepdim=True)  # (B, 1, H, W)
    hidden = pixels_of(batch["mask"])
    expected = (error * hidden).sum(dim=(1, 2, 3)) / hidden.sum(dim=(1, 2, 3))
    assert torch.allclose(objective(batch, PROGRESS)["loss"], expected, atol=1e-6)


def test_visible_pixels_are_no_targets_and_masked_ones_are():
    """Features are held fixed, so that pixels act only as targets."""
    objective, batch = an_objective(), a_batch()
    features = objective.encoder(batch["images"], mask=batch["mask"], mask_token=objective.mask_token)
    masked = features._replace(patches=gather(features.patches, mask_to_ids(batch["mask"], batch["num_masked"])[1]))
    objective.encoder.forward = lambda images, **_: masked
    before = objective(batch, PROGRESS)["loss"]
    visible = {**batch, "images": repainted(batch["images"], ~batch["mask"])}
    hidden = {**batch, "images": repainted(batch["images"], batch["mask"])}
    assert torch.equal(objective(visible, PROGRESS)["loss"], before)
    assert (objective(hidden, PROGRESS)["loss"] != before).all()


def test_the_prediction_does_not_see_the_masked_pixels():
    objective, batch = an_objective(), a_batch()
    hidden = {**batch, "images": repainted(batch["images"], batch["mask"])}
    assert torch.equal(objective.reconstruct(hidden, {}), objective.reconstruct(batch, {}))


def test_an_encoder_of_stride_32_predicts_squares_of_32_pixels():
    class Pyramid(torch.nn.Module):
        """The end of a hierarchical encoder: its grid is coarser than its patches were."""

        width, depth, channels, patch_size, can_drop = 24, 4, 3, 32, False

        def __init__(self):
            super().__init__()
            self.cells = torch.nn.Conv2d(3, 24, 32, 32)

        def grid(self, size):
            return size[0] // 32, size[1] // 32

        def normalize(self, images):
            return images * 2 - 1

        def forward(self, images, *, mask, mask_token, ids_read):
            x = self.cells(self.normalize(images)).flatten(2).transpose(1, 2)
            return Features(x[:, :0], gather(torch.where(mask.unsqueeze(-1), mask_token, x), ids_read))

    objective = simmim.build(Pyramid(), simmim.Config())
    assert objective.head.out_features == 32 * 32 * 3
    images = torch.rand(2, 3, 96, 96)
    mask = (torch.arange(9) % 2 == 0).expand(2, 9)
    out = objective({"images": images, "mask": mask, "num_masked": 5}, PROGRESS)
    objective.head.weight.data.zero_()
    objective.head.bias.data.zero_()
    zero = objective({"images": images, "mask": mask, "num_masked": 5}, PROGRESS)["loss"]
    hidden = pixels_of(mask, 32).expand(2, 3, 96, 96)
    expected = [(images[row] * 2 - 1).abs()[hidden[row]].mean() for row in range(2)]
    assert torch.allclose(zero, torch.stack(expected), atol=1e-6)
    assert out["loss"].shape == (2,)


# ---- start, picture, learning --------------------------------------------------------------------


def test_the_mask_token_starts_within_two_hundredths():
    torch.manual_seed(0)
    cfg = vit.Config("vit_tiny_patch16_224", width=768, depth=1, num_heads=2, patch_size=8)
    token = simmim.build(vit.build(cfg, image_size=SIZE, channels=3), simmim.Config()).mask_token
    assert token.abs().max() <= 0.02
    assert token.std().item() == pytest.approx(0.0108, rel=0.1)


def test_a_perfect_prediction_reconstructs_the_image(monkeypatch):
    objective, batch = an_objective((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), a_batch()
    target = patchify(objective.encoder.normalize(batch["images"]), 8)
    monkeypatch.setattr(objective.head, "forward", lambda tokens: target)
    assert torch.allclose(objective.reconstruct(batch, {}), batch["images"], atol=1e-5)


def test_a_few_steps_lower_the_loss_on_one_batch():
    objective, batch = an_objective((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)).train(), a_batch()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(100):
        loss = objective(batch, PROGRESS)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
