"""Tokenizers of vectors: what they refuse, what they write, and that they learn pixels or a teacher's features."""

import pytest
import torch
from torch.nn import functional as F

import tokenizer as tokenizers
from tokenizer import fsq, vqkd

SMALL = {"channels": 3, "image_size": 16, "stride": 4, "width": 24, "depth": 1, "num_heads": 2,
         "decoder_width": 24, "decoder_depth": 1, "decoder_num_heads": 2, "target_width": 12}  # fmt: skip
CONV = {"network": "conv", "target": "pixels", "stride": 4, "width": 8, "depth": 1, "decoder_width": 16}
KINDS = {
    # decay 0.9: at 0.99 a code that nothing takes is dead after 230 steps only
    "features": (vqkd, {**SMALL, "num_codes": 32, "code_width": 8, "decay": 0.9}),
    "vit to pixels": (vqkd, {**SMALL, "target": "pixels", "num_codes": 32, "code_width": 8, "decay": 0.9}),
    "conv to pixels": (vqkd, {**CONV, "num_codes": 32, "code_width": 8, "decay": 0.9}),
    "fsq to features": (fsq, {**SMALL, "levels": [4, 4, 3]}),
    "fsq to pixels": (fsq, {**CONV, "levels": [4, 4, 3]}),
}


def a_tokenizer(kind):
    module, options = KINDS[kind]
    torch.manual_seed(0)
    return module.build(module.Config(**options))


def a_batch(b=8, size=16):
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(b, 3, 4, 4, generator=generator)
    images = F.interpolate(coarse, size=size, mode="nearest")
    targets = coarse.flatten(2).transpose(1, 2).repeat(1, 1, 4)  # (B, 16, 12): what each patch shows
    return {"images": images, "targets": targets, "noise": torch.arange(b), "position": b}


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_its_target(kind):
    tokenizer, batch = a_tokenizer(kind).train(), a_batch()
    tokenizer.start(iter([batch] * 40))
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=3e-3)
    losses = []
    for step in range(150):
        out = tokenizer.loss(batch, torch.tensor(0.0))
        out["loss"].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        tokenizer.after_step(step, torch.tensor(0.0))
        losses.append(out["loss"].mean().item())
    assert min(losses[-10:]) < 0.5 * losses[0]
    assert len(out["codes"].unique()) >= 8


@pytest.mark.parametrize("kind", KINDS)
def test_codes_decode_on_any_grid_and_come_back_from_a_file(kind, tmp_path):
    tokenizer = a_tokenizer(kind).eval()
    module, options = KINDS[kind]
    images = torch.rand(2, 3, 16, 24)
    codes = tokenizer.encode(images)
    assert codes.shape == (2, 24)
    assert codes.dtype == torch.int64
    decoded = tokenizer.decode(codes, (4, 6))
    assert decoded.shape == ((2, 24, 12) if tokenizer.target == "features" else (2, 3, 16, 24))
    name = module.__name__.removeprefix("tokenizer.")
    tokenizers.save(tokenizer, tmp_path, name=name, config=vars(module.Config(**options)), card={})
    assert torch.equal(tokenizers.load(tmp_path).encode(images), codes)


def test_k_means_takes_whole_steps_whatever_the_split():
    """16 vectors per code are wanted: of 16 per image and 32 codes, 32 images, so 4 steps of 8."""
    images = torch.rand(64, 3, 16, 16)

    def started(rows):
        tokenizer = a_tokenizer("conv to pixels")
        batches = (
            {"images": images[i : i + rows], "noise": torch.arange(i, i + rows), "position": 8 * (i // 8 + 1)}
            for i in range(0, 64, rows)
        )
        tokenizer.start(batches)
        return tokenizer.quantizer.codes, next(batches, {"position": None})["position"]

    (whole, after), (parts, also) = started(8), started(2)
    assert torch.allclose(whole, parts, atol=1e-5)
    assert after == 48
    assert also == 40  # the second micro-batch of the step that was looked at


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "depth"}, "tokenizer.target='depth' is unknown; choose features or pixels"),
        ({"network": "mlp"}, "tokenizer.network='mlp' is unknown; choose vit or conv"),
        ({"network": "conv"}, "tokenizer.network=conv decodes to pixels"),
        ({"network": "conv", "target": "pixels", "stride": 6}, "tokenizer.stride=6 is no power of two"),
        ({"num_heads": 5}, "tokenizer.width=24 does not divide by 5 heads"),
        ({"stride": 5}, "tokenizer.image_size=16 does not divide by tokenizer.stride=5"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_sentence(changes, message):
    with pytest.raises(ValueError, match=message):
        vqkd.build(vqkd.Config(**{**SMALL, **changes}))
