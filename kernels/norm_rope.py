"""RMSNorm and rotary embedding: one autograd node each.

Separate operations keep every intermediate tensor for backward, several of them in fp32. These
keep their input, in the dtype in which it came, and one number per normalised vector. torch.compile
gets the plain operations, marked to be computed again: it fuses them itself, and the compiled graph
keeps the input alone.
"""

import torch

from kernels.autograd import at_least_fp32, compute_dtype, recompute


def normalize(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x / sqrt(mean(x^2) + eps) over the last dimension, and the factor (…, 1); both in fp32."""
    x = at_least_fp32(x)
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
    scale = torch.rsqrt(mean_square + eps)
    return x * scale, scale


def normalize_backward(grad, x_hat, scale):
    """Gradient of x from the gradient of x_hat. Overwrites grad."""
    projection = (grad * x_hat).mean(-1, keepdim=True)
    return grad.sub_(x_hat * projection).mul_(scale)


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

    x (…, size), weight (size,). The result has the dtype of the next matrix product: it is rounded
    only once.
    """
    if torch.compiler.is_compiling():
        return recompute(reference_rms_norm, x, weight, eps)
    return _RMSNorm.apply(x, weight, eps, compute_dtype(x))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + size / 2) of the last dimension; cos and sin (…, size / 2)."""
    first, second = x.chunk(2, dim=-1)
    rotated = x * torch.cat((cos, cos), dim=-1)
    rotated_first, rotated_second = rotated.chunk(2, dim=-1)
    rotated_first.addcmul_(second, sin, value=-1)
    rotated_second.addcmul_(first, sin)
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
    if torch.compiler.is_compiling():
        return recompute(reference_norm_and_rotate, x, weight, cos, sin, eps)
    return _NormAndRotate.apply(x, weight, cos, sin, eps)


def reference_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The twin of rms_norm in plain operations."""
    x_fp32 = at_least_fp32(x)
    x_hat = x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
    return (x_hat * weight).to(compute_dtype(x))


def reference_norm_and_rotate(x, weight, cos, sin, eps: float) -> torch.Tensor:
    """The twin of norm_and_rotate in plain operations."""
    x_fp32 = at_least_fp32(x)
    x_hat = x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
    first, second = (x_hat * weight).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)
