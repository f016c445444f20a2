"""Arithmetic of discrete codes: noise by name, the Gumbel-softmax relaxation, and how much of a codebook is in use.

Gumbel-softmax: Jang, Gu and Poole, 2016 (arXiv 1611.01144), section 2; Maddison, Mnih and Teh, 2016 (arXiv 1611.00712).

Deliberately different from `torch.nn.functional.gumbel_softmax`: the noise is a hash of (seed, index) and not a draw
from the generator of the process, so a sample gets the same noise on any device, in any batch and after any resume.
"""

import math
from typing import Any

import torch
from torch import Tensor

# "lowbias32" of C. Wellons' hash prospector: a bijection of 32 bits with little avalanche bias. int32 holds 0x846ca68b
# as a negative number.
_MULTIPLY_1 = 0x7FEB352D
_MULTIPLY_2 = 0x846CA68B - (1 << 32)
_GOLDEN = 0x9E3779B9 - (1 << 32)  # keeps seed 0 away from the fixed point mix(0) = 0


def _xor_shift_(x: Tensor, bits: int) -> None:
    """x ^= x >> bits on unsigned 32-bit words: int32 shifts copies of the sign in, which the mask removes."""
    shifted = x >> bits
    x.bitwise_xor_(shifted.bitwise_and_((1 << (32 - bits)) - 1))


def _mix_(x: Tensor) -> Tensor:
    """Hashes int32 words in place; products wrap around."""
    _xor_shift_(x, 16)
    x.mul_(_MULTIPLY_1)
    _xor_shift_(x, 15)
    x.mul_(_MULTIPLY_2)
    _xor_shift_(x, 16)
    return x


def uniform_noise(seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uniform float32 in the open interval (0, 1), a pure function of (seed, index in `shape`), bit-equal anywhere.

    seeds (B,) int64 -> (B, *shape); `shape` holds at most 2**31 - 1 elements.
    """
    low, high = seeds.contiguous().view(torch.int32).view(-1, 2).unbind(1)  # two (B,) halves of each seed
    # Two Feistel rounds spread the seed over both keys, so that neighbouring seeds share neither. A single key would
    # not do: index ^ key visits nearly the same words for many seeds, only in another order.
    low = _mix_(low ^ _mix_(high + _GOLDEN))
    high = _mix_(high ^ _mix_(low + _GOLDEN))

    index = torch.arange(math.prod(shape), dtype=torch.int32, device=seeds.device)
    words = _mix_(index ^ low[:, None])  # (B, prod(shape))
    words = _mix_(words.add_(high[:, None]))
    # 23 bits: k + 1/2 and its scaling are exact in float32, and the largest value stays below 1.
    noise = words.bitwise_right_shift_(9).bitwise_and_((1 << 23) - 1).float()
    return noise.add_(0.5).mul_(2.0**-23).view(-1, *shape)  # (B, *shape)


def gumbel_softmax(logits: Tensor, seeds: Tensor, temperature: Tensor) -> Tensor:
    """A relaxed one-hot sample of softmax(logits) at each position, in float32.

    logits (B, V, h, w); seeds (B,) int64; temperature 0-d. Small temperatures approach a one-hot with little gradient.
    """
    noise = uniform_noise(seeds, tuple(logits.shape[1:]))
    gumbel = noise.log_().neg_().log_().neg_()
    return ((logits.float() + gumbel) / temperature).softmax(dim=1)  # (B, V, h, w)


def grid_of(image_size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Codes per column and row of an image; ValueError when the size does not divide by the stride."""
    h, w = image_size
    if h % stride or w % stride:
        nearest = [max(1, round(size / stride)) * stride for size in (h, w)]
        raise ValueError(
            f"an image of {h}x{w} pixels does not divide by the tokenizer's stride of {stride}; "
            f"use {nearest[0]}x{nearest[1]}"
        )
    return h // stride, w // stride


def images_of(batch: dict[str, Any]) -> Tensor:
    """The images (B, C, H, W) that a tokenizer sees of a batch: its own view, where there is one."""
    return batch["tokenizer_images"] if "tokenizer_images" in batch else batch["images"]


def counted(weight: Tensor | None, rows: Tensor) -> Tensor:
    """1 for each of `rows` (B, ...) that counts and 0 for those of weight 0, which only pad: (B,) float32."""
    return torch.ones(len(rows), device=rows.device) if weight is None else (weight != 0).float()


def code_counts(codes: Tensor, num_codes: int, weight: Tensor | None = None) -> Tensor:
    """How often each code occurs, int64 (V,); rows whose `weight` (B,) is 0 are left out. codes (B, N) int64."""
    counts = torch.zeros(num_codes, dtype=torch.int64, device=codes.device)
    ones = torch.ones_like(codes) if weight is None else counted(weight, codes).long()[:, None].expand_as(codes)
    # Not `bincount`: on CUDA it waits for the host to learn the largest code.
    return counts.index_add_(0, codes.flatten(), ones.flatten())


def usage(counts: Tensor) -> Tensor:
    """Fraction of the codes that are in use, 0-d in [0, 1]: at least a tenth as frequent as if all were equally."""
    return ((counts > 0) & (counts >= 0.1 * counts.sum() / len(counts))).float().mean()


def dead(counts: Tensor) -> Tensor:
    """How many codes do not occur at all, 0-d."""
    return (counts == 0).sum()


def perplexity(counts: Tensor) -> Tensor:
    """exp(entropy) of the code distribution, 0-d: V when all codes are equally frequent, 1 when one code takes all."""
    total = counts.sum().clamp(min=1)
    frequency = counts.double() / total  # (V,)
    return torch.special.entr(frequency).sum().exp().float()
