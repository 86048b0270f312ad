"""Where and how a run computes: its device, its precision, its ranks, and what it is asked."""

import contextlib
import ctypes
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list
from torch.distributed.fsdp import CPUOffloadPolicy
from tqdm import tqdm

import kernels
from engine.children import shield_compilers
from engine.device import check_card_is_usable, check_kernels, describe_old_card
from engine.extras import Extras
from engine.stop import GivenUp, StopSignal
from engine.writer import Writer
from kernels.fp16_sums import use_fp16_sums


@dataclass
class Runtime:
    """A device and a precision, and this process's place among the ranks.

    dtype: of matrix products under autocast; None: fp32. scaler: of fp16's loss, otherwise
    disabled. accelerator: None where nothing is trained, as where memory is counted. started: by
    time.monotonic(). stop: whether the run was asked to end. extras: what may fail without ending
    it. writer: of checkpoints.
    """

    device: torch.device
    dtype: torch.dtype | None
    scaler: torch.amp.GradScaler
    accelerator: Accelerator | None = None
    rank: int = 0
    world: int = 1
    started: float = field(default_factory=time.monotonic)
    stop: StopSignal = field(default_factory=StopSignal)
    extras: Extras = field(default_factory=Extras)
    writer: Writer = field(default_factory=Writer)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, text: str):
        """Print on the first rank alone, above a progress bar and unbuffered."""
        if self.is_main:
            tqdm.write(text)
            sys.stdout.flush()

    # --- one micro-batch ---

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def backward(self, loss: torch.Tensor):
        # Distributed training averages the ranks' gradients. Times their number is their sum.
        self.scaler.scale(loss * self.world).backward()

    def accumulate(self, model, micro_batches: list[dict]) -> Iterator[dict]:
        """The micro-batches on the device. Ranks exchange gradients with the last one only."""
        for index, batch in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            with contextlib.ExitStack() as stack:
                if not is_last:
                    stack.enter_context(self.no_exchange(model))
                yield self.to_device(batch)

    def no_exchange(self, model):
        """Inside, backward leaves each rank with its own gradients."""
        return self.accelerator.no_sync(model) if self.accelerator else contextlib.nullcontext()

    def place(self, module: torch.nn.Module):
        """Move a model to the device."""
        module.to(self.device)

    def to_device(self, batch: dict) -> dict:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def seed(self, seed: int, step: int):
        """Make the randomness of a step (dropout) a function of (seed, step, rank) alone.

        A resumed run needs no generator states, and validation and samples cannot disturb it.
        """
        # torch takes 64 bits. With a seed such as a date, 20240607, the product has more.
        torch.manual_seed(((seed * 1_000_003 + step - 1) * 1_000_003 + self.rank) % 2**64)

    # --- all ranks: every rank must make these calls ---

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.accelerator is None or self.world == 1:
            return tensor
        return self.accelerator.reduce(tensor, reduction="sum")

    def any(self, flag: bool) -> bool:
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor(int(flag), device=self.device)))

    def any_of(self, flags: list[bool]) -> list[bool]:
        """any() of each flag, at once."""
        if self.world == 1:
            return flags
        return (self.sum(torch.tensor(flags, dtype=torch.int32, device=self.device)) > 0).tolist()

    def all(self, flag: bool) -> bool:
        return not self.any(not flag)

    def give_way(self):
        """Raises GivenUp where a validation or samples would delay a stop for too long."""
        if self.any(self.stop.is_urgent()):
            raise GivenUp

    def from_main(self, value):
        """The first rank's value."""
        if self.world == 1:
            return value
        values = [value]
        broadcast_object_list(values)
        return values[0]

    def main_first(self):
        """The first rank runs the block, then the others: they find its caches."""
        return (
            self.accelerator.main_process_first() if self.accelerator else contextlib.nullcontext()
        )

    def wait(self):
        if self.accelerator:
            self.accelerator.wait_for_everyone()


def start(mixed_precision: str, seed: int, device_choice: str = "auto") -> Runtime:
    """Set up the device, the ranks and the precision of a run, and seed every generator.

    device_choice: "cpu" leaves a GPU alone.

    Raises:
        ValueError: accelerate's launcher or the precision is set to what cannot be done here, or
            torch cannot use the GPU that is here.
    """
    if device_choice == "auto":
        check_card_is_usable()
    accelerator = make_accelerator(device_choice == "cpu")
    device, rank = accelerator.device, accelerator.process_index
    dtype = choose_dtype(mixed_precision, device, has_native_bf16(device))
    if device.type == "cuda":
        check_kernels(device)
        use_tf32(dtype)
    world = accelerator.num_processes
    rt = make_runtime(dtype, device, accelerator=accelerator, rank=rank, world=world)
    if mixed_precision == "fp16" and dtype is not torch.float16:
        name = "bf16" if dtype else "fp32"
        rt.say(f"mixed_precision fp16 is emulated on a {device.type}, and slow: using {name} here.")
    if device.type == "cuda" and (about := describe_old_card(device)):
        rt.say(about)
    seed_everything(seed)
    return rt


def make_runtime(dtype: torch.dtype | None, device: torch.device, **place) -> Runtime:
    """A runtime whose scaler fits its dtype: fp16 has one that works."""
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    return Runtime(device, dtype, scaler, extras=Extras(place.get("rank", 0)), **place)


def choose_dtype(
    mixed_precision: str, device: torch.device, native_bf16: bool
) -> torch.dtype | None:
    """What `mixed_precision` can mean on this device. native_bf16: whether it computes in bf16."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": None}[mixed_precision]
    if device.type != "cuda" and dtype is torch.float16:  # where fp16's scaler does not run
        return torch.bfloat16 if native_bf16 else None
    if device.type == "cuda" and dtype is torch.bfloat16 and not native_bf16:
        raise ValueError('This GPU has no bf16: set mixed_precision to "fp16".')
    return dtype


def use_tf32(dtype: torch.dtype | None):
    """Let a GPU round the factors of fp32 products to TF32, where all products are fp32.

    In 16 bits only the router of a mixture of experts is fp32: rounded, it picks other experts.
    """
    torch.set_float32_matmul_precision("high" if dtype is None else "highest")


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16. Where it is only emulated, fp32 is faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def fast_dtype(device: torch.device) -> torch.dtype:
    """The dtype of fast matrix products: bf16; fp16 on a GPU that is too old; otherwise fp32."""
    if has_native_bf16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def sum_dtype(device: torch.device) -> torch.dtype:
    """Of sums over a step or a validation. Apple's GPU has no fp64."""
    return torch.float32 if device.type == "mps" else torch.float64


def seed_everything(seed: int):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def make_accelerator(on_cpu: bool) -> Accelerator:
    """Raises ValueError when accelerate's launcher is set to what these scripts cannot do."""
    # Stated, because otherwise torchrun on a CPU would not distribute.
    on_cpu = on_cpu or not torch.accelerator.is_available()
    if on_cpu:
        keep_freed_memory()
    # Every rank reads the weights it starts from. transformers would leave all ranks but the first
    # without weights.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    # The other ranks wait while the first one prepares the data.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=24))
    # The loops spell out precision and accumulation. Accelerate places and distributes.
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="no",
        gradient_accumulation_steps=1,
        kwargs_handlers=[patience],
    )
    check_launcher(accelerator)
    transformers.utils.logging.disable_progress_bar()
    return accelerator


def check_launcher(accelerator: Accelerator):
    kind = accelerator.distributed_type
    known = not kind.startswith(("DEEPSPEED", "MEGATRON"))
    if kind == DistributedType.FSDP:
        offloads = isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy)
        known = accelerator.is_fsdp2 and not offloads
    if not known:
        raise ValueError(
            f"accelerate is configured for {kind.value} in a way that these scripts do not know: "
            "start them with torchrun, or set fsdp_version 2 without fsdp_offload_params."
        )


def keep_freed_memory():
    """Let malloc use large freed memory again. By default it maps and zeroes new pages each time.

    On a CPU the new pages cost as much as the elementwise operations. Only glibc has these knobs.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def compile_blocks(model, torch_compile, rt: Runtime):
    """torch.compile the training step: each block (5 s; the whole model takes 20 s), and on a GPU
    the last norm and the loss. "auto": on CUDA, where a compiler is found.

    Everything else must run under `eagerly`. A function has room for eight compiled variants: with
    validation and sampling among them, training would get none.
    """
    if torch_compile:
        shield_compilers()
    if torch_compile == "auto":
        problem = find_compiler_problem(rt.device) if rt.device.type == "cuda" else None
        torch_compile = rt.device.type == "cuda" and not rt.any(problem is not None)
        if problem:
            rt.say(f'torch_compile "auto": training without it, because it fails here: {problem}')
    if torch_compile:
        on_gpu = rt.device.type != "cpu"  # a CPU would need 0.3 GiB more (22M, fp32)
        for module in [*model.model.layers, *([model.model.norm] if on_gpu else [])]:
            module.compile()
        model.backend = kernels.compiled(model.backend)


def sum_in_fp16(model, fp16_accumulation: bool, rt: Runtime):
    """Let the blocks' linear layers sum their products in fp16, on a GPU that trains in fp16."""
    if not fp16_accumulation:
        return
    if rt.device.type != "cuda" or rt.dtype is not torch.float16:
        rt.say('fp16_accumulation: only a CUDA GPU in mixed_precision "fp16" has it: not used.')
        return
    for block in model.model.layers:
        use_fp16_sums(block)


def find_compiler_problem(device: torch.device) -> str | None:
    """Why torch.compile does not work here: no Triton (Windows), no C compiler (a bare Linux)."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # of many kinds, from torch, Triton and the system
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[0] if lines else type(error).__name__
    return None


def eagerly(function):
    """A function that runs no compiled code, and compiles none."""
    return torch.compiler.set_stance("force_eager")(function)
