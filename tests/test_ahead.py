"""The copy of a batch on a stream of its own: in which order it is asked for, waited for and given back."""

import contextlib
from types import SimpleNamespace

import torch
from torch import Tensor

from mim.data.ahead import Ahead


class Pinned(Tensor):
    """A tensor that notes what is done with it."""

    def to(self, device, non_blocking=False):
        self.events.append(("copy", self.name, non_blocking))
        return self

    def record_stream(self, stream):
        self.events.append(("belongs to", self.name, stream.name))


def pinned(name, events):
    tensor = torch.zeros(2).as_subclass(Pinned)
    tensor.name, tensor.events = name, events
    return tensor


def test_on_a_cpu_a_batch_passes_as_it_is():
    batch = {"images": torch.zeros(2), "keys": ["a"]}
    assert Ahead(torch.device("cpu"))(batch) is batch


def test_a_copy_runs_beside_the_step_which_waits_for_it_and_keeps_its_memory(monkeypatch):
    """With streams that only note what they are told: no GPU takes part."""
    events = []
    step = SimpleNamespace(name="step", wait_stream=lambda other: events.append(("step waits for", other.name)))
    beside = SimpleNamespace(name="beside")

    @contextlib.contextmanager
    def on(stream):
        events.append(("on", stream.name))
        yield
        events.append(("off", stream.name))

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: beside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: step)
    monkeypatch.setattr(torch.cuda, "stream", on)
    moved = Ahead(torch.device("cuda"))(
        {"images": pinned("images", events), "keys": ["a"], "mask": pinned("mask", events)}
    )
    assert moved["keys"] == ["a"]
    assert events == [
        ("on", "beside"),
        ("copy", "images", True),
        ("copy", "mask", True),
        ("off", "beside"),
        ("step waits for", "beside"),
        ("belongs to", "images", "step"),
        ("belongs to", "mask", "step"),
    ]
