"""Whether torch can use the NVIDIA card that the system shows, and what an old card lacks.

Without these checks a card whose driver is too old is passed over: torch sees no card, and a run
trains on the CPU in silence.
"""

import contextlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

# Major version of CUDA -> the oldest driver. A wheel for CUDA 12.6 runs with any driver since CUDA
# 12.0: https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html has
# 12.x >= 525, 13.x >= 580. Read in quotations only: CUDA 12's release notes with 525.60.13, on
# Windows 528.33. Windows drivers in between are of 2022: for them torch's own words are quoted.
OLDEST_DRIVERS = {"12": "525.60.13", "13": "580"}

# The wheels to choose from: version of CUDA -> the oldest card that it has kernels for.
# torch 2.11 has cu126, cu128, cu130; 2.12, 2.13 and 2.14 have cu126, cu130, cu132. cu126 has sm_50
# to sm_90 (V100: sm_70) and no PTX, the others sm_75 to sm_120; on ARM they begin at sm_80.
# https://github.com/pytorch/pytorch/pull/175253 (2.11), /182849 (2.12), /187075, /197555 (2.14).
# torch 2.15 is to have no cu126 (a plan: issues/190385). Not opened: the indexes themselves.
WHEELS = {"13.0": (7, 5), "12.6": (5, 0)}

VERSION_FILE = Path("/proc/driver/nvidia/version")
DEVICES = Path("/dev")
WITHOUT_CARD = "To train without the card, add --device cpu."


@dataclass(frozen=True)
class Card:
    """What the system shows of an NVIDIA card, whatever torch sees.

    driver: its version, such as "535.183.01". has_device_file: whether this process has a
    /dev/nvidia0 to open.
    """

    driver: str
    has_device_file: bool = True


def find_card(version_file: Path = VERSION_FILE, devices: Path = DEVICES) -> Card | None:
    """The card that the kernel module shows, or else nvidia-smi. None: there is no card."""
    with contextlib.suppress(OSError):
        text = version_file.read_text(errors="replace")
        # "... x86_64 Kernel Module  535.183.01  ..." or "... Open Kernel Module for x86_64  580..."
        if found := re.search(r"NVRM version:.*?\s(\d+(?:\.\d+)+)", text):
            # A container shares the host's /proc but not its /dev. It may have nvidia1 alone.
            return Card(found[1], has_device_file=any(devices.glob("nvidia[0-9]*")))
    return ask_nvidia_smi()  # Windows and WSL2 have no such file


def ask_nvidia_smi() -> Card | None:
    if (program := shutil.which("nvidia-smi")) is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:  # the first call after a boot takes seconds for each card
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.match(r"\d+(?:\.\d+)+", answer.stdout)  # one line for each card
    return Card(found[0]) if found and answer.returncode == 0 else None


def check_card_is_usable(version_file: Path = VERSION_FILE, devices: Path = DEVICES):
    """Call it where a run would take the CPU of itself, not where the user asked for the CPU.

    Raises:
        ValueError: the system shows an NVIDIA card, nobody hid it, and torch cannot use it.
    """
    if torch.accelerator.is_available() or is_card_hidden():
        return
    if (card := find_card(version_file, devices)) is None:
        return
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    raise ValueError(
        f"The NVIDIA driver {card.driver} is here, but torch {torch.__version__} ({build}) cannot "
        f"use a card: {explain(card)} {WITHOUT_CARD}"
    )


def is_card_hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES names no card ("", "-1", "none"): then the CPU is wanted."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    return re.match(r"\d|GPU-|MIG-", first) is None


def explain(card: Card) -> str:
    """Why torch cannot use the card, and what to do about it."""
    if not card.has_device_file:
        return (
            "no /dev/nvidia0 is here, as in a container that was started without a GPU. Start it "
            "with `docker run --gpus all` (outside of a container, run `nvidia-smi` once: it makes "
            "the file)."
        )
    cuda = torch.version.cuda
    if cuda is None:
        return f"it is a CPU build. {how_to_fit(card.driver)}"
    if not is_driver_enough(card.driver, cuda):
        needs = f"CUDA {cuda} needs driver {oldest_driver(cuda)} or newer."
        return f"{needs} {how_to_fit(card.driver)}"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    missing = f"; CUDA_VISIBLE_DEVICES={visible} names a card that is not here" if visible else ""
    return (
        f"the driver is new enough (CUDA {cuda} needs {oldest_driver(cuda)}), and torch says "
        f'"{ask_torch()}". Usual causes: the driver was updated and the machine not rebooted; the '
        "module nvidia_uvm is not loaded (`sudo modprobe nvidia_uvm`); a container was started "
        f"without `--gpus all`{missing}."
    )


def ask_torch() -> str:
    """The first line of the error that torch has when it is made to use a card."""
    try:
        torch.cuda.init()
        torch.zeros(1, device="cuda")
    except Exception as error:  # torch raises AssertionError, RuntimeError and its own classes
        return str(error).strip().partition("\n")[0]
    return "no error"


def how_to_fit(driver: str) -> str:
    """What to install or to update. Without torch nothing tells how old the card is."""
    update = f"update the driver to {oldest_driver('13.0')} or newer"
    if is_driver_enough(driver, "13.0"):
        return f"Install {name_wheel('13.0')} (a V100 or a GTX 10 needs cu126 in both places)."
    if is_driver_enough(driver, "12.6"):
        return f"Install {name_wheel('12.6')} (or {update} for cu130, which an RTX 50 needs)."
    return f"No wheel of torch runs with so old a driver: {update}."


def is_driver_enough(driver: str, cuda: str) -> bool:
    has, needs = (list(map(int, version.split("."))) for version in (driver, oldest_driver(cuda)))
    return has >= needs


def oldest_driver(cuda: str) -> str:
    """A major version that is not known yet needs at least what the last known one needs."""
    return OLDEST_DRIVERS.get(cuda.split(".")[0], OLDEST_DRIVERS["13"])


def name_wheel(cuda: str) -> str:
    """The command names the wheel in full, with its +cu126.

    With torch==2.13.0 alone pip finds the installed build, says "already satisfied" and stops.
    """
    index = "cu" + cuda.replace(".", "")
    version = torch.__version__.partition("+")[0]
    return (
        f"the wheel for CUDA {cuda}, which needs driver {oldest_driver(cuda)} or newer: "
        f"`pip install torch=={version}+{index} "
        f"--index-url https://download.pytorch.org/whl/{index}`"
    )


def check_kernels(device: torch.device):
    """Raises ValueError if this wheel of torch has no kernels for the card."""
    if device.type != "cuda" or torch.version.cuda is None:  # ROCm: other names, not checked
        return
    capability = torch.cuda.get_device_capability(device)
    entries = torch.cuda.get_arch_list()  # [] says nothing
    if not entries or any(has_kernels(entry, capability) for entry in entries):
        return
    cuda = next((cuda for cuda, oldest in WHEELS.items() if capability >= oldest), None)
    fix = "No wheel of torch has them: build torch from source."
    if cuda is not None and not torch.version.cuda.startswith(cuda):
        fix = f"Install {name_wheel(cuda)}."
    raise ValueError(
        f"torch {torch.__version__} has no kernels for {describe(device)}: it has "
        f"{', '.join(entries)}. {fix} {WITHOUT_CARD}"
    )


def has_kernels(entry: str, capability: tuple[int, int]) -> bool:
    """entry: "sm_86" (machine code, for 8.6 to 8.9) or "compute_120" (PTX, for 12.0 and later)."""
    kind, _, number = entry.partition("_")
    major, minor = divmod(int(number.rstrip("af")), 10)  # sm_90a
    if kind == "compute":
        return capability >= (major, minor)
    return capability[0] == major and capability[1] >= minor


def describe_old_card(device: torch.device) -> str | None:
    """What a card before Ampere lacks. None: no such card."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0):
        return None
    return (
        f'{describe(device)} has no bf16: keep mixed_precision "fp16", the default. It has no '
        "flash kernel for packed rows either, so a step takes more memory and more time."
    )


def describe(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
