"""What several kernels share: dtypes under autocast, sums in fp32, recomputation in backward."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that autocast gives to the next matrix product; x's own when autocast is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """x in fp32 if it has 16 bits. An fp64 tensor stays as it is, so that gradcheck works."""
    return x.float() if x.dtype.itemsize < 4 else x


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor):
    """total += left.T @ right; total may be of higher precision than the factors.

    A product of fp16 never becomes fp16: it can be beyond its largest number, 65,504.
    """
    if total.dtype == left.dtype:
        total.addmm_(left.T, right)
    elif left.is_cuda and torch.version.cuda:
        torch.addmm(total, left.T, right, out_dtype=total.dtype, out=total)
    elif left.dtype == torch.float16:
        total.addmm_(left.T.to(total.dtype), right.to(total.dtype))
    else:
        total += left.T @ right


def is_plain(layer) -> bool:
    """Whether calling the layer does no more than multiply by its weight: it has no adapter."""
    return isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward


def recompute(function, *tensors):
    """function(*tensors). Backward keeps only the tensors and runs the function again.

    The second run stops when backward has all that it needs: before the last matrix product, where
    that is torch's own. An operator of this project saves its tensors only when it has run.
    """
    if not torch.is_grad_enabled():
        return function(*tensors)
    # The random numbers are restored: an adapter on the last product may have dropout.
    return checkpoint(function, *tensors, use_reentrant=False)
