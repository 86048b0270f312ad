"""RMSNorm and rotary embedding: one autograd node each.

Separate operations keep every intermediate tensor for backward, several of them in fp32. These
keep their input, in the dtype in which it came, and one number per normalised vector. torch.compile
gets the plain operations, marked to be computed again: it fuses them itself, and the compiled graph
keeps the input alone.

A dozen passes over a tensor follow each other. A CPU works through it part by part, so that a part
stays in the cache between the passes.
"""

from collections.abc import Iterator

import torch
from einops import rearrange

from kernels.autograd import at_least_fp32, compute_dtype, recompute

CPU_PART = 2**18  # elements


def parts(x: torch.Tensor, elements: int | None) -> Iterator[slice]:
    """Slices of the first dimension, of about `elements` elements each; None: all at once."""
    count, of_one = len(x), max(1, x.numel() // max(1, len(x)))
    size = max(1, count if elements is None else elements // of_one)
    return (slice(start, start + size) for start in range(0, count, size))


def normalize(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x / sqrt(mean(x^2) + eps) over the last dimension, and the factor (…, 1); both in fp32."""
    x = at_least_fp32(x)
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
    scale = torch.rsqrt(mean_square + eps)
    return x * scale, scale


def norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and weight in y = x * scale * weight, where scale is normalize's. Overwrites
    grad, which is y's.

    grad, x (vectors, size), weight (size,), scale (vectors, 1). With g = grad * weight,
    grad_x = scale * g - x * scale^3 * mean(g * x): two products with vectors in place of four
    passes.
    """
    product = grad * x
    with torch.autocast(x.device.type, enabled=False):
        grad_weight = (scale.mT @ product).squeeze(0)
        along_x = (product @ weight.to(x.dtype)).unsqueeze(1) * scale.pow(3) / x.shape[1]
    return grad.mul_(weight).mul_(scale).addcmul_(x, along_x, value=-1), grad_weight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, dtype, part_size):
        output, scale = torch.empty_like(x, dtype=dtype), at_least_fp32(x.new_empty(len(x), 1))
        for part in parts(x, part_size):
            x_hat, scale[part] = normalize(x[part], eps)
            output[part] = x_hat.mul_(weight)
        ctx.save_for_backward(x, weight, scale)
        ctx.part_size = part_size
        return output

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(at_least_fp32(weight))
        for part in parts(x, ctx.part_size):
            of_output = grad[part].to(grad_weight.dtype, copy=True)
            wide = at_least_fp32(x[part])
            grad_x[part], of_weight = norm_backward(of_output, wide, weight, scale[part])
            grad_weight += of_weight
        return grad_x, grad_weight.to(weight.dtype), None, None, None


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, part_size: int | None = None
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32 (arXiv 1910.07467).

    x (…, size), weight (size,); part_size as in parts(). The result has the dtype of the next
    matrix product: it is rounded only once.
    """
    if torch.compiler.is_compiling():
        return recompute(reference_rms_norm, x, weight, eps)
    output = _RMSNorm.apply(x.flatten(0, -2), weight, eps, compute_dtype(x), part_size)
    return output.view(x.shape)


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
    def forward(ctx, x, weight, cos, sin, eps, part_size):
        output, scale = torch.empty_like(x), at_least_fp32(x.new_empty(*x.shape[:-1], 1))
        for part in parts(x, part_size):
            x_hat, scale[part] = normalize(x[part], eps)
            output[part] = rotate(x_hat.mul_(weight), cos[part], sin[part])
        ctx.save_for_backward(x, weight, scale, cos, sin)
        ctx.part_size = part_size
        return output

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale, cos, sin = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(at_least_fp32(weight))
        for part in parts(x, ctx.part_size):
            rotated_back = rotate(at_least_fp32(grad[part]), cos[part], -sin[part])
            vectors = (rotated_back, at_least_fp32(x[part]), scale[part])
            of_output, wide, factor = (rearrange(y, "b h s d -> (b s h) d") for y in vectors)
            of_vectors, of_weight = norm_backward(of_output, wide, weight, factor)
            heads, seq = x.shape[1:3]
            grad_x[part] = rearrange(of_vectors, "(b s h) d -> b h s d", h=heads, s=seq)
            grad_weight += of_weight
        return grad_x, grad_weight.to(weight.dtype), None, None, None, None


def norm_and_rotate(x, weight, cos, sin, eps: float, part_size: int | None = None) -> torch.Tensor:
    """RMSNorm of each head's vector, then rotary embedding (arXiv 2104.09864), both in fp32.

    x (batch, heads, seq, head_dim), weight (head_dim,), cos and sin fp32
    (batch, 1, seq, head_dim / 2); returns x's shape and dtype.
    """
    if torch.compiler.is_compiling():
        return recompute(reference_norm_and_rotate, x, weight, cos, sin, eps)
    cos, sin = (y.expand(len(x), -1, -1, -1) for y in (cos, sin))
    return _NormAndRotate.apply(x, weight, cos, sin, eps, part_size)


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
