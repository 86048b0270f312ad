"""Where a run computes: on one device, or on several that hold replicas (DDP) or shards (FSDP2).

Whatever leaves a sharded run is gathered first, so its checkpoints are those of a single process.
"""

import contextlib
import ctypes
import os
import sys

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only


def make_accelerator() -> Accelerator:
    """Raises ValueError when accelerate's launcher is set to what these scripts cannot do."""
    # Precision and accumulation are spelled out in the loops; Accelerate places and distributes.
    on_cpu = not torch.accelerator.is_available()  # said, or torchrun on a CPU would not distribute
    if on_cpu:
        keep_freed_memory()
    # Every rank reads the weights it starts from: else transformers leaves all but the first empty.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", gradient_accumulation_steps=1)
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
    transformers.utils.logging.disable_progress_bar()
    return accelerator


def keep_freed_memory():
    """Let malloc reuse large blocks: by default each new tensor's pages are mapped and zeroed anew.

    On a CPU that costs as much as the elementwise operations themselves. Only glibc has the knobs.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def distribute(accelerator: Accelerator, module, blocks, optimizers):
    """The module that the ranks call: itself when alone, replicated (DDP), or sharded (FSDP2).

    blocks: the parts that are gathered one at a time, each just before it computes.
    """
    if accelerator.num_processes == 1:
        return module
    if accelerator.distributed_type != DistributedType.FSDP:
        return accelerator.prepare(module)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    reshard = accelerator.state.fsdp_plugin.reshard_after_forward
    for block in blocks:
        fully_shard(block, reshard_after_forward=reshard)
    fully_shard(module)
    shards = dict(module.named_parameters())
    for optimizer in optimizers:
        state = optimizer.state_dict()
        for group in optimizer.param_groups:
            group["params"] = [shards[names[id(parameter)]] for parameter in group["params"]]
        optimizer.state.clear()
        optimizer.load_state_dict(_shard_state(state, optimizer))
    return module


def _shard_state(state: dict, optimizer) -> dict:
    """An optimizer's state with each tensor of a parameter's shape laid out as that parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state["state"].items():
        like = parameters[index]
        for key, value in values.items():
            if value.shape == like.shape:  # not AdamW's count of steps
                values[key] = distribute_tensor(value, like.device_mesh, like.placements)
    return state


def gather(state):
    """A nested state with all shards put together. Sharded, all ranks must call it."""
    return tree_map_only(DTensor, DTensor.full_tensor, state)


def whole_model(model):
    """The model itself, or of a sharded one a whole copy. Sharded, all ranks must call it."""
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        return model
    with torch.device("meta"):
        whole = type(model)(model.config)
    whole.load_state_dict(gather(model.state_dict()), assign=True)
    whole.tie_weights()
    return whole


def gradient_sync(accelerator: Accelerator, model, is_last: bool):
    """Ranks exchange gradients once a step, with its last micro-batch."""
    return contextlib.nullcontext() if is_last else accelerator.no_sync(model)


def stop_requested(stop, accelerator: Accelerator) -> bool:
    """Whether any rank was asked to stop (a StopSignal): all must leave at the same step."""
    if accelerator.num_processes == 1:
        return stop.received is not None
    asked = torch.tensor(int(stop.received is not None), device=accelerator.device)
    return bool(accelerator.reduce(asked, reduction="sum"))
