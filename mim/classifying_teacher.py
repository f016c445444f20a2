"""A frozen classifier whose decisions a student learns (DeiT, arXiv 2012.12877, section 4): a run of ours or timm's.

It writes `teacher_logits` into a batch. It sees the very images of the student, erased and mixed as they are, at its
own size and normalised by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from mim import frozen_networks
from mim.config import ConfigError
from mim.log import say
from mim.pretrained import weight_files

KEYS = ("model", "pretrained", "init", "image_size")  # of a teacher that is timm's


class Classifier(nn.Module):
    """A network that classifies, frozen."""

    writes = "teacher_logits"

    def __init__(
        self, network: nn.Module, logits: Callable[[Tensor], Tensor], *, num_classes: int, image_size: tuple[int, int]
    ):
        super().__init__()
        self.network = network
        self.logits = logits
        self.num_classes = num_classes
        self.image_size = image_size
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # faster convolutions

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> logits (B, classes)."""
        if images.shape[-2:] != self.image_size:
            images = F.interpolate(images, size=self.image_size, mode="bicubic", antialias=True)
        return self.logits(images)


def of_objective(objective: Any, image_size: tuple[int, int], name: str) -> Classifier:
    """The classifier that a run (or a recipe) called `name` trains."""
    if not hasattr(objective, "logits"):
        raise ConfigError(
            f"teacher={name!r} trains {type(objective).__name__}, which has no head that classifies; choose a run of "
            f"objective.name=classify"
        )

    def logits(images: Tensor) -> Tensor:
        return objective.logits({"images": images})

    return Classifier(objective, logits, num_classes=objective.num_classes, image_size=image_size)


def of_timm(section: dict[str, Any], *, load: bool, channels: int) -> tuple[Classifier, dict[str, Any]]:
    """timm's classifier that a section names, and the section with the identity of its weights.

    `init` is a file of weights by timm's names, `pretrained: true` what timm publishes. Without `load` the weights are
    fresh. Its own size, mean and std are those of timm's description; `image_size` takes another size.
    """
    if unknown := set(section) - {*KEYS, "experiment"}:
        raise ConfigError(f"teacher.{min(unknown)} is not a known key; known here: {', '.join(KEYS)}")
    name = str(section["model"])
    if not timm.is_model(name.split(".")[0]):
        raise ConfigError(f"teacher.model={name!r} is not a timm model; DeiT's teacher is regnety_160.deit_in1k")
    check_weights(section)
    resolved = dict(section)
    if load:
        with torch.device("cpu"):
            network = _trained(section, name, channels)
        resolved["experiment"] = frozen_networks.weights_hash(network)
    else:
        network = timm.create_model(name, in_chans=channels)
    if not network.num_classes:
        raise ConfigError(f"teacher.model={name!r} has no head that classifies; choose a model with classes")
    facts = resolve_model_data_config(network)
    size = section.get("image_size") or list(facts["input_size"][1:])
    size = tuple(size) if isinstance(size, list) else (size, size)
    for key in ("mean", "std"):
        values = facts[key] if len(facts[key]) == channels else [sum(facts[key]) / len(facts[key])] * channels
        network.register_buffer(f"input_{key}", torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def logits(images: Tensor) -> Tensor:
        return network((images - network.input_mean) / network.input_std).float()

    return Classifier(network, logits, num_classes=network.num_classes, image_size=size), resolved


def check_weights(section: dict[str, Any]) -> None:
    """A teacher that is timm's says where its weights come from, in one way."""
    if bool(section.get("pretrained")) == bool(section.get("init")):
        raise ConfigError(
            f"teacher.model={section['model']!r} needs its weights: teacher.init=FILE, or teacher.pretrained=true for "
            f"those that timm publishes; give one"
        )
    if section.get("init") and not Path(str(section["init"])).expanduser().is_file():
        raise ConfigError(f"teacher.init={section['init']!r} is no file; give the weights of teacher.model")


def _trained(section: dict[str, Any], name: str, channels: int) -> Any:
    """timm's network with the weights of the section."""
    if section.get("pretrained"):
        say(f"teacher.model={name}: its weights are downloaded, or taken from timm's cache")
        try:
            return timm.create_model(name, pretrained=True, in_chans=channels)
        except (RuntimeError, OSError) as error:  # timm lists none, or no network
            raise ConfigError(f"teacher.model={name}: {' '.join(str(error).split())[:300]}") from error
    source = weight_files.from_file(Path(str(section["init"])).expanduser())
    facts: Any = timm.get_pretrained_cfg(name) or timm.create_model(name).pretrained_cfg
    heads = facts.classifier if isinstance(facts.classifier, tuple) else (facts.classifier,)
    head = source.tensors.get(f"{heads[0]}.weight")
    if head is None:
        raise ConfigError(
            f"teacher.init={section['init']} has no head that classifies ({heads[0]}.weight of teacher.model={name})"
        )
    network = timm.create_model(name, in_chans=channels, num_classes=len(head))
    try:
        network.load_state_dict(source.tensors)
    except RuntimeError as error:
        raise ConfigError(
            f"teacher.init={section['init']} does not fit teacher.model={name}: {' '.join(str(error).split())[:300]}"
        ) from error
    return network
