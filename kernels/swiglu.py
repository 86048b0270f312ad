"""SwiGLU on a CPU, a block of tokens at a time.

Written out as separate operations, backward holds six tensors (tokens, d_ff) at once and passes
over memory for each. Here it holds the two that forward has kept: the rest are blocks, which stay
in the cache from one operation to the next.

Two operators of torch's own kind, so that torch.compile and checkpointing see one call each.
"""

import torch

BLOCK = 1024  # tokens: with fewer, adding to the weights' gradients would take its time
silu, silu_backward = torch.ops.aten.silu.out, torch.ops.aten.silu_backward.grad_input


def blocks(tokens: int):
    return (slice(start, min(start + BLOCK, tokens)) for start in range(0, tokens, BLOCK))


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor):
    """total += left.T @ right; total may be of higher precision than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left.T, right)
    else:
        total += left.T @ right


@torch.library.custom_op("llm::blocked_swiglu", mutates_args=())
def blocked_swiglu(
    x: torch.Tensor, gate_weight: torch.Tensor, up_weight: torch.Tensor, down_weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """down(silu(gate(x)) * up(x)), and for backward gate(x) and up(x); computed in x's dtype.

    x (tokens, d_model), gate_weight and up_weight (d_ff, d_model), down_weight (d_model, d_ff).
    """
    weights = (w.to(x.dtype) for w in (gate_weight, up_weight, down_weight))
    gate_weight, up_weight, down_weight = weights
    (tokens, _), (d_ff, _) = x.shape, gate_weight.shape
    output, scratch = torch.empty_like(x), x.new_empty(min(BLOCK, tokens), d_ff)
    gate, up = (x.new_empty(tokens, d_ff) for _ in range(2))
    for block in blocks(tokens):
        torch.mm(x[block], gate_weight.T, out=gate[block])
        torch.mm(x[block], up_weight.T, out=up[block])
        activated = silu(gate[block], out=scratch[: block.stop - block.start])  # (block, d_ff)
        torch.mm(activated.mul_(up[block]), down_weight.T, out=output[block])
    return output, gate, up


@torch.library.custom_op("llm::blocked_swiglu_backward", mutates_args=())
def blocked_swiglu_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    down_weight: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x and the three weights from that of the output, grad (tokens, d_model)."""
    weights = gate_weight, up_weight, down_weight
    # Sums over blocks: in 16 bits they would be rounded every time.
    sums = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]
    gate_weight, up_weight, down_weight = (w.to(x.dtype) for w in weights)
    grad_x, scratch = torch.empty_like(x), gate.new_empty(2, min(BLOCK, len(x)), gate.shape[1])
    for block in blocks(len(x)):
        gate_block, up_block, grad_block = gate[block], up[block], grad[block]
        one, other = scratch[:, : len(gate_block)]  # (block, d_ff); each serves several times
        activated = silu(gate_block, out=one)
        add_product(sums[2], grad_block, torch.mul(activated, up_block, out=other))
        grad_product = torch.mm(grad_block, down_weight, out=other)
        grad_up = activated.mul_(grad_product)
        grad_activated = grad_product.mul_(up_block)
        grad_gate = silu_backward(grad_activated, gate_block, grad_input=grad_activated)
        torch.mm(grad_gate, gate_weight, out=grad_x[block])
        grad_x[block].addmm_(grad_up, up_weight)
        add_product(sums[0], grad_gate, x[block])
        add_product(sums[1], grad_up, x[block])
    return grad_x, *(total.to(w.dtype) for total, w in zip(sums, weights, strict=True))


@blocked_swiglu.register_fake
def _(x, gate_weight, up_weight, down_weight):
    gate, up = (x.new_empty(x.shape[0], gate_weight.shape[0]) for _ in range(2))
    return torch.empty_like(x), gate, up


@blocked_swiglu_backward.register_fake
def _(grad, x, gate_weight, up_weight, down_weight, gate, up):
    return tuple(torch.empty_like(t) for t in (x, gate_weight, up_weight, down_weight))


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.set_materialize_grads(False)  # gate(x) and up(x) have none


def _backward(ctx, grad, *_):
    return blocked_swiglu_backward(grad, *ctx.saved_tensors)


blocked_swiglu.register_autograd(_backward, setup_context=_keep)
