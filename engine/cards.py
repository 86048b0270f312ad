"""NVIDIA's cards: the peak of their matrix products, their memory, and how to find one by name.

A peak is that of dense fp16 or bf16 products with fp32 accumulation, which is what PyTorch's
products reach. A data sheet often prints another number: with sparsity (twice as much), or with
fp16 accumulation (on a GeForce card twice as much again). T4 and V100 have no bf16 units.

Where NVIDIA prints no such number it is computed: tensor cores x boost clock x FLOPs per core and
clock, which are 128 on a GeForce card and 256 on a professional one of the same chip. Cores and
clocks are the reference card's, from public specification tables. The whitepapers:

    GA102            NVIDIA Ampere GA102 GPU Architecture, v2
    Ada              NVIDIA Ada GPU Architecture, v2.02
    RTX Blackwell    NVIDIA RTX Blackwell GPU Architecture, v1.1
    RTX PRO          NVIDIA RTX Blackwell PRO GPU Architecture, v1.0
    A100             NVIDIA A100 Tensor Core GPU Architecture, v1.0
    H100             NVIDIA H100 Tensor Core GPU Architecture, v1.04
"""

import re
from typing import NamedTuple


class Card(NamedTuple):
    name: str
    tflops: float
    gib: float  # of the usual variant; what nvidia-smi shows where ECC takes a part
    source: str  # of tflops
    other_gib: tuple[float, ...] = ()  # variants with the same name and peak

    @property
    def flops(self) -> float:
        """FLOP/s at the peak."""
        return self.tflops * 1e12


CARDS = (
    Card("RTX 3060", 25.5, 12, "computed: 112 tensor cores x 1777 MHz x 128", (8,)),
    Card("RTX 3060 Ti", 32.4, 8, "computed: 152 tensor cores x 1665 MHz x 128"),
    Card("RTX 3070", 40.6, 8, "computed: 184 tensor cores x 1725 MHz x 128"),
    Card("RTX 3070 Ti", 43.5, 8, "computed: 192 tensor cores x 1770 MHz x 128"),
    # The 3080 with 12 GiB bears the same name and has 3% more cores.
    Card("RTX 3080", 59.5, 10, "computed: 272 tensor cores x 1710 MHz x 128"),
    Card("RTX 3080 Ti", 68.2, 12, "computed: 320 tensor cores x 1665 MHz x 128"),
    Card("RTX 3090", 71, 24, "GA102 whitepaper, appendix A, table 9"),
    Card("RTX 3090 Ti", 80, 24, "computed: 336 tensor cores x 1860 MHz x 128"),
    Card("RTX 4060", 30.2, 8, "computed: 96 tensor cores x 2460 MHz x 128"),
    Card("RTX 4060 Ti", 44.1, 8, "computed: 136 tensor cores x 2535 MHz x 128", (16,)),
    Card("RTX 4070", 58.3, 12, "computed: 184 tensor cores x 2475 MHz x 128"),
    Card("RTX 4070 SUPER", 71, 12, "computed: 224 tensor cores x 2475 MHz x 128"),
    Card("RTX 4070 Ti", 80.2, 12, "computed: 240 tensor cores x 2610 MHz x 128"),
    Card("RTX 4070 Ti SUPER", 88.2, 16, "computed: 264 tensor cores x 2610 MHz x 128"),
    Card("RTX 4080", 97.5, 16, "computed: 304 tensor cores x 2505 MHz x 128"),
    Card("RTX 4080 SUPER", 104.4, 16, "computed: 320 tensor cores x 2550 MHz x 128"),
    Card("RTX 4090", 165.2, 24, "Ada whitepaper, appendix A, table 2"),
    Card("RTX 5070", 61.7, 12, "computed: 192 tensor cores x 2512 MHz x 128"),
    Card("RTX 5070 Ti", 87.9, 16, "computed: 280 tensor cores x 2452 MHz x 128"),
    Card("RTX 5080", 112.6, 16, "RTX Blackwell whitepaper, table of the RTX 5080"),
    Card("RTX 5090", 209.5, 32, "RTX Blackwell whitepaper, table 3"),
    Card("RTX A6000", 154.8, 48, "GA102 whitepaper, table 3"),
    Card("RTX 6000 Ada", 364, 48, "RTX PRO whitepaper, table 4"),
    Card("RTX PRO 6000", 503.8, 96, "RTX PRO whitepaper, table 4"),
    Card("RTX PRO 6000 Max-Q", 438.9, 96, "computed: 752 tensor cores x 2280 MHz x 256"),
    Card("T4", 65, 15, "T4 data sheet: mixed precision FP16/FP32"),
    Card("A10", 125, 22.5, "A10 data sheet"),
    Card("A10G", 70, 22.5, "A10G data sheet of AWS"),
    Card("L4", 121, 22.5, "L4 data sheet: half of 242 with sparsity"),
    Card("L40", 181.05, 45, "L40 data sheet"),
    Card("L40S", 362.05, 45, "L40S data sheet"),
    Card("V100", 125, 16, "A100 whitepaper, comparison of V100 and A100 (SXM)", (32,)),
    Card("V100 PCIe", 112, 16, "V100 data sheet", (32,)),
    Card("V100S PCIe", 130, 32, "V100 data sheet"),
    Card("A100", 312, 80, "A100 whitepaper, comparison of V100 and A100", (40,)),
    Card("A100 PCIe", 312, 80, "A100 data sheet", (40,)),
    Card("H100", 989.4, 80, "H100 whitepaper, table 3 (SXM5)"),
    Card("H100 PCIe", 756, 80, "H100 whitepaper, table 3"),
    Card("H100 NVL", 835.5, 94, "H100 product page: half of 1,671 with sparsity"),
    Card("H200", 989.4, 141, "H200 product page: half of 1,979 with sparsity, as the H100"),
    Card("H200 NVL", 835.5, 141, "H200 product page: half of 1,671 with sparsity"),
)

# Words of a name that tell no two cards of the table apart. An SXM module bears the plain name.
PLAIN = r"nvidia|geforce|tesla|rtx|generation|blackwell|workstation|edition|sxm\d?|hbm3"


def find(name: str) -> Card | None:
    """The card of a device's name ("NVIDIA A100-SXM4-40GB") or of a short one ("3090 Ti").

    Every word counts. A name with one more ("Laptop", "D", "MIG") is another, slower chip.
    """
    stated = re.search(r"\b(\d+) ?GB\b", name, re.IGNORECASE)
    card = BY_KEY.get(_key(name.replace(stated[0], "") if stated else name))
    if card is None or not stated:
        return card
    gib = float(stated[1])
    return card._replace(gib=gib) if gib in (card.gib, *card.other_gib) else None


def _key(name: str) -> str:
    """The words that tell cards apart, without what stands between them: "3090ti"."""
    return re.sub(r"[\s_-]", "", re.sub(rf"\b({PLAIN})(?![a-z])", "", name.lower()))


BY_KEY = {_key(card.name): card for card in CARDS}
