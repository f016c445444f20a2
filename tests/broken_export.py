"""Exports that go wrong between writing and reading back: what a check that works must catch."""

import torch
from safetensors.torch import load_file, save_file


def break_after_writing(monkeypatch, target, damage):
    """Let `damage(folder)` happen after a target has written and before it compares."""
    compare = target.compare

    def damaged(ours, folder, *arguments):
        damage(folder)
        return compare(ours, folder, *arguments)

    monkeypatch.setattr(target, "compare", damaged)


def alter(file, change):
    """Damage to a safetensors file: `change` turns its tensors into others."""

    def damage(folder):
        save_file(change(load_file(folder / file)), folder / file)

    return damage


def shaken_run(loaded_run, objective="mae", **encoder):
    """An untrained run whose every parameter counts: tokens, biases and gammas start at zero or equal."""
    loaded = loaded_run(objective, **encoder)
    for parameter in loaded.encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return loaded
