"""The experts of one mixture layer, over tokens that are sorted by expert."""

import torch
import torch.nn.functional as F

from kernels.autograd import compute_dtype, recompute


def run_experts(x: torch.Tensor, counts: torch.Tensor, experts, backend) -> torch.Tensor:
    """Each expert's SwiGLU of its own rows, by grouped matrix products where they run.

    Args:
        x: (rows, d_model), sorted by expert.
        counts: int64 (experts,), the number of rows of each expert.
        experts: modules with gate_proj, up_proj and down_proj.
        backend: what an expert is called with when it runs by itself.

    Returns:
        (rows, d_model).
    """
    dtype = compute_dtype(x)  # autocast does not cast grouped_mm
    d_ff = experts[0].up_proj.out_features
    if not can_use_grouped_mm(x.device, dtype, x.shape[-1], d_ff):
        return run_experts_one_by_one(x, counts, experts, backend)
    # Under torch.compile its shape function and inductor's template take bf16 only.
    if torch.compiler.is_compiling() and dtype != torch.bfloat16:
        return run_experts_outside_the_graph(x.to(dtype), counts, experts)
    return run_experts_grouped(x.to(dtype), counts, experts)


def can_use_grouped_mm(device: torch.device, dtype: torch.dtype, *row_sizes: int) -> bool:
    """Whether torch's grouped matrix product runs here.

    It needs rows of a multiple of 16 bytes, and on CUDA compute capability 8.0.
    """
    if any(size * dtype.itemsize % 16 for size in row_sizes):
        return False
    if device.type != "cuda":
        return device.type == "cpu"
    return torch.cuda.get_device_capability(device) >= (8, 0)


def run_experts_grouped(x: torch.Tensor, counts: torch.Tensor, experts) -> torch.Tensor:
    """run_experts in two grouped matrix products, in x's dtype."""
    dtype = x.dtype
    weights = [(e.gate_proj.weight, e.up_proj.weight, e.down_proj.weight) for e in experts]
    gate_up = torch.stack([torch.cat((g.to(dtype), u.to(dtype))) for g, u, _ in weights])
    down = torch.stack([d.to(dtype) for _, _, d in weights])  # (experts, d_model, d_ff)
    ends = counts.cumsum(0).to(torch.int32)
    hidden = F.grouped_mm(x, gate_up.transpose(-2, -1), offs=ends)

    def finish(hidden):  # (rows, 2 * d_ff)
        gate, up = hidden.chunk(2, dim=-1)
        return F.grouped_mm(F.silu(gate) * up, down.transpose(-2, -1), offs=ends)

    return recompute(finish, hidden)


# Between two compiled graphs it runs the same kernels. It does not wait for the counts.
run_experts_outside_the_graph = torch.compiler.disable(run_experts_grouped)


@torch.compiler.disable
def run_experts_one_by_one(x: torch.Tensor, counts, experts, backend) -> torch.Tensor:
    """The twin of run_experts, and its fallback: one ordinary SwiGLU call per expert."""
    parts = x.split(counts.tolist())
    outputs = [expert(part, backend) for expert, part in zip(experts, parts, strict=True)]
    return torch.cat(outputs)
