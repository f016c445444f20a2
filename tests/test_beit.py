"""BEiT: the codes of masked patches are predicted from the visible ones, and from nothing else."""

import math

import pytest
import torch
import torch.nn.functional as F

from mim.encoders import vit
from mim.objectives import beit
from mim.patches import patchify, unpatchify

SIZE, N, MASKED, CODES = (32, 48), 24, 10, 20
PROGRESS = torch.tensor(0.0)


@pytest.fixture
def objective():
    torch.manual_seed(0)
    cfg = vit.Config("vit_tiny_patch16_224", width=32, depth=2, num_heads=2, patch_size=8, layer_scale=0.1)
    built = beit.build(vit.build(cfg, image_size=SIZE, channels=3), beit.Config(num_codes=CODES)).eval()
    torch.nn.init.normal_(built.head.weight, std=0.5)  # logits that differ
    return built


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    mask = torch.stack([torch.randperm(N, generator=generator) < MASKED for _ in range(3)])
    images = torch.rand(3, 3, *SIZE, generator=generator)
    codes = torch.randint(CODES, (3, N), generator=generator)
    return {"images": images, "mask": mask, "num_masked": MASKED, "codes": codes}


def repainted(images, which):
    patches = patchify(images, 8)
    return unpatchify(torch.where(which[..., None], 1 - patches, patches), (4, 6), 3)


def test_the_loss_is_the_cross_entropy_of_the_masked_positions(objective, batch):
    logits = objective.head(
        objective.encoder(batch["images"], mask=batch["mask"], mask_token=objective.mask_token).patches
    )  # (B, N, V)
    entropy = F.cross_entropy(logits.flatten(0, 1), batch["codes"].flatten(), reduction="none").view(3, N)
    out = objective(batch, PROGRESS)
    assert torch.allclose(out["loss"], (entropy * batch["mask"]).sum(dim=1) / MASKED, atol=1e-6)
    right = (logits.argmax(dim=2) == batch["codes"]) & batch["mask"]
    assert torch.allclose(out["accuracy"], right.sum(dim=1) / MASKED)


def test_pixels_of_masked_patches_change_neither_loss_nor_accuracy(objective, batch):
    before = objective(batch, PROGRESS)
    after = objective({**batch, "images": repainted(batch["images"], batch["mask"])}, PROGRESS)
    assert torch.equal(before["loss"], after["loss"])
    assert torch.equal(before["accuracy"], after["accuracy"])


def test_pixels_of_visible_patches_change_the_loss(objective, batch):
    before = objective(batch, PROGRESS)["loss"]
    after = objective({**batch, "images": repainted(batch["images"], ~batch["mask"])}, PROGRESS)["loss"]
    assert (before != after).all()


def test_codes_of_visible_positions_do_not_matter(objective, batch):
    before = objective(batch, PROGRESS)
    other = torch.where(batch["mask"], batch["codes"], (batch["codes"] + 1) % CODES)
    after = objective({**batch, "codes": other}, PROGRESS)
    assert torch.equal(before["loss"], after["loss"])
    assert torch.equal(before["accuracy"], after["accuracy"])


def test_codes_of_masked_positions_matter(objective, batch):
    other = torch.where(batch["mask"], (batch["codes"] + 1) % CODES, batch["codes"])
    assert (objective({**batch, "codes": other}, PROGRESS)["loss"] != objective(batch, PROGRESS)["loss"]).all()


def test_the_head_runs_on_masked_positions_only(objective, batch):
    shapes = []
    objective.head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(inputs[0].shape)))
    objective(batch, PROGRESS)
    assert shapes == [(3, MASKED, 32)]


def test_accuracy_counts_right_codes(objective, batch):
    logits = objective.head(
        objective.encoder(batch["images"], mask=batch["mask"], mask_token=objective.mask_token).patches
    )
    best = logits.argmax(dim=2)
    assert objective({**batch, "codes": best}, PROGRESS)["accuracy"].tolist() == [1.0, 1.0, 1.0]
    assert objective({**batch, "codes": (best + 1) % CODES}, PROGRESS)["accuracy"].tolist() == [0.0, 0.0, 0.0]


def test_the_loss_of_a_row_does_not_depend_on_the_others(objective, batch):
    together = objective(batch, PROGRESS)["loss"]
    for row in range(3):
        part = {k: v[row : row + 1] if torch.is_tensor(v) else v for k, v in batch.items()}
        assert torch.allclose(objective(part, PROGRESS)["loss"], together[row], atol=1e-6)


def test_an_untrained_head_knows_nothing():
    cfg = vit.Config("vit_tiny_patch16_224", width=32, depth=2, num_heads=2, patch_size=8)
    torch.manual_seed(0)
    fresh = beit.build(vit.build(cfg, image_size=SIZE, channels=3), beit.Config(num_codes=CODES)).eval()
    mask = torch.ones(1, N, dtype=torch.bool)
    mask[:, 0] = False
    given = {
        "images": torch.rand(1, 3, *SIZE),
        "mask": mask,
        "num_masked": N - 1,
        "codes": torch.arange(N)[None] % CODES,
    }
    assert fresh(given, PROGRESS)["loss"].item() == pytest.approx(math.log(CODES), abs=0.1)


def test_the_mask_token_is_learned_and_stays_out_of_the_encoder(objective, batch):
    objective(batch, PROGRESS)["loss"].sum().backward()
    assert objective.mask_token.grad.any()
    assert not {name for name in objective.encoder.state_dict() if "mask_token" in name}


def test_a_reconstruction_decodes_predictions_under_the_mask_and_true_codes_elsewhere(objective, batch):
    class Tokenizer:
        def decode(self, codes, grid):
            self.seen = codes, grid
            return torch.zeros(3, 3, *SIZE)

    tokenizer = Tokenizer()
    logits = objective.head(
        objective.encoder(batch["images"], mask=batch["mask"], mask_token=objective.mask_token).patches
    )
    objective.reconstruct(batch, {"tokenizer": tokenizer})
    codes, grid = tokenizer.seen
    assert grid == (4, 6)
    assert torch.equal(codes[~batch["mask"]], batch["codes"][~batch["mask"]])
    assert torch.equal(codes[batch["mask"]], logits.argmax(dim=2)[batch["mask"]])


def test_a_few_steps_learn_the_codes_of_one_batch(objective, batch):
    objective.train()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    for _ in range(60):
        out = objective(batch, PROGRESS)
        optimizer.zero_grad()
        out["loss"].mean().backward()
        optimizer.step()
    assert out["accuracy"].mean() > 0.9
