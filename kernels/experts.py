"""The two kinds of feed-forward layer: SwiGLU, and a mixture of SwiGLU experts."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from kernels import masks as attention
from kernels.norm_rope import compute_dtype, recompute
from kernels.swiglu import blocked_swiglu
from model_config import CustomLLMConfig


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), arXiv 2002.05202."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)
        self.down_proj.writes_residual = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projections = self.gate_proj, self.up_proj, self.down_proj
        plain = all(type(layer) is nn.Linear for layer in projections)  # not an adapter's
        if plain and torch.is_grad_enabled() and x.device.type in attention.IN_BLOCKS:
            tokens = x.reshape(-1, x.shape[-1]).to(compute_dtype(x))  # (tokens, d_model)
            weights = (layer.weight for layer in projections)
            return blocked_swiglu(tokens, *weights)[0].view(x.shape)
        gate, up = self.gate_proj(x), self.up_proj(x)
        return recompute(lambda gate, up: self.down_proj(F.silu(gate) * up), gate, up)


class MoE(nn.Module):
    """Each token goes to the top_k experts that the router prefers, weighted by its softmax.

    Experts are separate 2-D matrices, as on disk (and as Muon needs them); the copy that stacks
    them for the grouped matrix product is the one that mixed precision would make anyway.
    """

    def __init__(self, config: CustomLLMConfig):
        super().__init__()
        self.num_experts, self.top_k = config.num_experts, config.num_experts_per_tok
        self.gate = nn.Linear(config.d_model, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            SwiGLU(config.d_model, config.moe_d_ff) for _ in range(config.num_experts)
        )

    def forward(self, x: torch.Tensor, token_mask: torch.Tensor | None):
        """x (batch, seq, d_model), token_mask (batch, seq) True where a token is real.

        Returns (output, balancing loss, expert load (experts,)).
        """
        tokens = rearrange(x, "b s d -> (b s) d")
        with torch.autocast(x.device.type, enabled=False):  # a rounded router picks other experts
            probs = F.linear(tokens.float(), self.gate.weight.float()).softmax(-1)
            top_probs, top_experts = probs.topk(self.top_k, dim=-1)  # (tokens, top_k)
            top_probs = top_probs / top_probs.sum(-1, keepdim=True)
            balance, load = self._balance(probs, top_experts, token_mask)

        # Sort the (token, slot) pairs by expert, so that each expert sees one contiguous block.
        order = top_experts.flatten().argsort(stable=True)  # (tokens * top_k,)
        counts = F.one_hot(top_experts.flatten(), self.num_experts).sum(0)  # (experts,)
        outputs = self._run_experts(tokens[order // self.top_k], counts)
        outputs = torch.empty_like(outputs).index_copy(0, order, outputs)  # back in token order
        outputs = rearrange(outputs, "(n k) d -> n k d", k=self.top_k)
        mixed = (outputs * top_probs.to(outputs.dtype).unsqueeze(-1)).sum(1)  # (tokens, d_model)
        return mixed.view_as(x), balance, load

    def _run_experts(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """x (rows, d_model) sorted by expert, counts (experts,) rows of each; same shape out."""
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)  # grouped_mm is not cast by autocast
        if not can_use_grouped_mm(
            x.device, dtype, x.shape[-1], self.experts[0].up_proj.out_features
        ):
            return run_experts_one_by_one(self.experts, x, counts)
        # Its shape function under torch.compile, and inductor's template, know bf16 alone.
        if torch.compiler.is_compiling() and dtype != torch.bfloat16:
            return run_experts_outside_the_graph(self.experts, x.to(dtype), counts)
        return run_experts_grouped(self.experts, x.to(dtype), counts)

    def _balance(self, probs, top_experts, token_mask):
        """experts * sum_e(share of tokens sent to e * mean probability of e): 1 when balanced.

        Switch Transformer, eq. 4, with every one of the top_k choices counted.
        """
        weight = (
            torch.ones_like(probs[:, 0]) if token_mask is None else token_mask.flatten().float()
        )
        weight = weight / weight.sum().clamp(min=1)  # (tokens,), 0 at padding
        chosen = F.one_hot(top_experts, self.num_experts).sum(1) / self.top_k  # (tokens, experts)
        load = weight @ chosen.float()  # (experts,)
        return self.num_experts * (load * (weight @ probs)).sum(), load


def can_use_grouped_mm(device: torch.device, dtype: torch.dtype, *row_sizes: int) -> bool:
    """Whether torch's grouped matrix product runs here.

    It needs rows of a multiple of 16 bytes, and on CUDA compute capability 8.0.
    """
    if any(size * dtype.itemsize % 16 for size in row_sizes):
        return False
    if device.type != "cuda":
        return device.type == "cpu"
    return torch.cuda.get_device_capability(device) >= (8, 0)


def run_experts_grouped(experts, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """MoE._run_experts in two grouped matrix products, in x's dtype."""
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


# The same kernels, called between two compiled graphs: no waiting for the counts, as a loop would.
run_experts_outside_the_graph = torch.compiler.disable(run_experts_grouped)


@torch.compiler.disable
def run_experts_one_by_one(experts, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The fallback of MoE._run_experts: one ordinary SwiGLU call per expert."""
    blocks = x.split(counts.tolist())
    return torch.cat([expert(block) for expert, block in zip(experts, blocks, strict=True)])
