"""The benchmark against other libraries: equal work, or none is timed."""

import importlib.util

import pytest
import torch

from benchmarks import peer_models, peers, steps

SMALL = ["encoder.width=32", "encoder.depth=2", "encoder.num_heads=2"]
OF = {
    "mae": [*SMALL, "objective.decoder_width=16", "objective.decoder_depth=1", "objective.decoder_num_heads=2"],
    "beit": SMALL,
}
INSTALLED = [
    (objective, package)
    for objective, makers in peer_models.PEERS.items()
    for package in makers
    if importlib.util.find_spec(package) is not None
]


@pytest.fixture(params=INSTALLED, ids=lambda found: " ".join(found))
def shared(request):
    """Ours, another library's with the same weights, and a batch."""
    objective, package = request.param
    given = peers.parse(["--size", "tiny", "--cpu", "--set", *OF[objective]])
    built = steps.built_of(peers.Case.work(objective, given, "no"))
    (other,) = peers.peers_of(objective, built, [package]).values()
    return built.objective, {package: other}, peers.with_pixels(built.objective, steps.synthetic(built, 4))


def test_losses_are_equal_with_equal_weights_whatever_the_attention(shared):
    objective, others, batch = shared
    for eager in (False, True):
        for module in others.values():
            module.attend(eager=eager)
        found = peers.check_equal(objective, others, batch)
        assert len(found) == 2


def test_other_weights_are_not_timed(shared):
    objective, others, batch = shared
    (module,) = others.values()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "mlp.fc1.weight" in name:
                parameter.mul_(1.05)
    with pytest.raises(peers.Unequal, match="they do not do the same work"):
        peers.check_equal(objective, others, batch)


def test_eager_attention_calls_no_fused_kernel(shared):
    _, others, batch = shared
    (module,) = others.values()
    calls = {}
    for eager in (False, True):
        module.attend(eager=eager)
        with torch.profiler.profile() as found:
            module(batch["pixels"], batch)
        calls[eager] = sum("scaled_dot_product" in event.key for event in found.key_averages())
    assert calls[True] == 0 < calls[False]


def test_a_small_run_tells_ratios_for_every_variant(monkeypatch):
    monkeypatch.setattr(peers.rounds, "peak_shapes", lambda *_: [(64, 64, 64)])
    monkeypatch.setattr(peers.rounds, "LEAST", 1e-4)
    pytest.importorskip("transformers")
    options = ["--cases", "mae", "--size", "tiny", "--cpu", "--batch-size", "2", "--rounds", "2"]
    found = peers.main([*options, "--only", "transformers", "--set", *OF["mae"]])["cases"]["mae"]
    assert list(found["variants"]) == [
        f"{name} {precision}"
        for precision in ("bf16", "fp32")
        for name in ("ours", "transformers", "transformers eager")
    ]
    row = found["variants"]["transformers fp32"]
    ours = found["variants"]["ours bf16"]["seconds"]
    expected = sorted(a / b for a, b in zip(row["seconds"], ours, strict=True))
    assert row["ours bf16 is faster by"]["low"] == expected[0]
    assert row["ours bf16 is faster by"]["high"] == expected[-1]
    assert "ours fp32 is faster by" not in found["variants"]["ours bf16"]
