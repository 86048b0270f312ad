"""The experts of one mixture layer. Each works on rows of its own: tokens, sorted by expert.

All experts of a layer are one torch custom operator: torch.compile and checkpointing see one call,
in every dtype. Which rows are whose is known to the device alone, or also to its host:

    on the device    torch's grouped matrix product, where a GPU has a kernel for it
    on the host      one product after the other. The counts are fetched once in a layer's forward:
                     on other GPUs torch's grouped product fetches them for each of its six products

A CPU takes one expert after the other, each in tiles (kernels/swiglu.py). It keeps the tokens for
backward and not the rows, which hold each token top_k times. In 16 bits rows of zeros fill each
expert's rows up to a multiple of FULL: oneDNN compiles a product for each new shape, which takes
longer than the product.
"""

from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from einops import rearrange

from kernels.autograd import compute_dtype, is_plain
from kernels.swiglu import swiglu_into, tiled_swiglu_backward

FULL = 128  # rows


def run_experts(
    x: torch.Tensor, order: torch.Tensor, counts: torch.Tensor, experts, backend
) -> torch.Tensor:
    """The SwiGLU of each token's experts, in the dtype of matrix products.

    Args:
        x: (tokens, d_model). A token has top_k slots, one for each of its experts.
        order: int64 (tokens * top_k,), the slots sorted by expert: token * top_k + number.
        counts: int64 (experts,), the number of slots of each expert.
        experts: modules with gate_proj, up_proj and down_proj.
        backend: what an expert is called with when it runs by itself.

    Returns:
        (tokens, top_k, d_model).
    """
    dtype, weights = compute_dtype(x), weights_of(experts)
    if weights is None:
        return run_experts_one_by_one(x, order, counts, experts, backend)
    if not has_grouped_kernel(x.device, dtype, x.shape[-1], len(weights[0][0])):
        counts = counts.cpu()
    rows = x[tokens_of(order, x)].to(dtype)
    return by_token(expert_swiglu(rows, counts, *weights)[0], order, x)


def run_experts_on_cpu(
    x: torch.Tensor, order: torch.Tensor, counts: torch.Tensor, experts, backend
) -> torch.Tensor:
    """As run_experts, one expert after the other in tiles."""
    weights = weights_of(experts)
    if weights is None:
        return run_experts_one_by_one(x, order, counts, experts, backend)
    output = experts_in_tiles(x.to(compute_dtype(x)), order, counts, *weights)[0]
    return rearrange(output, "(n k) d -> n k d", n=len(x))


def tokens_of(order: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The token of each slot, the slots sorted by expert: (tokens * top_k,)."""
    return order // (len(order) // len(x))


def by_token(rows: torch.Tensor, order: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Rows sorted by expert -> (tokens, top_k, d_model)."""
    slots = torch.empty_like(rows).index_copy_(0, order, rows)
    return rearrange(slots, "(n k) d -> n k d", n=len(x))


def weights_of(experts) -> tuple[list, list, list] | None:
    """Of all gate_proj, up_proj and down_proj. None where a layer has an adapter."""
    layers = [(e.gate_proj, e.up_proj, e.down_proj) for e in experts]
    if not all(is_plain(layer) for of_expert in layers for layer in of_expert):
        return None
    gate, up, down = ([layer.weight for layer in of_kind] for of_kind in zip(*layers, strict=True))
    return gate, up, down


@torch.compiler.assume_constant_result
def has_grouped_kernel(device: torch.device, dtype: torch.dtype, *row_sizes: int) -> bool:
    """Whether torch has a kernel for the grouped product: compute capability 9 or 10, and bf16.

    It needs rows of a multiple of 16 bytes.
    """
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    if any(size * dtype.itemsize % 16 for size in row_sizes):
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def multiply_groups(rows: torch.Tensor, matrices: torch.Tensor, counts: torch.Tensor):
    """rows (rows, size), matrices (experts, size, width) -> (rows, width)."""
    if counts.device.type != "cpu":
        return F.grouped_mm(rows, matrices, offs=counts.cumsum(0).to(torch.int32))
    output = rows.new_empty(len(rows), matrices.shape[-1])
    for part, matrix in zip(parts(counts), matrices, strict=True):
        torch.mm(rows[part], matrix, out=output[part])
    return output


def sum_groups(left: torch.Tensor, right: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """left (rows, height), right (rows, width) -> each expert's left.T @ right, stacked."""
    if counts.device.type != "cpu":
        return F.grouped_mm(left.T, right, offs=counts.cumsum(0).to(torch.int32))
    output = left.new_empty(len(counts), left.shape[1], right.shape[1])
    for part, product in zip(parts(counts), output, strict=True):
        torch.mm(left[part].T, right[part], out=product)
    return output


def parts(counts: torch.Tensor) -> list[slice]:
    """Each expert's rows."""
    return [slice(*ends) for ends in pairwise(accumulate(counts.tolist(), initial=0))]


def stack_weights(
    gate: list[torch.Tensor], up: list[torch.Tensor], down: list[torch.Tensor], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(experts, 2 * d_ff, d_model) of gate and up, and (experts, d_model, d_ff) of down, in dtype.

    Mixed precision would make a copy in 16 bits anyway.
    """
    pairs = [torch.cat((g.to(dtype), u.to(dtype))) for g, u in zip(gate, up, strict=True)]
    return torch.stack(pairs), torch.stack([weight.to(dtype) for weight in down])


def by_kind(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """[*gate, *up, *down] of all experts -> [gate, up, down]."""
    count = len(tensors) // 3
    return [tensors[start : start + count] for start in range(0, 3 * count, count)]


@torch.library.custom_op("llm::expert_swiglu", mutates_args=())
def expert_swiglu(
    x: torch.Tensor,
    counts: torch.Tensor,
    gate: list[torch.Tensor],
    up: list[torch.Tensor],
    down: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, gate(x) beside up(x)): (rows, d_model) and (rows, 2 * d_ff), in x's dtype.

    x (rows, d_model); counts int64 (experts,), on the CPU or x's device; gate and up
    (d_ff, d_model) and down (d_model, d_ff) of each expert.
    """
    gate_up, down_weights = stack_weights(gate, up, down, x.dtype)
    hidden = multiply_groups(x, gate_up.mT, counts)  # (rows, 2 * d_ff)
    gate_part, up_part = hidden.chunk(2, dim=-1)
    return multiply_groups(F.silu(gate_part).mul_(up_part), down_weights.mT, counts), hidden


@torch.library.custom_op("llm::expert_swiglu_backward", mutates_args=())
def expert_swiglu_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    counts: torch.Tensor,
    hidden: torch.Tensor,
    gate: list[torch.Tensor],
    up: list[torch.Tensor],
    down: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, of stack_weights' gate and up, and of its down; grad is the output's."""
    grad = grad.contiguous()
    gate_up, down_weights = stack_weights(gate, up, down, x.dtype)
    gate_part, up_part = hidden.chunk(2, dim=-1)
    activated = F.silu(gate_part)  # (rows, d_ff)
    grad_product = multiply_groups(grad, down_weights, counts)
    grad_down = sum_groups(grad, activated * up_part, counts)
    grad_gate = torch.ops.aten.silu_backward(grad_product * up_part, gate_part)
    grad_hidden = torch.cat((grad_gate, activated.mul_(grad_product)), dim=-1)
    grad_x = multiply_groups(grad_hidden, gate_up, counts)
    return grad_x, sum_groups(grad_hidden, x, counts), grad_down


@expert_swiglu.register_fake
def _(x, counts, gate, up, down):
    return torch.empty_like(x), x.new_empty(x.shape[0], 2 * gate[0].shape[0])


@expert_swiglu_backward.register_fake
def _(grad, x, counts, hidden, gate, up, down):
    experts, (d_ff, d_model) = len(gate), gate[0].shape
    stacked = (x.new_empty(experts, 2 * d_ff, d_model), x.new_empty(experts, d_model, d_ff))
    return torch.empty_like(x), *stacked


def _keep(ctx, inputs, output):
    x, counts, gate, up, down = inputs
    ctx.save_for_backward(x, counts, output[1], *gate, *up, *down)
    ctx.set_materialize_grads(False)  # gate(x) and up(x) have none


def _backward(ctx, grad, _):
    x, counts, hidden, *weights = ctx.saved_tensors
    gate, up, down = by_kind(weights)
    of_x, of_gate_up, of_down = expert_swiglu_backward(grad, x, counts, hidden, gate, up, down)
    of_gate, of_up = of_gate_up.chunk(2, dim=1)  # (experts, d_ff, d_model) each
    of_weights = (list(of_kind.to(gate[0].dtype)) for of_kind in (of_gate, of_up, of_down))
    return of_x, None, *of_weights


expert_swiglu.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("llm::experts_in_tiles", mutates_args=())
def experts_in_tiles(
    x: torch.Tensor,
    order: torch.Tensor,
    counts: torch.Tensor,
    gate: list[torch.Tensor],
    up: list[torch.Tensor],
    down: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(output (slots, d_model), gate(x), up(x)). Arguments as run_experts', in x's dtype.

    gate(x) and up(x) (rows, d_ff) stand as backward needs them: see places().
    """
    owners, rows = tokens_of(order, x), len(order) + len(gate) * FULL
    taken, given = x.new_zeros(rows, x.shape[1]), x.new_empty(rows, x.shape[1])
    gate_x, up_x = (x.new_empty(rows, len(gate[0])) for _ in range(2))
    output = x.new_empty(len(order), x.shape[1])
    for (part, own, place), *weights in zip(places(x, counts), gate, up, down, strict=True):
        torch.index_select(x, 0, owners[part], out=taken[own])
        swiglu_into(given[place], gate_x[place], up_x[place], taken[place], *weights)
        output.index_copy_(0, order[part], given[own])
    return output, gate_x, up_x


def places(x: torch.Tensor, counts: torch.Tensor) -> list[tuple[slice, slice, slice]]:
    """Each expert's part of the order; and its rows, without and with rows of zeros behind them."""
    full = FULL if x.dtype.itemsize == 2 else 1
    ends = accumulate((-(-count // full) * full for count in counts.tolist()), initial=0)
    return [
        (part, slice(start, start + part.stop - part.start), slice(start, end))
        for part, (start, end) in zip(parts(counts), pairwise(ends), strict=True)
    ]


@torch.library.custom_op("llm::experts_in_tiles_backward", mutates_args=())
def experts_in_tiles_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    order: torch.Tensor,
    counts: torch.Tensor,
    gate_x: torch.Tensor,
    up_x: torch.Tensor,
    gate: list[torch.Tensor],
    up: list[torch.Tensor],
    down: list[torch.Tensor],
) -> list[torch.Tensor]:
    """Gradients of x, and of each expert's gate, up and down, in this order."""
    owners, of_slots = tokens_of(order, x), torch.empty_like(grad)
    taken, grad_taken = x.new_zeros(2, len(gate_x), x.shape[1])
    of_weights = []
    for (part, own, place), *weights in zip(places(x, counts), gate, up, down, strict=True):
        torch.index_select(x, 0, owners[part], out=taken[own])
        torch.index_select(grad, 0, order[part], out=grad_taken[own])
        kept = gate_x[place], up_x[place]
        of_expert = tiled_swiglu_backward(grad_taken[place], taken[place], *weights, *kept)
        of_slots.index_copy_(0, order[part], of_expert[0][: part.stop - part.start])
        of_weights.append(of_expert[1:])
    of_tokens = rearrange(of_slots, "(n k) d -> n k d", n=len(x)).sum(1)
    return [
        of_tokens,
        *(gradient for of_kind in zip(*of_weights, strict=True) for gradient in of_kind),
    ]


@experts_in_tiles.register_fake
def _(x, order, counts, gate, up, down):
    rows, d_ff = len(order) + len(gate) * FULL, gate[0].shape[0]
    output = x.new_empty(len(order), x.shape[1])
    return output, x.new_empty(rows, d_ff), x.new_empty(rows, d_ff)


@experts_in_tiles_backward.register_fake
def _(grad, x, order, counts, gate_x, up_x, gate, up, down):
    return [x.new_empty(x.shape), *(torch.empty_like(weight) for weight in (*gate, *up, *down))]


def _keep_tiles(ctx, inputs, output):
    x, order, counts, gate, up, down = inputs
    ctx.save_for_backward(x, order, counts, *output[1:], *gate, *up, *down)
    ctx.set_materialize_grads(False)


def _backward_in_tiles(ctx, grad, *_):
    x, order, counts, gate_x, up_x, *weights = ctx.saved_tensors
    kept = x, order, counts, gate_x, up_x
    of_x, *of_weights = experts_in_tiles_backward(grad, *kept, *by_kind(weights))
    return of_x, None, None, *by_kind(of_weights)


experts_in_tiles.register_autograd(_backward_in_tiles, setup_context=_keep_tiles)


@torch.compiler.disable
def run_experts_one_by_one(x: torch.Tensor, order, counts, experts, backend) -> torch.Tensor:
    """The twin of run_experts, and what runs experts with adapters: one SwiGLU call per expert."""
    of_experts = x[tokens_of(order, x)].split(counts.tolist())
    outputs = [expert(rows, backend) for expert, rows in zip(experts, of_experts, strict=True)]
    return by_token(torch.cat(outputs), order, x)
