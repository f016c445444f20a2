"""The two files of a saved tokenizer: exact, frozen, and refused in one sentence when they are something else."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import tokenizer as tokenizers
from tokenizer import dvae

SMALL = dvae.Config(num_codes=16, channels=1, width=8, n_init=8, num_groups=2, blocks_per_group=1)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    original = dvae.build(SMALL)
    tokenizers.save(original, tmp_path, name="dvae", config=vars(SMALL), card={"usage": 0.9})
    return original, tmp_path


def change(path, **fields):
    path = path / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_saved_tokenizer_comes_back_bit_for_bit_and_frozen(saved):
    original, folder = saved
    loaded = tokenizers.load(folder)
    assert loaded.cfg == SMALL
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in original.state_dict().items())
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(original.encode(images), loaded.encode(images))


def test_the_folder_holds_two_files_and_the_score_card(saved):
    _, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "tokenizer.safetensors"]
    assert json.loads((folder / "tokenizer.json").read_text())["card"] == {"usage": 0.9}


def test_a_tokenizer_in_channels_last_memory_can_be_saved(saved, tmp_path):
    original, _ = saved
    folder = tmp_path / "again"
    tokenizers.save(original.to(memory_format=torch.channels_last), folder, name="dvae", config=vars(SMALL), card={})
    assert torch.equal(tokenizers.load(folder).encoder.blocks.input.w, original.encoder.blocks.input.w)


def test_loading_does_not_move_the_random_state(saved):
    before = torch.get_rng_state()
    tokenizers.load(saved[1])
    assert torch.equal(before, torch.get_rng_state())


def test_missing_extra_and_reshaped_tensors_are_refused_by_name(saved):
    _, folder = saved
    path = folder / "tokenizer.safetensors"
    state = load_file(path)
    wrong = {**state, "encoder.blocks.input.b": torch.zeros(3), "extra": torch.zeros(1)}
    del wrong["decoder.blocks.input.w"]
    save_file(wrong, path)
    with pytest.raises(ValueError, match="does not match its config") as error:
        tokenizers.load(folder)
    assert "lacks decoder.blocks.input.w" in str(error.value)
    assert "also holds extra" in str(error.value)
    assert "another shape of encoder.blocks.input.b" in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "other"}, 'must be "mimstream-tokenizer"'),
        ({"version": 2}, "has version 2, this program reads version 1"),
        ({"name": "os"}, 'names the tokenizer "os"; known are dvae'),
        ({"name": "quantize"}, "known are"),
        ({"name": "../dvae"}, "known are"),
        ({"name": ["dvae"]}, "known are"),
        ({"config": {"widht": 8}}, "does not fit tokenizer.dvae: .*widht"),
        ({"config": None}, 'has no "config"'),
    ],
)
def test_a_description_of_something_else_is_refused(saved, fields, message):
    _, folder = saved
    change(folder, **fields)
    with pytest.raises(ValueError, match=message):
        tokenizers.load(folder)


def test_a_file_that_is_not_json_is_refused(saved):
    _, folder = saved
    (folder / "tokenizer.json").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="is not JSON"):
        tokenizers.load(folder)


def test_a_tokenizer_that_is_not_finite_is_never_saved(saved, tmp_path):
    original, _ = saved
    with torch.no_grad():
        original.decoder.blocks.output.conv.b[0] = float("nan")
    with pytest.raises(
        ValueError, match=r"holds values that are not finite, first in decoder.blocks.output.conv.b; start"
    ):
        tokenizers.save(original, tmp_path / "broken", name="dvae", config=vars(SMALL), card={})
    assert not (tmp_path / "broken").exists()


@pytest.mark.parametrize("content", [b"", (1 << 60).to_bytes(8, "little") + b"{}"], ids=["empty", "huge header"])
def test_a_file_of_weights_that_cannot_be_read_is_named(saved, content):
    _, folder = saved
    (folder / "tokenizer.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.safetensors cannot be read as safetensors: .*header"):
        tokenizers.load(folder)


def test_weights_that_are_not_finite_are_refused(saved):
    _, folder = saved
    state = load_file(folder / "tokenizer.safetensors")
    name = min(n for n, value in state.items() if value.is_floating_point())
    state[name].view(-1)[0] = float("inf")
    save_file(state, folder / "tokenizer.safetensors")
    with pytest.raises(ValueError, match=rf"holds values that are not finite, first in {name}"):
        tokenizers.load(folder)
