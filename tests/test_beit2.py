"""BEiT v2: BEiT, and the same codes once more from early patch tokens and the final class token."""

import pytest
import torch

from mim.contracts import Features
from mim.encoders import beit as beit_encoder
from mim.encoders import vit
from mim.objectives import beit, beit2
from mim.patches import patchify, unpatchify

SIZE, N, MASKED, CODES = (32, 48), 24, 10, 20
PROGRESS = torch.tensor(0.0)
EARLY = 2


def an_encoder(**changes):
    options = {"width": 32, "depth": 4, "num_heads": 2, "patch_size": 8, "layer_scale": 0.1} | changes
    return vit.build(vit.Config("vit_tiny_patch16_224", **options), image_size=SIZE, channels=3)


@pytest.fixture
def objective():
    torch.manual_seed(0)
    built = beit2.build(an_encoder(), beit2.Config(num_codes=CODES, early_layer=EARLY)).eval()
    torch.nn.init.normal_(built.head.weight, std=0.5)  # logits that differ
    return built


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    mask = torch.stack([torch.randperm(N, generator=generator) < MASKED for _ in range(3)])
    images = torch.rand(3, 3, *SIZE, generator=generator)
    codes = torch.randint(CODES, (3, N), generator=generator)
    return {"images": images, "mask": mask, "num_masked": MASKED, "codes": codes}


def by_hand(objective, batch):
    """Logits (B, N, V) of the encoder and of the way through the class token, block by block."""
    tokens = objective.encoder._embed(batch["images"], batch["mask"], objective.mask_token, None)
    for number, block in enumerate(objective.encoder.vit.blocks, 1):
        tokens = block(tokens)
        if number == EARLY:
            early = tokens
    extra = torch.cat([tokens[:, :1], early[:, 1:]], dim=1)
    for block in objective.extra_blocks.blocks:
        extra = block(extra)
    return tuple(objective.head(objective.encoder.final_norm(x))[:, 1:] for x in (tokens, extra))


def test_both_predictions_of_the_masked_codes_add_up_to_the_loss(objective, batch):
    out = objective(batch, PROGRESS)
    losses, accuracies = [], []
    for logits in by_hand(objective, batch):
        hidden = logits[batch["mask"]].view(3, MASKED, CODES)
        codes = batch["codes"][batch["mask"]].view(3, MASKED)
        losses.append(-hidden.log_softmax(dim=2).gather(2, codes.unsqueeze(2)).mean(dim=(1, 2)))
        accuracies.append((hidden.argmax(dim=2) == codes).float().mean(dim=1))
    assert torch.allclose(out["loss"], sum(losses), atol=1e-5)
    assert torch.allclose(out["accuracy"], accuracies[0])
    assert torch.allclose(out["class_accuracy"], accuracies[1])


def test_the_first_part_of_the_loss_is_that_of_beit(objective, batch):
    plain = beit.build(objective.encoder, beit.Config(num_codes=CODES)).eval()
    plain.head, plain.mask_token = objective.head, objective.mask_token
    objective.extra_blocks.forward = lambda features, grid: features
    replaced = {"mask": batch["mask"], "mask_token": objective.mask_token}
    (early,) = objective.encoder.layers(batch["images"], [EARLY - 1], **replaced)
    logits = objective.predict(early.patches)[batch["mask"]]
    through = torch.nn.functional.cross_entropy(logits, batch["codes"][batch["mask"]], reduction="none")
    expected = plain(batch, PROGRESS)["loss"] + through.view(3, MASKED).mean(dim=1)
    assert torch.allclose(objective(batch, PROGRESS)["loss"], expected, atol=1e-5)


def test_later_blocks_reach_the_second_prediction_through_the_class_token_alone(objective, batch):
    """With the class token held fixed, the second prediction does not feel the blocks after the early one."""
    seen = []
    objective.extra_blocks.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    objective(batch, PROGRESS)
    with torch.no_grad():
        objective.encoder.vit.blocks[EARLY].mlp.fc2.weight.add_(0.5)
    objective(batch, PROGRESS)
    (before, _), (after, _) = seen
    assert torch.equal(before.patches, after.patches)
    assert not torch.allclose(before.prefix, after.prefix, atol=1e-3)
    grid = (4, 6)
    kept = objective.extra_blocks(Features(before.prefix, after.patches), grid).patches
    assert torch.equal(kept, objective.extra_blocks(before, grid).patches)


def test_both_predictions_share_the_norm_and_the_head(objective):
    own = {name.split(".")[0] for name, _ in objective.named_parameters() if not name.startswith("encoder.")}
    assert own == {"mask_token", "extra_blocks", "head"}
    assert not [name for name, _ in objective.extra_blocks.named_parameters() if "final" in name]


def test_the_encoder_runs_once(objective, batch):
    calls = []
    objective.encoder.vit.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    objective(batch, PROGRESS)
    assert len(calls) == 1


def test_extra_blocks_are_as_many_as_asked_and_drop_paths_as_the_blocks_beside_them():
    built = beit2.build(an_encoder(drop_path_rate=0.3), beit2.Config(num_codes=CODES, early_layer=1, head_layers=3))
    rates = [block.drop_path1.drop_prob for block in built.extra_blocks.blocks]
    assert rates == pytest.approx([0.1, 0.2, 0.3])


def test_with_registers_the_early_patches_are_joined_with_all_of_the_prefix(batch):
    built = beit2.build(an_encoder(num_registers=2), beit2.Config(num_codes=CODES, early_layer=EARLY)).eval()
    seen = []
    built.extra_blocks.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].prefix.shape))
    built(batch, PROGRESS)
    assert seen == [(3, 3, 32)]


def test_an_encoder_without_class_token_is_refused(batch):
    encoder = an_encoder()
    built = beit2.build(encoder, beit2.Config(num_codes=CODES, early_layer=EARLY)).eval()
    layers = encoder.layers
    encoder.layers = lambda *args, **options: [Features(f.prefix[:, :0], f.patches) for f in layers(*args, **options)]
    with pytest.raises(ValueError, match="predicts through the class token, but this encoder has none"):
        built(batch, PROGRESS)


def test_pixels_of_masked_patches_change_nothing(objective, batch):
    patches = patchify(batch["images"], 8)
    repainted = unpatchify(torch.where(batch["mask"][..., None], 1 - patches, patches), (4, 6), 3)
    before, after = objective(batch, PROGRESS), objective({**batch, "images": repainted}, PROGRESS)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_codes_of_visible_positions_do_not_matter_and_masked_ones_do(objective, batch):
    before = objective(batch, PROGRESS)["loss"]
    shifted = (batch["codes"] + 1) % CODES
    visible = torch.where(batch["mask"], batch["codes"], shifted)
    hidden = torch.where(batch["mask"], shifted, batch["codes"])
    assert torch.equal(objective({**batch, "codes": visible}, PROGRESS)["loss"], before)
    assert (objective({**batch, "codes": hidden}, PROGRESS)["loss"] != before).all()


def test_mask_token_and_head_start_within_two_hundredths():
    torch.manual_seed(0)
    fresh = beit2.build(an_encoder(width=192, num_heads=3), beit2.Config(num_codes=512, early_layer=EARLY))
    assert fresh.head.weight.abs().max() <= 0.02
    assert fresh.mask_token.abs().max() <= 0.02
    assert fresh.head.weight.std().item() == pytest.approx(0.0108, rel=0.01)
    assert not fresh.head.bias.any()


def test_a_few_steps_learn_the_codes_of_one_batch_on_both_ways(objective, batch):
    objective.train()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    for _ in range(60):
        out = objective(batch, PROGRESS)
        optimizer.zero_grad()
        out["loss"].mean().backward()
        optimizer.step()
    assert out["accuracy"].mean() > 0.9
    assert out["class_accuracy"].mean() > 0.9


@pytest.mark.parametrize("early", [0, 4, 9])
def test_an_early_layer_that_is_none_or_the_last_is_refused(early):
    with pytest.raises(ValueError, match=rf"objective\.early_layer={early} must lie from 1 to 3: the encoder has 4"):
        beit2.build(an_encoder(), beit2.Config(early_layer=early))


@pytest.mark.parametrize("module", [beit, beit2])
def test_no_codes_are_refused(module):
    with pytest.raises(ValueError, match=r"objective\.num_codes=-3 must be the tokenizer's number, at least 1"):
        module.build(an_encoder(), module.Config(num_codes=-3))


def test_no_extra_blocks_are_refused():
    with pytest.raises(ValueError, match=r"objective\.head_layers=0 must be at least 1; without, use objective"):
        beit2.build(an_encoder(), beit2.Config(early_layer=1, head_layers=0))


def test_over_relative_positions_the_extra_blocks_share_the_encoder_s_table():
    torch.manual_seed(0)
    cfg = beit_encoder.Config(width=32, depth=3, num_heads=2, patch_size=8)
    encoder = beit_encoder.build(cfg, image_size=(32, 32), channels=3)
    built = beit2.build(encoder, beit2.Config(num_codes=CODES, early_layer=1))
    names = [name for name, _ in built.named_parameters() if "relative_position" in name]
    assert names == ["encoder.vit.rel_pos_bias.relative_position_bias_table"]
    features = encoder.layers(torch.rand(2, 3, 32, 32), [0])[0]
    before = built.extra_blocks(features, (4, 4)).patches
    encoder.vit.rel_pos_bias.relative_position_bias_table.data.normal_()
    assert not torch.allclose(built.extra_blocks(features, (4, 4)).patches, before, atol=1e-4)
