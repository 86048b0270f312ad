"""What several kernels share: dtypes under autocast, and recomputation in backward."""

import torch
from torch.utils.checkpoint import checkpoint


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that autocast gives to the next matrix product; x's own when autocast is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """x in fp32 if it has 16 bits. An fp64 tensor stays as it is, so that gradcheck works."""
    return x.float() if x.dtype.itemsize < 4 else x


def recompute(function, *tensors):
    """function(*tensors). Backward keeps only the tensors and runs the function again.

    The second run stops before the last matrix product, because backward does not need its result.
    """
    if not torch.is_grad_enabled():
        return function(*tensors)
    # The random numbers are restored: an adapter on the last product may have dropout.
    return checkpoint(function, *tensors, use_reentrant=False)


def apply(function, *inputs):
    """function.apply(*inputs) of a torch.autograd.Function, recomputed in a compiled graph.

    Otherwise the compiled graph keeps the result as well as its input, because the matrix product
    or the attention behind it needs the result.
    """
    if torch.compiler.is_compiling():
        return recompute(function.apply, *inputs)
    return function.apply(*inputs)
