"""A training without memory ends in one sentence: what it holds, and what would hold less."""

import json
import re
import resource

import pytest
import torch

from mim import config, rehearsal, train
from mim.config import ConfigError
from mim.planning import out_of_memory


@pytest.fixture
def write(recipe, tmp_path):
    """`write(**options of train)`: the path of a tiny recipe."""

    def write(batch_size=8, **options):
        sections = recipe() | {"train": {"cpu": True, "workers": 0, "run": str(tmp_path / "run"), **options}}
        sections["optim"]["batch_size"] = batch_size
        path = tmp_path / "mae.yaml"
        path.write_text(config.to_yaml(sections))
        return str(path)

    return write


def gib(text):
    return [float(number) for number in re.findall(r"\((\d+\.\d+) GiB", text)]


def test_a_device_without_memory_ends_in_one_sentence_with_three_remedies(write, tmp_path, monkeypatch):
    def update(*_arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr("mim.optim.update", update)
    path = write(batch_size=512)
    with pytest.raises(ConfigError) as error:
        train.main(path, [])
    text = str(error.value)
    assert text.startswith("out of memory in the update of step 1: a step with micro-batches of 512 images holds about")
    settings = re.findall(r"train\.\w+=\w+", text)
    assert settings == ["train.micro_batches=2", "train.precision=bf16", "train.activation_checkpointing=true"]
    held = float(re.search(r"about (\d+\.\d+) GiB at once", text)[1])
    assert len(gib(text)) == 3
    assert all(less <= held for less in gib(text))
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 2)
    assert status["reason"].startswith("out of memory in the update of step 1")


def test_an_allocator_that_refuses_is_understood(write):
    """Address space is limited for real, so that the first large activation is refused by torch's allocator."""
    path = write(batch_size=3000)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (rehearsal.process_bytes("VmSize") + 250 * 2**20, hard))
        with pytest.raises(ConfigError, match=r"out of memory in the \w+ of step 1: .*train\.micro_batches=2 \("):
            train.main(path, [])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_other_errors_stay_what_they_are():
    assert not out_of_memory.is_out_of_memory(RuntimeError("shapes do not match"))
    assert out_of_memory.is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"))
    assert out_of_memory.is_out_of_memory(MemoryError())


def test_a_recipe_whose_cost_cannot_be_counted_still_ends_in_a_sentence(write, monkeypatch):
    def update(*_arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    def load(*_arguments, **_options):
        raise ConfigError("a shape depends on values")

    monkeypatch.setattr("mim.optim.update", update)
    monkeypatch.setattr("mim.planning.spread.load", load)
    with pytest.raises(ConfigError, match=r"^out of memory in the update of step 1, .*set train\.micro_batches=2"):
        train.main(write(), [])
