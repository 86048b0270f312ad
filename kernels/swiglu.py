"""SwiGLU: down(silu(gate(x)) * up(x)), arXiv 2002.05202.

On a CPU it is computed in tiles of tokens. In separate operations, backward holds six tensors
(tokens, d_ff) at once and passes over memory for each. In tiles it holds the two tensors that
forward kept; the others are as large as a tile and stay in the cache between operations. The
tiled kernel is two torch custom operators: torch.compile and checkpointing see one call each.
"""

import torch
import torch.nn.functional as F

from kernels.autograd import add_product, compute_dtype, is_plain, recompute

# Tokens of a tile. Smaller ones add to the weights' gradients too often. In 16 bits the processor
# multiplies so fast that these sums cost more than the cache saves.
TILE, TILE_OF_16_BITS = 1024, 4096
silu, silu_backward = torch.ops.aten.silu.out, torch.ops.aten.silu_backward.grad_input


def tile_size(x: torch.Tensor) -> int:
    return min(len(x), TILE_OF_16_BITS if x.dtype.itemsize == 2 else TILE)


def tiles(x: torch.Tensor):
    """Slices of x's tokens."""
    tokens, size = len(x), max(1, tile_size(x))
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


@torch.library.custom_op("llm::tiled_swiglu", mutates_args=())
def tiled_swiglu(
    x: torch.Tensor, gate_weight: torch.Tensor, up_weight: torch.Tensor, down_weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """down(silu(gate(x)) * up(x)), and for backward gate(x) and up(x). Computes in x's dtype.

    x (tokens, d_model), gate_weight and up_weight (d_ff, d_model), down_weight (d_model, d_ff).
    """
    output, (tokens, d_ff) = torch.empty_like(x), (len(x), len(gate_weight))
    gate, up = (x.new_empty(tokens, d_ff) for _ in range(2))
    swiglu_into(output, gate, up, x, gate_weight, up_weight, down_weight)
    return output, gate, up


def swiglu_into(
    output: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, x: torch.Tensor, *weights
) -> None:
    """tiled_swiglu, written to tensors that exist."""
    gate_weight, up_weight, down_weight = (weight.to(x.dtype) for weight in weights)
    scratch = x.new_empty(tile_size(x), gate.shape[1])
    for tile in tiles(x):
        torch.mm(x[tile], gate_weight.T, out=gate[tile])
        torch.mm(x[tile], up_weight.T, out=up[tile])
        activated = silu(gate[tile], out=scratch[: tile.stop - tile.start])  # (tile, d_ff)
        torch.mm(activated.mul_(up[tile]), down_weight.T, out=output[tile])


@torch.library.custom_op("llm::tiled_swiglu_backward", mutates_args=())
def tiled_swiglu_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    down_weight: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x and of the three weights; grad (tokens, d_model) is the output's."""
    weights = gate_weight, up_weight, down_weight
    # Sums over tiles. In 16 bits each addition would round them.
    sums = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]
    gate_weight, up_weight, down_weight = (w.to(x.dtype) for w in weights)
    grad_x, scratch = torch.empty_like(x), gate.new_empty(2, tile_size(x), gate.shape[1])
    for tile in tiles(x):
        gate_tile, up_tile, grad_tile = gate[tile], up[tile], grad[tile]
        first, second = scratch[:, : len(gate_tile)]  # (tile, d_ff); each is used several times
        activated = silu(gate_tile, out=first)
        add_product(sums[2], grad_tile, torch.mul(activated, up_tile, out=second))
        grad_product = torch.mm(grad_tile, down_weight, out=second)
        grad_up = activated.mul_(grad_product)
        grad_activated = grad_product.mul_(up_tile)
        grad_gate = silu_backward(grad_activated, gate_tile, grad_input=grad_activated)
        torch.mm(grad_gate, gate_weight, out=grad_x[tile])
        grad_x[tile].addmm_(grad_up, up_weight)
        add_product(sums[0], grad_gate, x[tile])
        add_product(sums[1], grad_up, x[tile])
    of_gate, of_up, of_down = (s.to(w.dtype) for s, w in zip(sums, weights, strict=True))
    return grad_x, of_gate, of_up, of_down


@tiled_swiglu.register_fake
def _(x, gate_weight, up_weight, down_weight):
    gate, up = (x.new_empty(x.shape[0], gate_weight.shape[0]) for _ in range(2))
    return torch.empty_like(x), gate, up


@tiled_swiglu_backward.register_fake
def _(grad, x, gate_weight, up_weight, down_weight, gate, up):
    return tuple(torch.empty_like(t) for t in (x, gate_weight, up_weight, down_weight))


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.set_materialize_grads(False)  # gate(x) and up(x) have none


def _backward(ctx, grad, *_):
    return tiled_swiglu_backward(grad, *ctx.saved_tensors)


tiled_swiglu.register_autograd(_backward, setup_context=_keep)


def swiglu_on_cpu(x: torch.Tensor, gate_proj, up_proj, down_proj) -> torch.Tensor:
    """x (…, d_model) and three layers. In tiles where gradients are needed and no layer has an
    adapter: an adapter must be called, not only its weight read. In 16 bits torch.compile gets the
    plain operations: it passes over memory less often than tiles do.
    """
    layers = gate_proj, up_proj, down_proj
    if torch.compiler.is_compiling() and compute_dtype(x).itemsize == 2:
        return swiglu_on_gpu(x, *layers)
    if torch.is_grad_enabled() and all(is_plain(layer) for layer in layers):
        tokens = x.reshape(-1, x.shape[-1]).to(compute_dtype(x))  # (tokens, d_model)
        return tiled_swiglu(tokens, *(layer.weight for layer in layers))[0].view(x.shape)
    return swiglu_on_gpu(x, *layers)


def swiglu_on_gpu(x: torch.Tensor, gate_proj, up_proj, down_proj) -> torch.Tensor:
    """Backward keeps gate(x) and up(x), and computes their product again."""
    gate, up = gate_proj(x), up_proj(x)
    return recompute(lambda gate, up: down_proj(F.silu(gate) * up), gate, up)


def reference_swiglu(x: torch.Tensor, gate_proj, up_proj, down_proj) -> torch.Tensor:
    """The twin of both in plain operations."""
    return down_proj(F.silu(gate_proj(x)) * up_proj(x))
