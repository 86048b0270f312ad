"""RMSNorm and rotary embedding as one autograd node each: fewer passes, and less kept for backward.

Written out as separate operations they would keep every intermediate, several of them in fp32.
Here only the input is kept, in the dtype it came in, and one number per normalised vector.
torch.compile traces through both, fuses what is left, and keeps the input alone. recompute() does
the same for any function, at the price of running it again.
"""

import torch
from torch.utils.checkpoint import checkpoint


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that autocast will feed to the next matrix product: x's own when it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype.itemsize < 4 else x


def recompute(function, *tensors):
    """function(*tensors), keeping only the tensors: what is between is computed again in backward.

    Recomputation stops before the last matrix product, whose result backward does not need.
    """
    if not torch.is_grad_enabled():
        return function(*tensors)
    # With the same random numbers: an adapter on the last product may have dropout.
    return checkpoint(function, *tensors, use_reentrant=False)


def apply(function, *inputs):
    """function.apply(*inputs) of a torch.autograd.Function, in a compiled graph with recompute().

    The graph would keep the result beside its input, for the product or attention that takes it.
    """
    if torch.compiler.is_compiling():
        return recompute(function.apply, *inputs)
    return function.apply(*inputs)


def normalize(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x / sqrt(mean(x^2) + eps) over the last dimension, and the factor (…, 1); both in fp32."""
    x = at_least_fp32(x)
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
    scale = torch.rsqrt(mean_square + eps)
    return x * scale, scale


def normalize_backward(grad, x_hat, scale):
    """Gradient of x from that of x_hat; writes over grad."""
    along = (grad * x_hat).mean(-1, keepdim=True)
    return grad.sub_(x_hat * along).mul_(scale)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        x_hat, scale = normalize(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return x_hat.mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        grad, x_hat = at_least_fp32(grad), at_least_fp32(x) * scale
        grad_weight = (grad * x_hat).flatten(0, -2).sum(0).to(weight.dtype)
        grad_x = normalize_backward(grad * weight, x_hat, scale)
        return grad_x.to(x.dtype), grad_weight, None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32 (arXiv 1910.07467).

    Returned in the dtype that the next matrix product takes, so that it is rounded once.
    """
    return apply(_RMSNorm, x, weight, eps, compute_dtype(x))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the halves of the last dimension by position; cos and sin (…, size / 2)."""
    first, second = x.chunk(2, dim=-1)
    rotated = x * torch.cat((cos, cos), dim=-1)
    one, other = rotated.chunk(2, dim=-1)
    one.addcmul_(second, sin, value=-1)
    other.addcmul_(first, sin)
    return rotated


class _NormAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, cos, sin, eps):
        x_hat, scale = normalize(x, eps)
        ctx.save_for_backward(x, weight, scale, cos, sin)
        return rotate(x_hat.mul_(weight), cos, sin).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale, cos, sin = ctx.saved_tensors
        grad = rotate(at_least_fp32(grad), cos, -sin)  # rotate back
        x_hat = at_least_fp32(x) * scale
        grad_weight = (grad * x_hat).flatten(0, -2).sum(0).to(weight.dtype)
        grad_x = normalize_backward(grad.mul_(weight), x_hat, scale)
        return grad_x.to(x.dtype), grad_weight, None, None, None


def norm_and_rotate(x, weight, cos, sin, eps: float) -> torch.Tensor:
    """RMSNorm of each head's vector, then rotary embedding (arXiv 2104.09864), both in fp32.

    x (batch, heads, seq, head_dim), weight (head_dim,), cos and sin fp32
    (batch, 1, seq, head_dim / 2); returns x's shape and dtype.
    """
    return apply(_NormAndRotate, x, weight, cos, sin, eps)
