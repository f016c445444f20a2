"""Steps of a benchmark: they are those of the loop."""

import json

import pytest
import torch

from benchmarks import steps
from mim import config, train
from mim.config import ConfigError
from mim.job import Config

SMALL = ["encoder.width=32", "encoder.depth=2", "encoder.num_heads=2"]


def a_work(sections, **machine):
    cfg = config.typed(Config, {**sections, "train": {"cpu": True, "workers": 0, **machine}})
    return steps.Work("tiny", cfg)


@pytest.mark.parametrize("objective", ["mae", "tokenize"])
def test_the_losses_of_steps_on_real_batches_are_those_of_a_run(objective, recipe, tmp_path):
    """Rates, draws, clipping and the average of the weights included: the third loss depends on all before."""
    sections = recipe(objective)
    sections["optim"] |= {"length": "3 steps", "clip_grad": 0.1, "ema": 0.9}
    path = tmp_path / "recipe.yaml"
    path.write_text(config.to_yaml({**sections, "train": {"cpu": True, "workers": 0, "log_every": "1 steps"}}))
    train.main(str(path), [f"train.run={tmp_path / 'run'}"])
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    expected = [line["loss"] for line in lines if line["event"] == "train"]
    training = steps.Training(a_work(sections), rows=8, shards=True)
    assert [training.step().item() for _ in range(3)] == pytest.approx(expected, rel=1e-6)


def test_a_synthetic_batch_has_the_shapes_and_types_of_the_loaders(recipe):
    sections = recipe("beit")
    sections["tokenizer"], sections["objective"]["num_codes"] = {"recipe": "dvae_small_cifar10"}, 512
    sections["encoder"]["patch_size"] = 4
    wanted = a_work(sections)
    real = next(steps.Training(wanted, rows=8, shards=True).batches)
    made = steps.synthetic(steps.built_of(wanted), 8)
    assert made.keys() >= real.keys() & {"images", "tokenizer_images", "mask", "noise", "weight", "num_masked", "range"}
    for name, value in made.items():
        if torch.is_tensor(value) and name in real:
            assert (value.shape, value.dtype, value.stride()) == (
                real[name].shape, real[name].dtype, real[name].stride(),
            ), name  # fmt: skip


def test_given_codes_save_the_operations_of_the_tokenizer_alone():
    made, given = (steps.work(name, "tiny", SMALL) for name in ("beit", "beit-codes"))
    built = steps.built_of(made)
    saved = steps.flops(made, 2) - steps.flops(given, 2)
    images = torch.rand(2, 3, *built.views.sizes[-1])
    with steps.footprint.operations() as counted:
        built.frozen["tokenizer"].encode(images)
    assert saved == counted.get_total_flops() / 2 > 0
    assert "tokenizer" not in steps.built_of(given).frozen


@pytest.mark.parametrize("size", steps.SIZES)
def test_every_size_of_every_objective_has_a_recipe(size):
    for objective in steps.BASE:
        if objective in steps.OF_TOKENIZERS and size != "base":
            with pytest.raises(ConfigError, match="sizes tiny and base"):
                steps.work(objective, size, [])
            continue
        encoder = steps.work(objective, size, []).cfg.encoder
        if objective not in steps.OF_TOKENIZERS and size != "base":
            assert (encoder["width"], encoder["depth"]) == steps.SIZES[size][:2]
