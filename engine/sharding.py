"""Several devices that hold replicas of a model (DDP) or shards of it (FSDP2).

What leaves a sharded run is gathered first. Its checkpoints are those of a single process.
"""

import copy

import torch
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._pytree import tree_map_only

from engine.runtime import Runtime


def distribute(rt: Runtime, module, blocks, optimizers):
    """The module that the ranks call: itself when alone, replicated (DDP), or sharded (FSDP2).

    blocks: the parts whose shards are gathered one part at a time, just before it computes.
    """
    accelerator = rt.accelerator
    if accelerator is None or rt.world == 1:
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
    """Lay out each tensor of an optimizer's state as its parameter, if it has its shape."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state["state"].items():
        like = parameters[index]
        for key, value in values.items():
            if value.shape == like.shape:  # not AdamW's count of steps
                values[key] = distribute_tensor(value, like.device_mesh, like.placements)
    return state


def gather(state):
    """A nested state with all shards put together. All ranks must call it."""
    return tree_map_only(DTensor, DTensor.full_tensor, state)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, in the same memory; all of it, unless it is in shards."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_stack(parts: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """own_part of matrices laid out as `like`, (count, own height, own width) -> whole ones."""
    if not isinstance(like, DTensor):
        return parts
    whole = torch.empty(len(parts), *like.shape, device="meta")
    stack = DTensor.from_local(
        parts,
        like.device_mesh,
        stack_placements(like),
        shape=whole.shape,
        stride=whole.stride(),
    )
    return stack.full_tensor()


def own_part_of_stack(stack: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The opposite of gather_stack."""
    if not isinstance(like, DTensor):
        return stack
    placements = stack_placements(like)  # no source: every rank has the whole stack
    return distribute_tensor(stack, like.device_mesh, placements, src_data_rank=None).to_local()


def stack_placements(like: DTensor) -> list:
    """How a stack of matrices is laid out, each of which is laid out as `like`."""
    return [Shard(p.dim + 1) if isinstance(p, Shard) else p for p in like.placements]


def whole_model(model):
    """The model itself, or a whole copy of a sharded one. All ranks must call it."""
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        return model
    return with_tensors(model, gather(model.state_dict()))


def with_tensors(model, state: dict):
    """A model of the same kind that consists of these tensors."""
    with torch.device("meta"):
        other = type(model)(copy.deepcopy(model.config))
    other.load_state_dict(state, assign=True)
    other.tie_weights()
    return other
