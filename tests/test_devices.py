"""Hardware by name: what a name means, and what is refused."""

import re
from pathlib import Path

import pytest

from mim.config import ConfigError
from mim.planning import devices


@pytest.mark.parametrize(
    ("asked", "name"), [("H100", "h100"), ("a100-80", "a100"), ("RTX 4090", "rtx4090"), ("4090", "rtx4090")]
)
def test_a_name_is_found_however_it_is_written(asked, name):
    assert devices.find(asked).name == name


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"--gpu h1000 is unknown; choose one of v100, .*h100, .* or cpu"):
        devices.find("h1000")


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("Tesla V100-SXM2-32GB", "v100-32"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
    ],
)
def test_what_a_driver_reports_is_recognised(reported, name):
    found = next(device for device in devices.DEVICES.values() if re.search(device.reported, reported))
    assert found.name == name


@pytest.mark.parametrize(
    "reported",
    [
        "Tesla V100-PCIE-32GB", "Tesla V100S-PCIE-32GB", "NVIDIA A10G", "NVIDIA A100-PCIE-40GB", "NVIDIA H100 NVL",
        "NVIDIA H200 NVL", "NVIDIA GH200 480GB", "NVIDIA GB200", "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA GeForce RTX 3090 Ti",
    ],
)  # fmt: skip
def test_a_relative_with_other_rates_is_not_taken_for_the_card_itself(reported):
    assert not any(re.search(device.reported, reported) for device in devices.DEVICES.values())


def test_rates_are_dense_and_grow_with_lower_precision():
    for device in devices.DEVICES.values():
        assert device.fp16 > device.float32
        assert device.bf16 in (None, device.fp16)
    assert devices.find("h100").peak("bf16") == 989e12
    assert devices.find("v100").peak("bf16") is None


def test_the_cpus_of_this_machine_have_memory_but_no_known_rate():
    found = devices.find("cpu")
    assert found.memory > 0.1
    assert found.peak("bf16") is None


def test_the_page_shows_the_table():
    page = (Path(__file__).parent.parent / "docs/plan.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if re.match(r"\| [\w-]+ \| \d+ \|", line)]
    values = ("name", "memory", "bf16", "fp16", "float32", "bandwidth", "watts")
    table = [[str(getattr(device, v) or "none") for v in values] for device in devices.DEVICES.values()]
    assert rows == table
