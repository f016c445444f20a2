"""Which share of a device's peak a training uses (model FLOPs utilisation, Chowdhery et al. 2022, PaLM, appendix B).

What stands here is assumed, not measured: it is what a plan is made with until `mim plan --measure` has run on the
device. It lies between what published trainings come to and what the memory's bandwidth allows:

    0.10  facebookresearch/mae, ViT-L, 64 V100: 800 epochs in 42 hours (its PRETRAIN.md)
    0.19  BEiT, ViT-B with its tokenizer, 16 V100: 800 epochs in 5 days (Bao et al. 2022, section 2.5)
    0.37  at most: MAE, ViT-B, 8 A100: 800 epochs in 18 hours, part of them at lower resolution (arXiv 2404.00509)

Wide networks spend more of their time in matrix products. MAE has a narrow decoder on all patches, so it uses less.
"""

from __future__ import annotations

OF_WIDTH = ((1024, 0.40), (768, 0.33), (384, 0.20), (0, 0.10))  # of the encoder, at least
OF_DROPPING = ((1024, 0.38), (768, 0.30), (384, 0.18), (0, 0.10))  # MAE
OF_CONVOLUTIONS = 0.20  # of a tokenizer's training


def assumed(objective: str, width: int | None) -> tuple[float, str]:
    """The share for an objective and its encoder's width (None: a tokenizer is trained), and what it stands for."""
    if width is None:
        return OF_CONVOLUTIONS, "assumed for a tokenizer's training, not measured"
    table, of = (OF_DROPPING, "mae on ") if objective == "mae" else (OF_WIDTH, "")
    share = next(share for least, share in table if width >= least)
    return share, f"assumed for {of}an encoder of width {width}, not measured"
