import re

import pytest
import torch

from engine import cards, meter
from engine.cards import CARDS, find


@pytest.mark.parametrize(
    ("device", "name", "tflops", "gib"),
    [
        ("NVIDIA GeForce RTX 3090", "RTX 3090", 71, 24),
        ("GeForce RTX 3090", "RTX 3090", 71, 24),  # an old driver's
        ("NVIDIA GeForce RTX 3090 Ti", "RTX 3090 Ti", 80, 24),
        ("NVIDIA GeForce RTX 3080 Ti", "RTX 3080 Ti", 68.2, 12),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti SUPER", 88.2, 16),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 165.2, 24),
        ("NVIDIA GeForce RTX 5090", "RTX 5090", 209.5, 32),
        ("NVIDIA RTX A6000", "RTX A6000", 154.8, 48),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada", 364, 48),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000", 503.8, 96),
        (
            "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
            "RTX PRO 6000 Max-Q",
            438.9,
            96,
        ),
        ("Tesla T4", "T4", 65, 15),
        ("NVIDIA A10", "A10", 125, 22.5),
        ("NVIDIA A10G", "A10G", 70, 22.5),
        ("NVIDIA L4", "L4", 121, 22.5),
        ("NVIDIA L40", "L40", 181.05, 45),
        ("NVIDIA L40S", "L40S", 362.05, 45),
        ("Tesla V100-SXM2-16GB", "V100", 125, 16),
        ("Tesla V100-SXM2-32GB", "V100", 125, 32),
        ("Tesla V100-PCIE-16GB", "V100 PCIe", 112, 16),
        ("Tesla V100S-PCIE-32GB", "V100S PCIe", 130, 32),
        ("NVIDIA A100-SXM4-80GB", "A100", 312, 80),
        ("NVIDIA A100-SXM4-40GB", "A100", 312, 40),
        ("A100-SXM-80GB", "A100", 312, 80),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe", 312, 40),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe", 312, 80),
        ("NVIDIA H100 80GB HBM3", "H100", 989.4, 80),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756, 80),
        ("NVIDIA H100 NVL", "H100 NVL", 835.5, 94),
        ("NVIDIA H200", "H200", 989.4, 141),
        ("NVIDIA H200 NVL", "H200 NVL", 835.5, 141),
        # What a person types.
        ("3090", "RTX 3090", 71, 24),
        ("3090ti", "RTX 3090 Ti", 80, 24),
        ("rtx4090", "RTX 4090", 165.2, 24),
        ("4060 Ti 16GB", "RTX 4060 Ti", 44.1, 16),
        ("h100-sxm", "H100", 989.4, 80),
        ("a100 40 GB", "A100", 312, 40),
    ],
)
def test_a_name_finds_its_card(device, name, tflops, gib):
    card = find(device)
    assert card is not None
    assert (card.name, card.tflops, card.gib) == (name, tflops, gib)


@pytest.mark.parametrize(
    "device",
    [
        "NVIDIA GeForce RTX 3080 Laptop GPU",
        "NVIDIA GeForce RTX 3080 Ti Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 5090 D",
        "NVIDIA GeForce RTX 5090 Ti",
        "NVIDIA GeForce RTX 3090 SUPER",
        "NVIDIA GeForce GTX 1080 Ti",
        "NVIDIA RTX 5000 Ada Generation",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        "Quadro RTX 6000",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA A100-SXM-64GB",  # with more cores
        "NVIDIA A100X",
        "NVIDIA A10-24Q",
        "NVIDIA A800-SXM4-80GB",
        "NVIDIA H100 64GB HBM2",
        "NVIDIA H100 80GB HBM2e",
        "NVIDIA H20",
        "NVIDIA GH200 480GB",
        "Tesla V100-SXM2-32GB-LS",
        "NVIDIA T400",
        "",
    ],
)
def test_another_chip_is_unknown(device):
    assert find(device) is None


def test_every_row_is_found_by_its_own_name_and_has_a_source():
    for card in CARDS:
        assert find(card.name) is card
        assert card.source.strip()
    assert len(cards.BY_KEY) == len(CARDS)


def test_a_computed_peak_is_the_product_that_its_source_states():
    pattern = r"computed: (\d+) tensor cores x (\d+) MHz x (128|256)"
    for card in CARDS:
        if card.source.startswith("computed"):
            stated = re.fullmatch(pattern, card.source)
            assert stated, card.source
            cores, megahertz, per_clock = map(int, stated.groups())
            assert card.tflops == round(cores * megahertz * per_clock / 1e6, 1)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA GeForce RTX 3090", 71e12), ("NVIDIA GeForce RTX 3090 Laptop GPU", None)],
)
def test_the_meter_knows_the_peak_of_the_device(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert meter.peak_flops(torch.device("cuda")) == peak
    assert meter.peak_flops(torch.device("cpu")) is None
