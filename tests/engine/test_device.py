import subprocess
from pathlib import Path

import pytest
import torch

from engine.device import Card, check_card_is_usable, check_kernels, describe_old_card, find_card

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Sat Feb 22 17:39:14 UTC 2025\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (x@y)\n"
GCC = "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n"
INSTALL = "`pip install torch==2.13.0+{0} --index-url https://download.pytorch.org/whl/{0}`"
WHEELS = {
    "cu126": "the wheel for CUDA 12.6, which needs driver 525.60.13 or newer: "
    + INSTALL.format("cu126"),
    "cu130": "the wheel for CUDA 13.0, which needs driver 580 or newer: " + INSTALL.format("cu130"),
}
UPDATE = "update the driver to 580 or newer"
ON_THE_CPU = "To train without the card, add --device cpu."
NO_WHEEL = "No wheel of torch has them: build torch from source."
# torch.cuda.get_arch_list() of the wheels
CUDA_12_6 = "sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90"
CUDA_13_0 = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without a card, on which torch, built for CUDA 13.0, sees none."""
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    return tmp_path


def places(machine: Path) -> dict:
    return {"version_file": machine / "version", "devices": machine / "dev"}


def add_module(machine: Path, driver: str, line: str = CLOSED, device: str | None = "nvidia0"):
    (machine / "version").write_text(line.format(driver) + GCC)
    if device:
        (machine / "dev" / device).touch()


def add_nvidia_smi(machine: Path, script: str):
    program = machine / "bin/nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def message(machine: Path) -> str:
    with pytest.raises(ValueError, match=r".") as raised:
        check_card_is_usable(**places(machine))
    return str(raised.value)


# --- what the system shows --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "driver"), [(CLOSED, "535.183.01"), (OPEN, "580.65.06"), (OPEN, "580.142")]
)
def test_the_kernel_module_names_the_driver(machine, line, driver):
    add_module(machine, driver, line)
    assert find_card(**places(machine)) == Card(driver)


def test_a_container_may_have_the_second_card_alone(machine):
    add_module(machine, "535.183.01", device="nvidia1")
    assert find_card(**places(machine)) == Card("535.183.01")


def test_the_host_s_driver_without_a_device_file_is_seen(machine):
    add_module(machine, "535.183.01", device=None)
    assert find_card(**places(machine)) == Card("535.183.01", has_device_file=False)


def test_nvidia_smi_names_the_driver_where_no_kernel_module_does(machine):
    add_nvidia_smi(machine, 'echo "$1 $2" > "$0.log"; echo 566.24; echo 566.24')
    assert find_card(**places(machine)) == Card("566.24")
    query = (machine / "bin/nvidia-smi.log").read_text()
    assert query == "--query-gpu=driver_version --format=csv,noheader\n"


def test_nvidia_smi_is_asked_where_the_kernel_module_names_no_number(machine):
    add_module(machine, "TempVersion", OPEN)
    add_nvidia_smi(machine, "echo 540.4.0")
    assert find_card(**places(machine)) == Card("540.4.0")


@pytest.mark.parametrize(
    "script",
    [
        "echo No devices were found",
        "echo 535.183.01; exit 9",
        "echo NVIDIA-SMI has failed because it could not reach the driver; exit 9",
        "exit 0",
    ],
)
def test_without_an_answer_of_nvidia_smi_there_is_no_card(machine, script):
    add_nvidia_smi(machine, script)
    assert find_card(**places(machine)) is None


@pytest.mark.parametrize(
    "error", [subprocess.TimeoutExpired("nvidia-smi", 30), PermissionError("no")]
)
def test_an_nvidia_smi_that_hangs_or_cannot_start_is_no_card(machine, monkeypatch, error):
    def fail(*arguments, timeout, **options):
        assert timeout == 30
        raise error

    add_nvidia_smi(machine, "echo 535.183.01")
    monkeypatch.setattr(subprocess, "run", fail)
    assert find_card(**places(machine)) is None


def test_a_machine_with_nothing_of_nvidia_has_no_card_and_no_error(machine):
    check_card_is_usable(**places(machine))


# --- a card that torch cannot use -------------------------------------------------------------


def test_a_card_that_torch_can_use_is_not_looked_for(machine, monkeypatch):
    add_module(machine, "535.183.01")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    check_card_is_usable(**places(machine))


@pytest.mark.parametrize("visible", ["", " ", "-1", "none", "NoDevFiles", "-1,0"])
def test_who_hides_the_card_wants_the_cpu(machine, monkeypatch, visible):
    add_module(machine, "535.183.01")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    check_card_is_usable(**places(machine))


@pytest.mark.parametrize("visible", ["0", "1,0", "GPU-8932f937", "MIG-GPU-8932f937/1/2"])
def test_a_card_that_is_chosen_is_not_hidden(machine, monkeypatch, visible):
    add_module(machine, "535.183.01")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert "driver 535.183.01" in message(machine)


@pytest.mark.parametrize("driver", ["525.60.13", "525.105.17", "535.183.01", "570.86", "579.99.99"])
def test_a_driver_that_is_too_old_for_this_torch(machine, driver):
    add_module(machine, driver)
    assert message(machine) == (
        f"The NVIDIA driver {driver} is here, but torch 2.13.0+cu130 (built for CUDA 13.0) cannot "
        f"use a card: CUDA 13.0 needs driver 580 or newer. Install {WHEELS['cu126']} (or {UPDATE} "
        f"for cu130, which an RTX 50 needs). {ON_THE_CPU}"
    )


def test_nvidia_smi_s_driver_is_judged_in_the_same_way(machine):
    add_nvidia_smi(machine, "echo 566.24")
    assert "driver 566.24" in message(machine) and WHEELS["cu126"] in message(machine)


@pytest.mark.parametrize("driver", ["470.256.02", "525.60.11"])
def test_a_driver_that_is_too_old_for_every_wheel(machine, driver):
    add_module(machine, driver)
    assert message(machine) == (
        f"The NVIDIA driver {driver} is here, but torch 2.13.0+cu130 (built for CUDA 13.0) cannot "
        "use a card: CUDA 13.0 needs driver 580 or newer. No wheel of torch runs with so old a "
        f"driver: {UPDATE}. {ON_THE_CPU}"
    )


@pytest.mark.parametrize(
    ("driver", "advice"),
    [
        ("580.65.06", f"Install {WHEELS['cu130']} (a V100 or a GTX 10 needs cu126 in both places)"),
        ("535.183.01", f"Install {WHEELS['cu126']} (or {UPDATE} for cu130, which an RTX 50 needs)"),
        ("470.256.02", f"No wheel of torch runs with so old a driver: {UPDATE}"),
    ],
)
def test_a_cpu_build_of_torch(machine, monkeypatch, driver, advice):
    add_module(machine, driver)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert message(machine) == (
        f"The NVIDIA driver {driver} is here, but torch 2.13.0+cpu (built without CUDA) cannot use "
        f"a card: it is a CPU build. {advice}. {ON_THE_CPU}"
    )


def test_a_container_without_a_gpu(machine):
    add_module(machine, "580.65.06", device=None)
    assert message(machine) == (
        "The NVIDIA driver 580.65.06 is here, but torch 2.13.0+cu130 (built for CUDA 13.0) cannot "
        "use a card: no /dev/nvidia0 is here, as in a container that was started without a GPU. "
        "Start it with `docker run --gpus all` (outside of a container, run `nvidia-smi` once: it "
        f"makes the file). {ON_THE_CPU}"
    )


def fail_to_start():
    raise RuntimeError("CUDA unknown error: set it before the start.\nA second line")


def fail_to_allocate(*size, device):
    raise AssertionError("No CUDA GPUs are available")


@pytest.mark.parametrize(
    ("place", "name", "broken", "words"),
    [
        (torch.cuda, "init", fail_to_start, "CUDA unknown error: set it before the start."),
        (torch, "zeros", fail_to_allocate, "No CUDA GPUs are available"),
        (torch.cuda, "init", lambda: None, "no error"),
    ],
)
def test_a_driver_that_is_new_enough_and_does_not_work(
    machine, monkeypatch, place, name, broken, words
):
    add_module(machine, "580.65.06", OPEN)
    monkeypatch.setattr(place, name, broken)
    assert message(machine) == (
        "The NVIDIA driver 580.65.06 is here, but torch 2.13.0+cu130 (built for CUDA 13.0) cannot "
        "use a card: the driver is new enough (CUDA 13.0 needs 580), and torch says "
        f'"{words}". Usual causes: the driver was updated and the machine not rebooted; the module '
        "nvidia_uvm is not loaded (`sudo modprobe nvidia_uvm`); a container was started without "
        f"`--gpus all`. {ON_THE_CPU}"
    )


def test_a_card_that_is_chosen_and_not_there_is_a_cause_too(machine, monkeypatch):
    add_module(machine, "610.43.02")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert "`--gpus all`; CUDA_VISIBLE_DEVICES=7 names a card that is not here. " in message(
        machine
    )


@pytest.mark.parametrize(
    ("cuda", "driver", "expected"),
    [
        ("12.6", "470.256.02", "CUDA 12.6 needs driver 525.60.13 or newer. No wheel of torch runs"),
        ("12.8", "525.60.13", "the driver is new enough (CUDA 12.8 needs 525.60.13)"),
        ("13.2", "580.65.06", "the driver is new enough (CUDA 13.2 needs 580)"),
        ("14.0", "580.65.06", "the driver is new enough (CUDA 14.0 needs 580)"),
        ("14.0", "535.183.01", "CUDA 14.0 needs driver 580 or newer."),
    ],
)
def test_other_versions_of_cuda_need_what_their_major_version_needs(
    machine, monkeypatch, cuda, driver, expected
):
    add_module(machine, driver)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert expected in message(machine)


# --- the kernels of a wheel -------------------------------------------------------------------


@pytest.fixture
def use(monkeypatch):
    """Let torch, of a version of CUDA and with these kernels, have this card."""

    def use(name: str, capability: tuple, cuda: str | None = "13.0", entries: str = CUDA_13_0):
        monkeypatch.setattr(torch, "__version__", "2.13.0+cu" + str(cuda).replace(".", ""))
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: entries.split())

    return use


@pytest.mark.parametrize(
    ("capability", "entries"),
    [
        ((7, 5), CUDA_13_0),
        ((8, 0), CUDA_13_0),
        ((8, 6), CUDA_13_0),
        ((8, 9), CUDA_13_0),  # RTX 4090: sm_86 serves it
        ((9, 0), "sm_90a"),
        ((10, 3), CUDA_13_0),
        ((12, 1), CUDA_13_0),
        ((7, 0), CUDA_12_6),
        ((6, 1), CUDA_12_6),
        ((13, 0), CUDA_13_0 + " compute_120"),  # a card to come: its driver compiles the PTX
        ((12, 0), "sm_90 compute_90"),
        ((12, 0), ""),  # nothing is known
    ],
)
def test_a_card_with_kernels_passes(use, capability, entries):
    use("a card", capability, entries=entries)
    check_kernels(CUDA)


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_cpu_and_a_card_of_amd_are_not_checked(use, device):
    use("a card", (7, 0), cuda="13.0" if device == CPU else None)
    check_kernels(device)


@pytest.mark.parametrize(
    ("name", "capability", "cuda", "entries", "fix"),
    [
        ("Tesla V100", (7, 0), "13.0", CUDA_13_0, f"Install {WHEELS['cu126']}."),
        ("GTX 1080 Ti", (6, 1), "13.2", CUDA_13_0, f"Install {WHEELS['cu126']}."),
        ("Tesla V100", (7, 0), "12.8", "sm_75 sm_80", f"Install {WHEELS['cu126']}."),
        ("RTX 5090", (12, 0), "12.6", CUDA_12_6, f"Install {WHEELS['cu130']}."),
        ("T4G", (7, 5), "13.0", "sm_80", NO_WHEEL),
        ("V100", (7, 0), "12.6", "sm_80", NO_WHEEL),
        ("K80", (3, 7), "13.0", "sm_75", NO_WHEEL),
        ("a card", (8, 0), "12.6", "sm_86", f"Install {WHEELS['cu130']}."),
        ("a card", (9, 0), "12.6", "sm_86 compute_120", f"Install {WHEELS['cu130']}."),
    ],
)
def test_a_card_without_kernels(use, name, capability, cuda, entries, fix):
    use(name, capability, cuda, entries)
    with pytest.raises(ValueError, match="has no kernels for") as raised:
        check_kernels(CUDA)
    assert str(raised.value) == (
        f"torch {torch.__version__} has no kernels for {name} (compute capability "
        f"{capability[0]}.{capability[1]}): it has {', '.join(entries.split())}. {fix} {ON_THE_CPU}"
    )


# --- old cards --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "capability"), [("Tesla T4", (7, 5)), ("Tesla V100", (7, 0))])
def test_a_card_before_ampere_says_what_it_lacks(use, name, capability):
    use(name, capability)
    assert describe_old_card(CUDA) == (
        f"{name} (compute capability {capability[0]}.{capability[1]}) has no bf16: keep "
        'mixed_precision "fp16", the default. It has no flash kernel for packed rows either, so a '
        "step takes more memory and more time."
    )


def test_ampere_and_a_cpu_lack_nothing(use):
    use("NVIDIA A100", (8, 0))
    assert describe_old_card(CUDA) is None
    use("none", (7, 5))
    assert describe_old_card(CPU) is None
