"""What a device holds when a step is spread over several, and which way is proposed."""

from dataclasses import replace

import pytest

from mim import build, config, job
from mim.blocks import blocks
from mim.config import ConfigError
from mim.planning import footprint, spread
from mim.planning.spread import GIB, Load, Way


@pytest.fixture
def cfg(recipe):
    """`cfg(section__key=value)`: the typed recipe of a tiny MAE."""

    def typed(**changes):
        sections = recipe() | {"train": {"cpu": True}}
        for key, value in changes.items():
            section, _, name = key.partition("__")
            sections[section][name] = value
        return config.typed(job.Config, sections)

    return typed


def test_operations_of_mae_with_the_widths_of_vit_b_are_those_of_the_closed_formula():
    """Forward and backward of linear layers are three products; 50 of 197 tokens pass the encoder."""
    depth, decoder_depth = 2, 1
    overrides = [f"encoder.depth={depth}", f"objective.decoder_depth={decoder_depth}"]
    cfg = config.typed(job.Config, config.read("mae_vitb16_in1k", overrides))
    block = lambda tokens, width: 24 * tokens * width**2 + 4 * tokens**2 * width  # noqa: E731
    stem, head = 2 * 196 * 768 * 768, 2 * 196 * 512 * 768
    forward = stem + depth * block(50, 768) + 2 * 50 * 768 * 512 + decoder_depth * block(197, 512) + head
    assert spread.load(cfg, Way(), rows=2).flops == pytest.approx(3 * forward, rel=0.1)  # rows that nobody reads


def test_adamw_keeps_two_copies_of_what_is_trained_and_the_update_moves_seven(cfg):
    found = spread.load(cfg(), Way())
    assert found.state["optimizer"] == 2 * found.gradients
    assert found.traffic == 7 * found.gradients  # weight, gradient and two moments read; all but the gradient written


def test_one_device_holds_what_its_footprint_says(cfg):
    one = spread.load(cfg(), Way())
    built = build.build(config.plain(cfg()), load_frozen=False)
    cost = footprint.measure(built, cfg().optim, rows=8, micro_batches=1, precision="no")
    assert one.total == cost.total


def test_ddp_holds_gradients_for_the_whole_step(cfg):
    same_rows = spread.load(cfg(optim__batch_size=16), Way(ranks=2))
    assert same_rows.rows == 8
    assert same_rows.total > spread.load(cfg(), Way()).total


def test_fsdp_holds_shares_and_gathers_what_runs(cfg):
    whole, shared = (spread.load(cfg(), Way(ranks=4, shard=shard)) for shard in (False, True))
    for name in ("weights", "optimizer"):
        assert shared.state[name] == -(-whole.state[name] // 4)
    assert (shared.gradients, shared.activations) == (whole.gradients // 4, whole.activations)
    built = build.build(config.plain(cfg()), load_frozen=False)
    sizes = [4 * sum(p.numel() for p in block.parameters()) for block in blocks(built.objective).values()]
    everything = 4 * sum(p.numel() for p in built.objective.parameters())
    assert shared.gathered == everything - sum(sizes) + 3 * max(sizes)


def test_gradients_that_add_up_over_micro_batches_are_not_shared(cfg):
    once, twice = (spread.load(cfg(), Way(ranks=2, micro_batches=n, shard=True)) for n in (1, 2))
    assert twice.gradients == pytest.approx(2 * once.gradients, abs=2)


def test_recomputed_blocks_hold_less_and_compute_more(cfg):
    deep = cfg(encoder__depth=8)
    plain, again = (spread.load(deep, Way(activation_checkpointing=on), rows=64) for on in (False, True))
    assert again.activations < 0.6 * plain.activations
    assert 1.1 < again.flops / plain.flops <= 4 / 3


# ---- the way that fits ---------------------------------------------------------------------------


def counted(state, each):
    """A count of loads: `state` GiB that sharding divides, `each` of activations per image, a quarter if recomputed."""

    def count(way, cfg):
        share = way.ranks if way.shard else 1
        rows = spread.rows_of(cfg, way)
        activations = rows * each / (4 if way.activation_checkpointing else 1)
        return Load(rows, 1.0, 32, {"weights": round(state * GIB / share)}, 0, 0, round(activations * GIB), 0)

    return count


@pytest.mark.parametrize(
    ("state", "each", "expected"),
    [
        (1, 0.1, {"micro_batches": 1}),  # 64 images of a rank
        (1, 1, {"micro_batches": 4}),
        (30, 1, {"shard": True, "micro_batches": 4}),  # 4.4 would fit beside 30
        (1, 4, {"activation_checkpointing": True, "micro_batches": 4}),
        (30, 4, {"shard": True, "activation_checkpointing": True, "micro_batches": 4}),
    ],
)
def test_the_fastest_way_that_fits_is_proposed(cfg, state, each, expected):
    recipe, count = cfg(optim__batch_size=256), counted(state, each)
    way, load = spread.propose(recipe, Way(ranks=4), memory=32, fixed=frozenset(), count=lambda w: count(w, recipe))
    assert way == replace(Way(ranks=4), **expected)
    assert load.total <= spread.usable(32) < 32 * GIB


def test_what_is_fixed_stays(cfg):
    recipe, count = cfg(optim__batch_size=256), counted(1, 1)
    wanted, fixed = Way(ranks=4, micro_batches=16), frozenset({"micro_batches", "shard"})
    way, _ = spread.propose(recipe, wanted, memory=32, fixed=fixed, count=lambda w: count(w, recipe))
    assert way == wanted


def test_an_optimizer_of_whole_tensors_is_not_sharded(cfg):
    recipe, count = cfg(optim__batch_size=256, optim__name="lamb"), counted(30, 0.5)
    with pytest.raises(ConfigError, match=r"not even one image at a time fits 32 GiB: a device would hold 30\.1 GiB"):
        spread.propose(recipe, Way(ranks=4), memory=32, fixed=frozenset(), count=lambda w: count(w, recipe))
