"""Start from released weights: which tensor goes where, what was changed on the way, and what did not fit.

`encoder.init: SOURCE` fills the encoder (and MAE's decoder where the file has one), `init: {run: RUN}` everything that
a run trained. Nothing passes silently: every tensor of the file and of the model ends in the report, and what would
compute another function than the file's own encoder is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mim.config import ConfigError
from mim.log import write_json
from mim.pretrained import layouts, resample, weight_files
from mim.pretrained.resample import shape_of
from mim.saving import checkpoint

MIN_SHARE = 0.9  # of the encoder's tensors that the file must supply
PARTS = (
    "patch_embed.",
    "blocks.",
    "layers.",
    "stages.",
    "cls_token",
    "pos_embed",
    "reg_token",
    "norm",
    "rel_pos_bias.",
)
BUFFERS = ("relative_position_index", "bias_mask", "num_batches_tracked")  # made anew, never read
NEUTRAL = [  # what changes nothing, for a tensor that the file lacks
    (r"gamma(_[12])?$", 1.0),
    (r"(qkv\.bias|proj\.bias|\.[qv]_bias|relative_position_bias_table|^pos_embed)$", 0.0),
]


@dataclass
class Report:
    """What became of every tensor; `init.json` of the run directory."""

    source: str
    family: str
    num_wanted: int = 0
    loaded: list[str] = field(default_factory=list)
    resized: dict[str, str] = field(default_factory=dict)
    neutral: list[str] = field(default_factory=list)  # lacking in the file, set to the value that changes nothing
    reinitialised: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)  # of the file
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For people: counts, and the odd ones by name."""
        counts = (
            f"weights from {self.source} ({self.family}): {len(self.loaded)} of {self.num_wanted} tensors loaded, "
            f"{len(self.resized)} resized, {len(self.neutral)} neutral, {len(self.reinitialised)} re-initialised; "
            f"{len(self.unused)} of the source unused"
        )
        found = [counts, *(f"  resized: {name} {how}" for name, how in list(self.resized.items())[:4])]
        for title in ("neutral", "reinitialised", "unused"):
            names = getattr(self, title)
            if names:
                more = f" and {len(names) - 6} more (init.json)" if len(names) > 6 else ""
                found.append(f"  {title.replace('rein', 're-in')}: {', '.join(names[:6])}{more}")
        return [*found, *(f"  {note}" for note in self.notes)]

    def write(self, run: Path) -> None:
        write_json(run / "init.json", vars(self))


@dataclass
class Start:
    """How a run begins."""

    report: Report | None = None  # null: afresh, or resumed
    parent: dict[str, Any] | None = None  # of a run from another run's weights: its path, step and experiment
    optimizer: Path | None = None  # the parent's checkpoint whose optimizer is taken too

    def lines(self) -> list[str]:
        return [] if self.report is None else self.report.lines()


def start(built: Any, run: str | None, *, optimizer: bool, resumed: bool) -> Start:
    """Fill a `build.Built` from `init.run` or `encoder.init`; a resumed run has its own weights and reads neither."""
    source = (built.sections.get("encoder") or {}).get("init")
    name = built.sections["objective"]["name"]
    if run is None and optimizer:
        raise ConfigError("init.optimizer=true takes the optimizer of init.run, which is not set; add init.run=RUN")
    if run is not None and source is not None:
        raise ConfigError(f"init.run={run} and encoder.init={source} both give the first weights; keep one of them")
    if resumed or (run is None and source is None):
        return Start()
    if run is None:
        return Start(initialize(built.objective, built.encoder, str(source), name=name))
    report, folder = from_run(built.objective, built.encoder, run, averaged=not optimizer, name=name)
    path = folder.parent.parent.absolute()
    experiment = checkpoint.read_json(folder / "state.json")["experiment"]
    parent = {"run": str(path), "step": checkpoint.step_of(folder), "experiment": experiment}
    if optimizer and (theirs := checkpoint.read_config(path)["optim"]["name"]) != built.sections["optim"]["name"]:
        raise ConfigError(
            f"init.optimizer=true takes the state of {theirs} from {path}, but optim.name="
            f"{built.sections['optim']['name']}; use one optimizer for both, or init.optimizer=false"
        )
    return Start(report, parent, folder if optimizer else None)


def initialize(objective: nn.Module, encoder: Any, source: str, *, name: str) -> Report:
    """Fill the encoder from `encoder.init`, and the objective called `name` where the file is of that objective."""
    report, rest = _encoder_from(encoder, source)
    fill_objective(objective, rest, report, name=name)
    return report


def initialize_encoder(encoder: Any, source: str) -> Report:
    """Fill an encoder alone, as that of a teacher; what belongs to an objective is unused."""
    report, rest = _encoder_from(encoder, source)
    report.unused += rest
    return report


def _encoder_from(encoder: Any, source: str) -> tuple[Report, dict[str, Tensor]]:
    """Fill an encoder; return the report, and the tensors that belong to an objective."""
    opened = weight_files.open_source(source)
    layout = layout_of(opened)
    report = Report(opened.origin, layout.family, notes=list(opened.notes))
    fill_encoder(encoder, layout, opened, report)
    report.notes += pixels(encoder, layout, opened)
    if opened.objective is not None:  # `encoder.init=RUN` is the run's encoder alone
        report.unused += layout.rest
        return report, {}
    return report, layout.rest


def from_run(objective: nn.Module, encoder: Any, source: str, *, averaged: bool, name: str) -> tuple[Report, Path]:
    """Fill everything from a run of ours, whose sizes may differ; returns the checkpoint that was read, too."""
    opened = weight_files.from_run(source, averaged=averaged)
    layout = layout_of(opened)
    report = Report(opened.origin, layout.family, notes=list(opened.notes))
    if encoder is not None:
        fill_encoder(encoder, layout, opened, report)
        report.notes += pixels(encoder, layout, opened)
    fill_objective(objective, layout.rest, report, name=name)
    if not report.loaded:
        raise ConfigError(f"init.run={source} is a run of {opened.objective} and holds nothing that {name} could use")
    assert opened.checkpoint is not None
    return report, opened.checkpoint


def layout_of(opened: weight_files.Source) -> layouts.Layout:
    """The layout of a source; one that has timm's names already keeps them."""
    if not opened.native:
        return layouts.recognise(opened.tensors)
    rest = {n: t for n, t in opened.tensors.items() if n.startswith(f"{opened.objective}.")}
    family = "timm" if opened.objective is None else f"our run of {opened.objective}"
    return layouts.Layout(family, {n: t for n, t in opened.tensors.items() if n not in rest}, rest, None)


def backbone_of(encoder: Any) -> nn.Module:
    """The timm module inside an encoder."""
    found = [child for child in encoder.children() if hasattr(child, "pretrained_cfg")]
    assert len(found) == 1, type(encoder)
    return found[0]


@torch.no_grad()
def fill_encoder(encoder: Any, layout: layouts.Layout, opened: weight_files.Source, report: Report) -> None:
    """Copy the layout's encoder into ours, resampled where sizes differ; refuse another architecture."""
    backbone: Any = backbone_of(encoder)
    wanted = backbone.state_dict()
    buffers = [n for n in layout.encoder if n.endswith(BUFFERS)]
    given, remarks = layouts.adapt({n: t for n, t in layout.encoder.items() if n not in buffers}, wanted)
    report.notes += remarks
    check_heads(backbone, opened, report)
    original, how = dict(given), {}
    if "pos_embed" in wanted and "pos_embed" in given and hasattr(backbone.patch_embed, "grid_size"):
        given, how["pos_embed"] = positions(given, backbone, opened)
    found: dict[str, Tensor] = {}
    mismatched = []
    for name in (n for n in wanted if n in given):
        like = wanted[name]
        fitted = resample.fit(name, given[name], like, backbone)
        if fitted is None:
            mismatched.append(f"{name} {shape_of(given[name])} in the file, {shape_of(like)} here")
            continue
        found[name], steps = fitted
        if steps := how.get(name, []) + steps:
            report.resized[name] = f"{shape_of(original[name])} -> {shape_of(like)} ({', '.join(steps)})"
        else:
            report.loaded.append(name)
    unused = [n for n in given if n not in wanted]
    refuse_other_architecture(report, mismatched, unused)
    for name in (n for n in wanted if n not in given):
        value = neutral_value(name, given)
        if value is not None:
            found[name] = torch.full_like(wanted[name], value)
            report.neutral.append(name)
    absent = [n for n in wanted if n not in found and not n.endswith(BUFFERS)]
    num_wanted = sum(not n.endswith(BUFFERS) for n in wanted)
    report.num_wanted += num_wanted
    if len(found) < MIN_SHARE * num_wanted:
        raise ConfigError(
            f"{report.source} ({report.family}) supplies {len(found)} of the encoder's {num_wanted} tensors, less "
            f"than {MIN_SHARE:.0%}; it lacks {_some(absent)} and has {_some(list(given))}; choose the encoder that it "
            f"was made with"
        )
    if "pos_embed" in absent:
        raise ConfigError(
            f"{report.source} ({report.family}) has no table of positions (they may be rotary), but the encoder has; "
            f"use encoder.name=eva"
        )
    report.reinitialised += absent
    report.unused += [*unused, *buffers]
    backbone.load_state_dict({n: t.to(wanted[n].dtype) for n, t in found.items()}, strict=False)


def positions(given: layouts.Tensors, backbone: Any, opened: weight_files.Source) -> tuple[layouts.Tensors, list[str]]:
    """The table of positions for the encoder's grid. Frozen ones are sine-cosine, and so must be the file's."""
    own, theirs = backbone.pos_embed, given["pos_embed"]
    if own.requires_grad or theirs.shape[-1] != own.shape[-1]:
        return resample.fit_positions(given, backbone, opened.grid)
    if not layouts.is_sincos(theirs, opened.grid):
        raise ConfigError(
            f"{opened.origin} has learned positions, but encoder.positions=sincos freezes others in their place; "
            f"set encoder.positions=learn"
        )
    recomputed = ["sine-cosine, recomputed"] if theirs.shape != own.shape else []
    return {**given, "pos_embed": own.detach()}, recomputed


def neutral_value(name: str, given: layouts.Tensors) -> float | None:
    """What a tensor that the file lacks has to be for the encoder to compute what the file's own encoder computes.

    None for a block that the file lacks as a whole, and for positions where it has no relative ones either.
    """
    block = re.match(r"blocks\.\d+\.", name)
    if block and not any(n.startswith(block[0]) for n in given):
        return None
    if name == "pos_embed" and not any(n.endswith(resample.TABLE) for n in given):
        return None
    return next((value for pattern, value in NEUTRAL if re.search(pattern, name)), None)


def refuse_other_architecture(report: Report, mismatched: list[str], unused: list[str]) -> None:
    """Refuse shapes that no rule converts, and parts that only one side has and that change what is computed."""
    where = f"{report.source} ({report.family})"
    if mismatched:
        raise ConfigError(
            f"{where} is of another size than the encoder: {_some(mismatched, 3)}; set encoder.model, width, depth and "
            f"num_heads to those of the file, and data.image_size where the weights depend on it (Mixer, NesT, MViT)"
        )
    extra = [n for n in unused if n.startswith(PARTS)]
    if any(n.endswith((".gamma", "gamma_1", "gamma_2")) for n in extra):
        raise ConfigError(
            f"{where} has LayerScale ({_some(extra, 2)}), the encoder has none; set encoder.layer_scale=1e-5"
        )
    if any(n.endswith(resample.TABLE) for n in extra):
        raise ConfigError(f"{where} has relative positions, which this encoder lacks; use encoder.name=beit")
    if extra:
        raise ConfigError(
            f"{where} has {len(extra)} tensors for which the encoder has no place, such as {_some(extra, 3)}; choose "
            f"the encoder.name, model, depth and num_registers that it was made with"
        )


def check_heads(backbone: Any, opened: weight_files.Source, report: Report) -> None:
    """Refuse what no shape shows: another number of heads, another activation."""
    block: Any = next(iter(getattr(backbone, "blocks", [])), None)
    own = getattr(getattr(block, "attn", None), "num_heads", None)
    if None not in (own, opened.num_heads) and own != opened.num_heads:
        raise ConfigError(
            f"{report.source} has {opened.num_heads} attention heads, the encoder {own}; "
            f"set encoder.num_heads={opened.num_heads}"
        )
    act = type(getattr(getattr(block, "mlp", None), "act", None)).__name__
    if opened.activation == "quick_gelu" and act != "QuickGELU":
        raise ConfigError(
            f"{report.source} was trained with QuickGELU, the encoder has {act}; set encoder.model to a timm name with "
            f"quickgelu, e.g. vit_base_patch16_clip_quickgelu_224"
        )


@torch.no_grad()
def fill_objective(objective: nn.Module, given: layouts.Tensors, report: Report, *, name: str) -> None:
    """Copy what the source has of the objective called `name`; a tensor of another shape starts anew."""
    prefix = f"{name}."
    own = {f"{prefix}{n}": t for n, t in objective.state_dict().items() if not n.startswith("encoder.")}
    fitting = {n: t.to(own[n].dtype) for n, t in given.items() if n in own and t.shape == own[n].shape}
    objective.load_state_dict({n.removeprefix(prefix): t for n, t in fitting.items()}, strict=False)
    report.num_wanted += len(own)
    report.loaded += fitting
    report.reinitialised += [n for n in own if n not in fitting]
    for n, tensor in given.items():
        if n not in fitting:
            sizes = f" ({shape_of(tensor)} in the file, {shape_of(own[n])} here)" if n in own else ""
            report.unused.append(f"{n}{sizes}")


def pixels(encoder: Any, layout: layouts.Layout, opened: weight_files.Source) -> list[str]:
    """What the encoder normalises pixels with, and a warning where its weights were trained with something else."""
    own = [[round(v, 4) for v in getattr(encoder, name).flatten().tolist()] for name in ("mean", "std")]
    line = f"pixels are normalised with mean {own[0]} and std {own[1]}"
    theirs = (opened.mean, opened.std) if opened.mean and opened.std else layout.pixels
    if theirs is None:
        return [f"{line}; the file does not tell its own: MAE, DINO and DeiT have ImageNet's, ViT of augreg 0.5"]
    known = [[round(v, 4) for v in values] for values in theirs if values is not None]
    if len(known[0]) != len(own[0]):
        return [f"{line}; the weights were trained on {len(known[0])} channels"]
    if all(abs(a - b) < 5e-3 for mine, their in zip(own, known, strict=True) for a, b in zip(mine, their, strict=True)):
        return [f"{line}, as the weights were trained"]
    return [
        f"warning: {line}, but the weights were trained with mean {known[0]} and std {known[1]}; "
        f"set encoder.mean and encoder.std to these"
    ]


def _some(names: list[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
