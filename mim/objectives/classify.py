"""Classification: fine-tuning, the linear probe (`frozen`) and DeiT's distillation, as one objective.

Fine-tuning as MAE and BEiT do it (He et al. 2022, arXiv 2111.06377, appendix A.1; Bao et al. 2022, arXiv 2106.08254,
appendix H): the mean over the patches of the last block, then a LayerNorm of its own, then a linear head. The encoder's
final norm is not applied, so it is not trained either. With `pool: class` the head reads the class token after the
encoder's final norm (ViT, DeiT), and there is no other norm. Linear probe (MAE, appendix A.1): features after the final
norm, a BatchNorm without affine, a linear head.

Distillation: Touvron et al. 2021, "Training data-efficient image transformers", arXiv 2012.12877, section 4. The
encoder's first register is the distillation token, with a head of its own; at test time the two softmaxes are averaged.
Differences: the soft loss is the Kullback-Leibler divergence summed over the classes, as in the paper, where the
published code also divides by their number; the distillation token starts as the encoder starts its registers.

Labels of -1 are unknown. Such a sample is never trained on: its weight becomes 0, and that of a sample that was mixed
with it. The gradient stays the sum over what counts divided by the global batch, so that no split changes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim.batch_norm import BatchNorm, counting
from mim.config import ConfigError
from mim.contracts import Batch, Encoder, Features
from mim.data.mixing import Mixing, erase

KINDS = ("hard", "soft")
POOLS = ("mean", "class")


@dataclass
class Distill:
    """What is learned from `teacher_logits`."""

    kind: str = "hard"  # hard: the teacher's decision (DeiT's best) | soft: its probabilities
    temperature: float = 1.0  # of soft; DeiT 3.0
    weight: float = 0.5  # of the teacher's share of the loss; DeiT 0.5 hard, 0.1 soft


@dataclass
class Config:
    num_classes: int | None = None  # null: the dataset's
    pool: str = "mean"  # mean over patches | class token
    frozen: bool = False  # the encoder stays as it is: a linear probe
    head_std: float = 2e-5  # of the head's first weights: MAE 2e-5, BEiT 0.02 * 0.001, from scratch 0.02, probe 0.01
    dropout_rate: float = 0.0  # before the head
    label_smoothing: float = 0.0  # share of a label that all classes get; 0.1 in BEiT, MAE and DeiT
    mixup_alpha: float = 0.0  # arXiv 1710.09412: two images blended by a share from Beta(alpha, alpha); 0: never
    cutmix_alpha: float = 0.0  # arXiv 1905.04899: a box of another image; 0: never. Of both, one by the toss of a coin
    erase_rate: float = 0.0  # share of images that get a box of noise (random erasing, arXiv 1708.04896)
    distill: Distill | None = None  # DeiT; needs the section `teacher`


def build(encoder: Encoder, cfg: Config) -> Classify:
    """Wrap any encoder; it sees whole images."""
    if cfg.num_classes is None or cfg.num_classes < 1:
        raise ValueError(f"objective.num_classes={cfg.num_classes} must be at least 1")
    if cfg.pool not in POOLS:
        raise ValueError(f"objective.pool={cfg.pool!r} is unknown; choose {' or '.join(POOLS)}")
    for name in ("dropout_rate", "label_smoothing", "erase_rate"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise ValueError(f"objective.{name}={getattr(cfg, name)} must be from 0 to 1")
    for name in ("mixup_alpha", "cutmix_alpha", "head_std"):
        if not 0 <= getattr(cfg, name) < math.inf:
            raise ValueError(f"objective.{name}={getattr(cfg, name)} must be at least 0")
    if cfg.distill is not None:
        _check_distill(cfg, cfg.distill)
    return Classify(encoder, cfg)


def _check_distill(cfg: Config, distill: Distill) -> None:
    if distill.kind not in KINDS:
        raise ValueError(f"objective.distill.kind={distill.kind!r} is unknown; choose {' or '.join(KINDS)}")
    if distill.temperature <= 0 or not 0 <= distill.weight <= 1:
        raise ValueError(
            f"objective.distill.temperature={distill.temperature} must be above 0, and objective.distill.weight="
            f"{distill.weight} from 0 to 1"
        )
    if cfg.pool != "class" or cfg.frozen:
        raise ValueError("objective.distill trains a class token; set objective.pool=class and objective.frozen=false")


class Classify(nn.Module):
    """Reads `images` and `labels`; the loss is the cross-entropy, per sample."""

    def __init__(self, encoder: Any, cfg: Config) -> None:
        super().__init__()
        assert cfg.num_classes is not None
        self.encoder = encoder
        self.cfg = cfg
        self.num_classes = cfg.num_classes
        self.mixing = None
        if cfg.mixup_alpha or cfg.cutmix_alpha:
            smoothing = cfg.label_smoothing
            self.mixing = Mixing(cfg.mixup_alpha, cfg.cutmix_alpha, smoothing=smoothing, num_classes=cfg.num_classes)
        self.per_micro_batch = self.mixing is not None or cfg.frozen
        self.reads: tuple[str, ...] = ("images", "labels")
        self.norm: nn.Module = nn.Identity()  # of pooled features, (B, D)
        if cfg.frozen:
            encoder.requires_grad_(False)
            self.norm = BatchNorm(encoder.width, eps=1e-6, affine=False)  # main_linprobe.py of MAE
            self.reads += ("weight",)
        elif cfg.pool == "mean":
            encoder.final_norm.requires_grad_(False)
            self.norm = nn.LayerNorm(encoder.width, eps=getattr(encoder.final_norm, "eps", 1e-6))
        self.dropout = nn.Dropout(cfg.dropout_rate)
        self.head = _head(encoder.width, cfg)
        self.distill_head = None
        if cfg.distill is not None:
            self.distill_head = _head(encoder.width, cfg)
            self.reads += ("teacher_logits",)
        found = getattr(encoder, "num_prefix", None)  # known to some encoders; of others at the first image
        if found is not None:
            self._check_prefix(found)

    def train(self, mode: bool = True) -> Classify:
        """Also keeps a frozen encoder in evaluation mode."""
        super().train(mode)
        if self.cfg.frozen:
            self.encoder.eval()
        return self

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Batch:
        """A training batch with erased and mixed images, and weight 0 where no label is known.

        Adds `soft_labels` (B, classes) where images are mixed: rows of zeros where the label of either is unknown.
        Draws come from the default generators of torch, numpy and python.
        """
        known, images = batch["labels"] >= 0, batch["images"]  # (B,), (B, C, H, W)
        if self.cfg.erase_rate:
            images = erase(images, self.cfg.erase_rate, mean=self.encoder.mean, std=self.encoder.std)
        if self.mixing is None:
            return {**batch, "images": images, "weight": batch["weight"] * known}
        images, soft_labels = self.mixing(images, batch["labels"])
        weight = batch["weight"] * soft_labels.any(dim=1)
        return {**batch, "images": images, "soft_labels": soft_labels, "weight": weight}

    def forward(self, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return loss (B,), and where labels are not mixed accuracy (B,): 1 where the largest logit is the label's."""
        logits, distilled = self._heads(batch["images"], batch.get("weight"))  # (B, classes) each
        labels, soft_labels = batch["labels"], batch.get("soft_labels")
        if soft_labels is not None:
            known = soft_labels.any(dim=1)
            loss = F.cross_entropy(logits, soft_labels, reduction="none")  # (B,)
        else:
            known = labels >= 0
            smoothing = self.cfg.label_smoothing
            loss = F.cross_entropy(logits, labels.clamp(min=0), reduction="none", label_smoothing=smoothing)  # (B,)
        if self.cfg.distill is not None and distilled is not None:
            share = self.cfg.distill.weight
            taught = distillation_loss(distilled, batch["teacher_logits"].float(), self.cfg.distill)
            loss = (1 - share) * loss + share * taught
        out = {"loss": loss.masked_fill(~known, 0.0)}
        if soft_labels is None:
            out["accuracy"] = (_averaged(logits, distilled).argmax(dim=1) == labels).float().detach()
        return out

    def logits(self, batch: Batch) -> Tensor:
        """Scores (B, classes) of `images`, whose softmax are the probabilities; of two heads that is their mean."""
        return _averaged(*self._heads(batch["images"], batch.get("weight")))

    def _heads(self, images: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits (B, classes) of the head and, where there is one, of the distillation token's."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.cfg.frozen):
            features = self._features(images)
            self._check_prefix(features.prefix.shape[1])
            pooled = features.patches.mean(dim=1) if self.cfg.pool == "mean" else features.prefix[:, 0]  # (B, D)
        if self.cfg.frozen:
            with counting(self.norm, weight):
                pooled = self.norm(pooled.float()[..., None, None]).flatten(1)  # (B, D)
        else:
            pooled = self.norm(pooled)
        logits = self.head(self.dropout(pooled)).float()  # (B, classes)
        if self.distill_head is None:
            return logits, None
        return logits, self.distill_head(self.dropout(features.prefix[:, 1])).float()

    def _features(self, images: Tensor) -> Features:
        """Tokens after the final norm; before it where their mean has a norm of its own."""
        if self.cfg.pool == "mean" and not self.cfg.frozen:
            return self.encoder.layers(images, [-1])[0]
        return self.encoder(images)

    def _check_prefix(self, found: int) -> None:
        if self.cfg.pool == "class" and not found:
            raise ConfigError("objective.pool=class, but the encoder has no class token; use objective.pool=mean")
        if self.cfg.distill is not None and found < 2:
            raise ConfigError(
                "objective.distill needs a class token and one more, the distillation token, but the encoder has "
                f"{found}; set encoder.num_registers=1 (encoder.name=vit or eva)"
            )


def distillation_loss(logits: Tensor, teacher_logits: Tensor, distill: Distill) -> Tensor:
    """What (B, classes) logits lose against a teacher's, (B,): equations 2 and 3 of arXiv 2012.12877."""
    if distill.kind == "hard":
        return F.cross_entropy(logits, teacher_logits.argmax(dim=1), reduction="none")
    t = distill.temperature
    ours, theirs = (logits / t).log_softmax(dim=1), (teacher_logits / t).log_softmax(dim=1)
    return t * t * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=1)


def _averaged(logits: Tensor, distilled: Tensor | None) -> Tensor:
    """(B, classes): logits, or the logarithm of the mean of two softmaxes."""
    if distilled is None:
        return logits
    return torch.logaddexp(logits.log_softmax(dim=1), distilled.log_softmax(dim=1)) - math.log(2)


def _head(width: int, cfg: Config) -> nn.Linear:
    head = nn.Linear(width, cfg.num_classes or 0)
    nn.init.trunc_normal_(head.weight, std=cfg.head_std)  # cut at +-2, not at two deviations, as in MAE and DeiT
    nn.init.zeros_(head.bias)
    return head
