"""VQ-KD: codes that carry what a frozen teacher sees; with `target: pixels` a VQ-VAE with the same codebook.

Peng et al. 2022, "BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers", arXiv 2208.06366, section
2.1. Differences, all in the codebook (`tokenizer/codebook.py`): k-means over all ranks, averages of sums and counts,
revival of dead codes.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizer import networks
from tokenizer.codebook import Codebook
from tokenizer.vectors import VectorTokenizer


@dataclass
class Config(networks.Networks):
    num_codes: int = 8192  # K
    code_width: int = 32  # d
    commitment: float = 1.0  # beta: weight of the squared distance to the code (release)
    decay: float = 0.99  # of the codebook's moving averages (release)
    dead_below: float = 0.1  # of the mean size: a code that takes less is revived
    num_revived: int = 64  # codes that may be revived per step; 0: never, as released
    k_means: int = 10  # iterations at the start (release); 0: codes start at random


def build(cfg: Config) -> VectorTokenizer:
    """Build the tokenizer with a random codebook; a run starts it with k-means on its first batches."""
    quantizer = Codebook(
        cfg.num_codes, cfg.code_width, decay=cfg.decay, dead_below=cfg.dead_below, num_revived=cfg.num_revived,
        iterations=cfg.k_means,
    )  # fmt: skip
    return VectorTokenizer(cfg, quantizer, cfg.num_codes, cfg.code_width, commitment=cfg.commitment)
