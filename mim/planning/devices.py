"""What training hardware can do, by name: memory, peak rates, bandwidth and power from the vendors' data sheets.

Rates are dense (data sheets often print twice that, "with sparsity"), of matrix products that add up in float32.
`float32` is that of ordinary cores: torch takes TF32 only where it is told to, and this program does not tell it.
Memory is what the data sheet says; a little of it is never free (ECC, the driver). Editions of a data sheet differ: of
T4 the first one is taken (320 GB/s, later 300), of H100 the final one (the preliminary one of 2022 had other rates).
The machine's own GPU is known by its exact name alone: relatives (V100-PCIE, A10G, H100 NVL, a MIG slice) have other
rates.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from mim.config import ConfigError

GIB, TERA = 2**30, 1e12
NVIDIA = "NVIDIA data sheet"


@dataclass(frozen=True)
class Device:
    """One GPU, or the CPUs of this machine."""

    name: str  # for --gpu
    reported: str  # how the driver's name for it ends, a regular expression
    memory: float  # GiB
    bf16: float | None  # TFLOP/s; None: it has none, or nobody knows before it is measured
    fp16: float | None
    float32: float | None
    bandwidth: float | None  # GB/s of its memory
    watts: float | None  # of the board at most
    source: str

    def peak(self, precision: str) -> float | None:
        """Operations per second at `train.precision`."""
        rate = {"bf16": self.bf16, "fp16": self.fp16, "no": self.float32}[precision]
        return None if rate is None else rate * TERA


DEVICES = {
    device.name: device
    for device in (
        Device("v100", r"V100-SXM2-16GB$", 16, None, 125, 15.7, 900, 300, f"{NVIDIA} V100, SXM2, 2017"),
        Device("v100-32", r"V100-SXM2-32GB$", 32, None, 125, 15.7, 900, 300, f"{NVIDIA} V100, SXM2, 2018"),
        Device("t4", r"\bT4$", 16, None, 65, 8.1, 320, 70, f"{NVIDIA} T4, 2018"),
        Device("a10", r"\bA10$", 24, 125, 125, 31.2, 600, 150, f"{NVIDIA} A10, 2021"),
        Device("a40", r"\bA40$", 48, 149.7, 149.7, 37.4, 696, 300, f"{NVIDIA} A40, 2020"),
        Device("a100-40", r"A100-SXM4-40GB$", 40, 312, 312, 19.5, 1555, 400, f"{NVIDIA} A100, SXM, 2020"),
        Device("a100-pcie", r"A100 80GB PCIe$", 80, 312, 312, 19.5, 1935, 300, f"{NVIDIA} A100 80GB, PCIe, 2021"),
        Device("a100", r"A100-SXM4-80GB$", 80, 312, 312, 19.5, 2039, 400, f"{NVIDIA} A100 80GB, SXM, 2021"),
        Device("l4", r"\bL4$", 24, 121, 121, 30.3, 300, 72, f"{NVIDIA} L4, 2023"),
        Device("l40s", r"\bL40S$", 48, 362, 362, 91.6, 864, 350, f"{NVIDIA} L40S, 2023"),
        Device("h100-pcie", r"H100 PCIe$", 80, 756, 756, 51, 2000, 350, f"{NVIDIA} H100, PCIe, 2023"),
        Device("h100", r"H100 80GB HBM3$", 80, 989, 989, 67, 3350, 700, f"{NVIDIA} H100, SXM, 2023"),
        Device("h200", r"\bH200$", 141, 989, 989, 67, 4800, 700, f"{NVIDIA} H200, SXM, 2023"),
        Device("b200", r"\bB200$", 180, 2250, 2250, 75, 7700, 1000, f"{NVIDIA} HGX B200, of one GPU, 2025"),
        Device("rtx3090", r"RTX 3090$", 24, 71, 71, 35.6, 936, 350, "NVIDIA GA102 white paper, 2020"),
        Device("rtx4090", r"RTX 4090$", 24, 165.2, 165.2, 82.6, 1008, 450, "NVIDIA Ada white paper, 2022"),
        Device("rtx5090", r"RTX 5090$", 32, 209.5, 209.5, 104.8, 1792, 575, "NVIDIA RTX Blackwell white paper, 2025"),
        Device("mi300x", r"MI300X", 192, 1307, 1307, 163.4, 5300, 750, "AMD Instinct MI300X data sheet, 2023"),
    )
}
OTHER_NAMES = {"a100-80": "a100", "a100-sxm": "a100", "h100-sxm": "h100", "h200-sxm": "h200", "v100-16": "v100"}
CPU = "cpu"


def find(name: str | None) -> Device:
    """A device by its name for `--gpu`; `None` is what this machine has, `cpu` its CPUs."""
    if name is None:
        return here()
    key = re.sub(r"[\s_]+", "-", name.strip().lower()).replace("rtx-", "rtx").removeprefix("nvidia-")
    key = OTHER_NAMES.get(key, f"rtx{key}" if f"rtx{key}" in DEVICES else key)
    if key == CPU:
        return cpus()
    if key not in DEVICES:
        raise ConfigError(
            f"--gpu {name} is unknown; choose one of {', '.join(DEVICES)} or {CPU}, or leave it out on the machine "
            f"that has it and measure with --measure"
        )
    return DEVICES[key]


def here() -> Device:
    """The accelerator of this machine, with the memory that it reports, or its CPUs.

    One that stands in no table has no rates; they have to be measured.
    """
    import torch

    if not torch.cuda.is_available():
        return cpus()
    properties: Any = torch.cuda.get_device_properties(0)
    known = next((device for device in DEVICES.values() if re.search(device.reported, properties.name)), None)
    memory = properties.total_memory / GIB
    if known is None:
        return Device(properties.name, "", memory, None, None, None, None, None, "the driver of this machine")
    return Device(**{**vars(known), "memory": memory})


def cpus() -> Device:
    """The CPUs of this machine: their memory is known, their rates are not."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return Device(CPU, "", memory, None, None, None, None, None, "this machine")
