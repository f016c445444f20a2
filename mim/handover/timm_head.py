"""The head of a classify run in timm's words: which pooling, which norm, which linear layer.

timm's transformers know the two forms of `classify`: the mean of raw tokens with a norm of its own (`fc_norm`), and the
class token, or the mean, of normed tokens. The linear probe's norm without parameters is folded into its linear layer.
Two heads whose softmaxes are averaged (distillation) and the heads of other families have no such form: refused.
"""

from __future__ import annotations

from typing import Any

from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mim.config import ConfigError
from mim.contracts import LoadedRun
from mim.pretrained.weights import backbone_of

REMEDY = "export the backbone alone with head=false, or the classifier with `mim export onnx` or `torch`"


def classifier(loaded: LoadedRun) -> Any:
    """The objective of a run that classifies whole images, else None."""
    return loaded.objective if loaded.config.get("objective", {}).get("name") == "classify" else None


def arguments(loaded: LoadedRun) -> dict[str, Any]:
    """The arguments of timm's class that make the head; what timm cannot represent is refused."""
    objective, backbone = classifier(loaded), backbone_of(loaded.encoder)
    if objective.distill_head is not None:
        raise ConfigError(f"timm averages the logits of two heads, objective.distill their softmaxes; {REMEDY}")
    own_norm = objective.cfg.pool == "mean" and not objective.cfg.frozen
    found: dict[str, Any] = {"global_pool": "avg" if objective.cfg.pool == "mean" else "token"}
    if type(backbone) is VisionTransformer:
        return found | {"fc_norm": own_norm}
    if type(backbone) is Eva:
        return found | {"use_fc_norm": own_norm, "use_post_transformer_norm": not own_norm}
    if type(backbone) is Beit:
        return found | {"use_fc_norm": own_norm}
    name = type(backbone).__name__
    raise ConfigError(f"timm's {name} has another kind of head than objective.name=classify; {REMEDY}")


def tensors(loaded: LoadedRun) -> dict[str, Tensor]:
    """Backbone and head in timm's names."""
    objective = classifier(loaded)
    found: dict[str, Tensor] = backbone_of(loaded.encoder).state_dict()
    weight, bias = objective.head.weight.detach().cpu(), objective.head.bias.detach().cpu()  # (classes, D), (classes,)
    if objective.cfg.frozen:
        scale = (objective.norm.running_var.double() + objective.norm.eps).rsqrt().cpu()  # (D,)
        folded = weight.double() * scale
        bias = (bias.double() - folded @ objective.norm.running_mean.double().cpu()).float()
        weight = folded.float()
    elif objective.cfg.pool == "mean":
        found = {name: tensor for name, tensor in found.items() if not name.startswith("norm.")}
        found |= {f"fc_norm.{name}": tensor.detach().cpu() for name, tensor in objective.norm.state_dict().items()}
    return found | {"head.weight": weight, "head.bias": bias}
