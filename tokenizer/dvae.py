"""Discrete variational autoencoder: images <-> codes, in the layout of DALL-E's published weights.

Ramesh et al., "Zero-Shot Text-to-Image Generation", 2021 (arXiv 2102.12092), section 2.1 and appendix A.

A convolutional encoder gives logits over V codes at each position, a Gumbel-softmax relaxation makes a sample of them
differentiable, and a convolutional decoder gives a distribution of each pixel. Names and shapes of the parameters are
those of the release (`encoder.blocks.group_1.block_1.res_path.conv_1.w`), so that its weights load without renaming.

Deliberately different: the networks take images in [0, 1] and map them into the likelihood's open interval themselves;
schedules are fractions of the training instead of counts of updates; the number of groups (and so the stride) is free;
the encoder's first bias and last weight start so that many codes are in use from the first step (`_spread_codes`);
"mse" replaces the likelihood where a short training should not spend itself on scales.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quantize import grid_of, gumbel_softmax, images_of

EPSILON = 0.1  # images are mapped to [EPSILON, 1 - EPSILON], where logits are finite (appendix A.3)
LOGIT_GAIN = 8.0  # makes up for the contrast of photographs: their logits start with a standard deviation near 1


@dataclass
class Config:
    num_codes: int = 8192  # V, size of the codebook (A.1)
    channels: int = 3  # C of the images
    width: int = 256  # channels of the finest group; each coarser one has twice as many (A.1, n_hid of the release)
    n_init: int = 128  # channels after the decoder's first convolution (release)
    num_groups: int = 4  # the stride is 2 ** (num_groups - 1): 8 pixels per code (A.1)
    blocks_per_group: int = 2  # residual blocks (release)
    likelihood: str = "logit_laplace"  # or "mse"; the KL weight has other units there (A.3)
    kl_weight: float = 6.6  # beta, in nats of reconstruction per nat of KL (A.2); under "mse" in squared pixel units
    kl_warmup: float = 5_000 / 3_000_000  # fraction of training in which the KL weight rises from 0, on a cosine (A.2)
    temperature_start: float = 1.0  # of the relaxation (A.2)
    temperature_end: float = 1 / 16  # of the relaxation (A.2)
    temperature_decay: float = 150_000 / 3_000_000  # fraction of training in which it falls, on a cosine (A.2)


class Conv2d(nn.Module):
    """A convolution that keeps the size, with the release's parameter names `w` (out, in, k, k) and `b` (out,)."""

    def __init__(self, n_in: int, n_out: int, kernel: int):
        super().__init__()
        self.w = nn.Parameter(torch.randn(n_out, n_in, kernel, kernel) / math.sqrt(n_in * kernel**2))
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class Block(nn.Module):
    """Bottleneck residual block of four convolutions; `kernels` is what tells the encoder's from the decoder's."""

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, ...], gain: float):
        super().__init__()
        self.gain = gain
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        widths = (n_in, n_out // 4, n_out // 4, n_out // 4, n_out)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kernel in enumerate(kernels):
            layers[f"relu_{i + 1}"] = nn.ReLU()
            layers[f"conv_{i + 1}"] = Conv2d(widths[i], widths[i + 1], kernel)
        self.res_path = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.id_path(x), self.res_path(x), alpha=self.gain)


def _groups(n_in: int, widths: list[int], cfg: Config, kernels: tuple[int, ...], **resize: nn.Module) -> OrderedDict:
    """Groups of residual blocks by name; each but the last ends in the one named layer of `resize`."""
    gain = 1 / (len(widths) * cfg.blocks_per_group) ** 2  # 1 / (number of residual blocks)^2, as released
    groups: OrderedDict[str, nn.Module] = OrderedDict()
    for g, n_out in enumerate(widths):
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for j in range(cfg.blocks_per_group):
            layers[f"block_{j + 1}"] = Block(n_in, n_out, kernels, gain)
            n_in = n_out
        if g < len(widths) - 1:
            layers.update(resize)
        groups[f"group_{g + 1}"] = nn.Sequential(layers)
    return groups


def _output(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(n_in, n_out, 1)))


def _in_float32(layer: nn.Module, x: Tensor) -> Tensor:
    """Logits and log-scales are computed in float32 whatever the precision around them, as released."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.float())


class Encoder(nn.Module):
    """Images (B, C, H, W) in [EPSILON, 1 - EPSILON] -> logits (B, V, h, w)."""

    def __init__(self, cfg: Config):
        super().__init__()
        widths = [cfg.width * 2**g for g in range(cfg.num_groups)]
        layers: OrderedDict[str, nn.Module] = OrderedDict(input=Conv2d(cfg.channels, cfg.width, 7))
        layers.update(_groups(cfg.width, widths, cfg, (3, 3, 3, 1), pool=nn.MaxPool2d(2)))
        layers["output"] = _output(widths[-1], cfg.num_codes)
        self.blocks = nn.Sequential(layers)
        self._spread_codes()

    @torch.no_grad()
    def _spread_codes(self) -> None:
        """Starts with logits that differ between patches instead of between codes.

        With the published initialisation the mean of the image, and of the features behind each ReLU, gives every code
        an offset far larger than what a patch adds: one code wins everywhere, and a short training ends with a few.
        """
        first_w, first_b = self.blocks.get_parameter("input.w"), self.blocks.get_parameter("input.b")
        first_b.copy_(-0.5 * first_w.sum(dim=(1, 2, 3)))  # mid-grey becomes 0
        w = self.blocks.get_parameter("output.conv.w")
        w.sub_(w.mean(dim=1, keepdim=True)).mul_(LOGIT_GAIN)  # a feature level common to all channels becomes 0

    def forward(self, x: Tensor) -> Tensor:
        *body, output = self.blocks
        for layer in body:
            x = layer(x)
        return _in_float32(output, x)  # (B, V, h, w)


class Decoder(nn.Module):
    """Relaxed one-hot codes (B, V, h, w) -> parameters of each pixel's distribution (B, C or 2C, H, W)."""

    def __init__(self, cfg: Config):
        super().__init__()
        widths = [cfg.width * 2**g for g in reversed(range(cfg.num_groups))]
        num_outputs = cfg.channels * (2 if cfg.likelihood == "logit_laplace" else 1)
        layers: OrderedDict[str, nn.Module] = OrderedDict(input=Conv2d(cfg.num_codes, cfg.n_init, 1))
        layers.update(_groups(cfg.n_init, widths, cfg, (1, 3, 3, 3), upsample=nn.Upsample(scale_factor=2)))
        layers["output"] = _output(widths[-1], num_outputs)
        self.blocks = nn.Sequential(layers)

    def forward(self, relaxed: Tensor) -> Tensor:
        return self._after_input(self.blocks[0](relaxed))

    def from_codes(self, codes: Tensor) -> Tensor:
        """The same on hard codes (B, h, w): a 1x1 convolution of a one-hot is a row of its weight."""
        w, b = self.blocks.get_parameter("input.w"), self.blocks.get_parameter("input.b")
        rows = F.embedding(codes, w[:, :, 0, 0].T)  # (B, h, w, n_init)
        return self._after_input((rows + b).permute(0, 3, 1, 2))

    def _after_input(self, x: Tensor) -> Tensor:
        _, *body, output = self.blocks
        for layer in body:
            x = layer(x)
        return _in_float32(output, x)  # (B, C or 2C, H, W)


def map_pixels(images: Tensor) -> Tensor:
    """[0, 1] -> [EPSILON, 1 - EPSILON], in the memory layout that convolutions keep and in which the CPU is faster."""
    return ((1 - 2 * EPSILON) * images + EPSILON).contiguous(memory_format=torch.channels_last)


def unmap_pixels(mapped: Tensor) -> Tensor:
    """The inverse of `map_pixels`; what a sigmoid gives may leave [0, 1] by an eighth."""
    return (mapped - EPSILON) / (1 - 2 * EPSILON)


def logit_laplace_nll(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """-log f(x | mean, b = exp(log_scale)) of the Laplace distribution carried to (0, 1) by a sigmoid (A.3)."""
    deviation = (torch.logit(x) - mean).abs() * torch.exp(-log_scale)
    return deviation + log_scale + math.log(2) + torch.log(x * (1 - x))


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL(softmax(logits) || uniform) in nats at each position, float32: (B, V, h, w) -> (B, h, w)."""
    log_q = logits.float().log_softmax(dim=1)
    return (log_q.exp() * log_q).sum(dim=1) + math.log(logits.shape[1])  # (B, h, w)


def cosine(start: float, end: float, fraction: float, progress: Tensor) -> Tensor:
    """From `start` to `end` on half a cosine over the first `fraction` of training, then `end`; 0-d, on the device."""
    phase = (progress / max(fraction, 1e-12)).clamp(max=1)
    return end + (start - end) * 0.5 * (1 + torch.cos(math.pi * phase))


class DVAE(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.num_codes = cfg.num_codes
        self.channels = cfg.channels
        self.stride = 2 ** (cfg.num_groups - 1)
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Codes per column and row of an image; ValueError when the size does not divide by the stride."""
        return grid_of(image_size, self.stride)

    def encode(self, images: Tensor) -> Tensor:
        """The most likely code of each position: (B, C, H, W) in [0, 1] -> (B, N) int64, row-major."""
        return self._logits(images).argmax(dim=1).flatten(1)  # (B, N)

    def decode(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        """Most likely images of codes (B, N) that lie on `grid`: (B, C, H, W) in [0, 1]."""
        return self._reconstruction(self.decoder.from_codes(codes.unflatten(1, grid))).clamp(0, 1)

    def loss(self, batch: dict, progress: Tensor) -> dict[str, Tensor]:
        """The negative evidence lower bound per pixel value, in nats (or squared error), and its parts.

        Dividing both terms by C * H * W leaves the KL of one code a weight of kl_weight / 192 at stride 8 (A.2).
        """
        images = images_of(batch)  # (B, C, H, W)
        temperature = cosine(self.cfg.temperature_start, self.cfg.temperature_end, self.cfg.temperature_decay, progress)
        kl_weight = cosine(0.0, self.cfg.kl_weight, self.cfg.kl_warmup, progress)

        logits = self._logits(images)  # (B, V, h, w)
        relaxed = gumbel_softmax(logits, batch["noise"], temperature)  # (B, V, h, w)
        pred = self.decoder(relaxed)  # (B, C or 2C, H, W)
        reconstruction = self._reconstruction(pred)  # (B, C, H, W)
        squared_error = (reconstruction - images).square()
        if self.cfg.likelihood == "logit_laplace":
            mean, log_scale = pred.chunk(2, dim=1)  # each (B, C, H, W)
            misfit = logit_laplace_nll(map_pixels(images), mean, log_scale)
        else:
            misfit = squared_error
        kl = kl_to_uniform(logits).flatten(1)  # (B, N)
        values_per_code = images[0].numel() / kl.shape[1]
        return {
            "loss": misfit.flatten(1).mean(dim=1) + kl_weight * kl.mean(dim=1) / values_per_code,  # (B,)
            "recon_mse": squared_error.detach().flatten(1).mean(dim=1),  # (B,)
            "kl": kl.detach().mean(dim=1),  # (B,)
            "temperature": temperature,
            "kl_weight": kl_weight,
            "codes": logits.detach().argmax(dim=1).flatten(1),  # (B, N)
        }

    def _logits(self, images: Tensor) -> Tensor:
        self.grid((images.shape[-2], images.shape[-1]))
        return self.encoder(map_pixels(images))  # (B, V, h, w)

    def _reconstruction(self, pred: Tensor) -> Tensor:
        return unmap_pixels(torch.sigmoid(pred[:, : self.channels]))  # (B, C, H, W)


def build(cfg: Config) -> DVAE:
    if cfg.likelihood not in ("logit_laplace", "mse"):
        raise ValueError(f'tokenizer.likelihood="{cfg.likelihood}" is unknown; use "logit_laplace" or "mse"')
    return DVAE(cfg)
