"""The model: a Qwen3-architecture decoder, dense or mixture-of-experts, in one file.

Parameter names, shapes and arithmetic are Qwen3's. A saved folder *is* a Qwen3 (or Qwen3-MoE)
checkpoint: `AutoModelForCausalLM.from_pretrained(folder)` gives equal logits without custom code.

    residual stream   x = x + attention(norm(x));  x = x + mlp(norm(x))     pre-norm, no biases
    attention         grouped-query, per-head RMSNorm on q and k, rotate-half RoPE, causal
    mlp               SwiGLU, or the top k of several SwiGLU experts
    loss              fp32 cross entropy summed over targets; all logits are never in memory at once
    init              normal(0, 0.02); projections into the residual stream / sqrt(2 * n_layers)

Operations with a faster form are called through `backend`, a value of kernels.Backend.
kernels.REFERENCE runs the whole model in plain PyTorch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

import kernels
from kernels import IGNORE_INDEX, Backend
from model_config import CustomLLMConfig

__all__ = ["CustomLLM", "CustomLLMConfig", "CustomLLMOutput"]


@dataclass
class CustomLLMOutput(MoeCausalLMOutputWithPast):
    """`expert_load`: (layers, experts) share of the routed tokens that each expert got."""

    expert_load: torch.Tensor | None = None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor, backend: Backend) -> torch.Tensor:
        return backend.rms_norm(x, self.weight, self.eps)


class ResidualLinear(nn.Linear):
    """A projection into the residual stream: only its initialisation differs."""


def rope_cos_sin(
    position_ids: torch.Tensor, head_dim: int, theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, seq) positions -> fp32 cos and sin, each (batch, 1, seq, head_dim / 2).

    Computed in each forward: 32 frequencies cost nothing, and there is no buffer to load or move.
    """
    exponent = torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim
    angle = position_ids[:, None, :, None].float() * theta**-exponent  # (batch, 1, seq, head_dim/2)
    return angle.cos(), angle.sin()


def build_attention_mask(input_ids, attention_mask, position_ids, past: int):
    """None where plain causal attention is right, otherwise bool (batch, 1, seq, past + seq).

    Documents packed into one row are told apart by position_ids that restart at 0. Looking whether
    they restart would make a GPU wait, so that position_ids always lead to a mask.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask  # made by the caller: answers that share a question
    packed = position_ids is not None and past == 0
    if attention_mask is None and not packed and (past == 0 or input_ids.shape[1] == 1):
        # One new token may see the whole cache: SDPA's causal mask would hide it.
        return None if past == 0 else input_ids.new_ones((1, 1, 1, 1), dtype=torch.bool)
    query = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
    key = torch.arange(past + input_ids.shape[1], device=input_ids.device)
    mask = (key <= query[:, None])[None]  # (1, seq, past + seq)
    if packed:
        document = (position_ids == 0).cumsum(-1)  # (batch, seq)
        mask = mask & (document[:, :, None] == document[:, None, :])
    if attention_mask is not None:
        # A padding query sees itself: softmax over no key at all is undefined.
        mask = mask & (attention_mask.bool()[:, None, :] | (key == query[:, None]))
    return mask[:, None]  # (batch, 1, seq, past + seq)


class Attention(nn.Module):
    def __init__(self, config: CustomLLMConfig, layer_idx: int):
        super().__init__()
        self.layer_idx, self.head_dim, self.dropout = layer_idx, config.head_dim, config.dropout
        q_size, kv_size = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.d_model, q_size, bias=False)
        self.k_proj = nn.Linear(config.d_model, kv_size, bias=False)
        self.v_proj = nn.Linear(config.d_model, kv_size, bias=False)
        self.o_proj = ResidualLinear(q_size, config.d_model, bias=False)
        # QK-norm bounds the attention logits: without it fp16 can overflow in q @ k.
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x, cos, sin, attention_mask, cache, backend: Backend) -> torch.Tensor:
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        # (batch, heads or kv_heads, seq, head_dim)
        q, k, v = (rearrange(y, "b s (h d) -> b h s d", d=self.head_dim) for y in projected)
        q = backend.norm_and_rotate(q, self.q_norm.weight, cos, sin, self.q_norm.eps)
        k = backend.norm_and_rotate(k, self.k_norm.weight, cos, sin, self.k_norm.eps)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)  # (batch, kv_heads, past + seq, head_dim)
        x = backend.attend(q, k, v, attention_mask, self.dropout if self.training else 0.0)
        return self.o_proj(rearrange(x, "b h s d -> b s (h d)"))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), arXiv 2002.05202."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = ResidualLinear(d_ff, d_model, bias=False)

    def forward(self, x: torch.Tensor, backend: Backend) -> torch.Tensor:
        return backend.swiglu(x, self.gate_proj, self.up_proj, self.down_proj)


class MoE(nn.Module):
    """Each token goes to the top_k experts that the router prefers, weighted by its softmax.

    Experts are separate 2-D matrices, as on disk and as Muon needs them. The grouped matrix product
    stacks a copy of them, which mixed precision would make anyway.
    """

    def __init__(self, config: CustomLLMConfig):
        super().__init__()
        self.num_experts, self.top_k = config.num_experts, config.num_experts_per_tok
        self.gate = nn.Linear(config.d_model, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            SwiGLU(config.d_model, config.moe_d_ff) for _ in range(config.num_experts)
        )

    def forward(self, x: torch.Tensor, token_mask: torch.Tensor | None, backend: Backend):
        """x (batch, seq, d_model), token_mask (batch, seq) True where a token is real.

        Returns (output, balancing loss, expert load (experts,)).
        """
        tokens = rearrange(x, "b s d -> (b s) d")
        with torch.autocast(x.device.type, enabled=False):  # a rounded router picks other experts
            weight = self.gate.weight.float()
            probs = kernels.recompute(lambda x: F.linear(x.float(), weight).softmax(-1), tokens)
            top_probs, top_experts = probs.topk(self.top_k, dim=-1)  # (tokens, top_k)
            top_probs = top_probs / top_probs.sum(-1, keepdim=True)
            all_experts = torch.arange(self.num_experts, device=x.device)
            chosen = top_experts[..., None] == all_experts  # (tokens, top_k, experts)
            balance, load = self._balance(probs, chosen, token_mask)

        # Sort the (token, slot) pairs by expert: each expert gets its rows one after the other.
        order = top_experts.flatten().argsort(stable=True)  # (tokens * top_k,)
        counts = chosen.sum((0, 1))  # (experts,)
        outputs = backend.run_experts(tokens, order, counts, self.experts, backend)  # (…, top_k, d)
        mixed = (outputs * top_probs.to(outputs.dtype).unsqueeze(-1)).sum(1)  # (tokens, d_model)
        return mixed.view_as(x), balance, load

    def _balance(self, probs, chosen, token_mask):
        """experts * sum_e(share of tokens sent to e * mean probability of e): 1 when balanced.

        Switch Transformer (arXiv 2101.03961), eq. 4, with each of the top_k choices counted.
        """
        weight = torch.ones_like(probs[:, 0]) if token_mask is None else token_mask.view(-1).float()
        weight = weight / weight.sum().clamp(min=1)  # (tokens,), 0 at padding
        load = weight @ chosen.sum(1).float() / self.top_k  # (experts,)
        return self.num_experts * (load * (weight @ probs)).sum(), load


class Block(GradientCheckpointingLayer):
    def __init__(self, config: CustomLLMConfig, layer_idx: int):
        super().__init__()
        self.use_moe, self.dropout = config.use_moe, config.dropout
        self.input_layernorm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.self_attn = Attention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.mlp = MoE(config) if config.use_moe else SwiGLU(config.d_model, config.d_ff)

    def forward(self, x, cos, sin, attention_mask, token_mask, backend: Backend, cache=None):
        """x (batch, seq, d_model) -> (x, balancing loss | None, expert load | None)."""
        normed = self.input_layernorm(x, backend)
        attended = self.self_attn(normed, cos, sin, attention_mask, cache, backend)
        x = x + F.dropout(attended, self.dropout, self.training)
        normed, balance, load = self.post_attention_layernorm(x, backend), None, None
        if self.use_moe:
            output, balance, load = self.mlp(normed, token_mask, backend)
        else:
            output = self.mlp(normed, backend)
        return x + F.dropout(output, self.dropout, self.training), balance, load


class Backbone(nn.Module):
    """Everything between token ids and the output head. backend: None means its device's."""

    def __init__(self, config: CustomLLMConfig):
        super().__init__()
        self.config = config
        self.backend: Backend | None = None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.rms_norm_eps)

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, cache=None, cu_seq_lens_q=None
    ):
        """input_ids, position_ids (batch, seq); attention_mask (batch, past + seq), 0 at padding,
        or a bool mask (batch, 1, seq, past + seq); cu_seq_lens_q as in CustomLLM.forward, or
        kernels.SharedDocuments.

        Returns (hidden (batch, seq, d_model), balancing loss, expert load (layers, experts)).
        """
        past = 0 if cache is None else cache.get_seq_length()
        backend = self.backend or kernels.for_device(input_ids.device)
        weight, dropout = self.embed_tokens.weight, self.config.dropout if self.training else 0.0
        if cu_seq_lens_q is not None and backend.can_attend_by_document(weight, dropout):
            mask = cu_seq_lens_q
        else:
            seen = build_attention_mask(input_ids, attention_mask, position_ids, past)
            mask = kernels.additive_mask(seen, weight)
        if position_ids is None:
            positions = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
            position_ids = positions.expand_as(input_ids)
        cos, sin = rope_cos_sin(position_ids, self.config.head_dim, self.config.rope_theta)
        is_padded = attention_mask is not None and attention_mask.ndim == 2
        token_mask = attention_mask[:, -input_ids.shape[1] :].bool() if is_padded else None

        x = F.dropout(self.embed_tokens(input_ids), self.config.dropout, self.training)
        balances, loads = [], []
        for layer in self.layers:
            x, balance, load = layer(x, cos, sin, mask, token_mask, backend, cache=cache)
            balances.append(balance)
            loads.append(load)
        x = self.norm(x, backend)
        if not self.config.use_moe:
            return x, None, None
        return x, torch.stack(balances).mean(), torch.stack(loads)


class CustomLLM(PreTrainedModel, GenerationMixin):
    """Backbone and output head, with Hugging Face's loading, saving and generation."""

    config: CustomLLMConfig
    config_class = CustomLLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: CustomLLMConfig):
        super().__init__(config)
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()  # initialises by _init_weights, then ties the head

    def _init_weights(self, module: nn.Module):
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            if isinstance(module, ResidualLinear):
                std /= (2 * self.config.n_layers) ** 0.5  # GPT-2: keeps the stream's variance level
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    @property
    def backend(self) -> Backend:
        """What the model computes with. Set it to compute as on another device."""
        return self.model.backend or kernels.for_device(self.device)

    @backend.setter
    def backend(self, value: Backend | None):
        self.model.backend = value

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cache=None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        skip_logits: bool = False,
        **kwargs,
    ) -> CustomLLMOutput:
        """One forward pass.

        Args:
            input_ids, position_ids, labels: int64 (batch, seq). labels are aligned with input_ids
                and shifted here. -100 and the first token of every document are no targets.
            attention_mask: (batch, past + seq), 0 at padding.
            num_items_in_batch: divisor of the summed loss, the number of targets of the whole
                optimizer step; None: of this batch.
            cu_seq_lens_q: int32 (documents + 1,), where each document of the flattened rows starts,
                and the end. It replaces the mask of position_ids where a kernel for it runs.
            logits_to_keep: compute logits of that many last positions; 0: of all.
            skip_logits: compute no logits. Training does not need them: the loss makes its own.

        Returns:
            loss: fp32 scalar. In training it includes router_aux_loss_coef * aux_loss, weighted by
                this batch's share of num_items_in_batch. logits: (batch, seq, vocab_size).
                aux_loss: the balancing loss, 1 when experts are equally used; None when dense.
        """
        cache = kwargs.pop("past_key_values", cache)  # its older name
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        hidden, aux_loss, expert_load = self.model(
            input_ids, attention_mask, position_ids, cache, cu_seq_lens_q
        )
        loss = logits = None
        if labels is not None:
            if attention_mask is not None:  # padding predicts no target
                labels = labels.clone()
                labels[:, 1:].masked_fill_(attention_mask[:, :-1] == 0, IGNORE_INDEX)
            loss = self._loss(hidden, labels, position_ids, num_items_in_batch, aux_loss)
        if not skip_logits:
            logits = self.lm_head(hidden[:, -logits_to_keep:])
        return CustomLLMOutput(
            loss=loss, logits=logits, aux_loss=aux_loss, expert_load=expert_load,
            cache=cache if use_cache else None,
        )  # fmt: skip

    def _loss(self, hidden, labels, position_ids, num_items_in_batch, aux_loss) -> torch.Tensor:
        targets = labels[:, 1:]
        if position_ids is not None:
            targets = targets.masked_fill(position_ids[:, 1:] == 0, IGNORE_INDEX)
        targets = F.pad(targets, (0, 1), value=IGNORE_INDEX)  # a row's end predicts nothing
        num_targets = (targets != IGNORE_INDEX).sum()
        if num_items_in_batch is None:
            num_items_in_batch = num_targets.clamp(min=1)
        inputs = hidden.flatten(0, 1), self.lm_head.weight, targets.flatten()
        loss = self.backend.cross_entropy(*inputs, self.backend.chunks) / num_items_in_batch
        if aux_loss is not None and self.training:
            share = num_targets / num_items_in_batch
            loss = loss + self.config.router_aux_loss_coef * aux_loss * share
        return loss
