"""Attention: the kernels, by device. Documents packed into one row never see each other.

Four forms of `attention_mask` say which positions see which:

    None                          plain causal rows
    float (batch, 1, seq, keys)   any pattern: padding, many answers to a question, a KV cache;
                                  0 where a query sees a key, -inf where not (additive_mask)
    int32 (documents + 1,)        packed rows: where each document of the flattened rows starts,
                                  and the end; no (seq, seq) mask, no work across documents
    SharedDocuments               such documents that share tokens: DPO's answers to a question

The fourth is unfolded into the third. A GPU takes the others with SDPA's flash kernel, its
memory-efficient kernel, and the varlen flash kernel. Flash kernels want 16 bits and compute
capability 8.0 (Ampere), and wheels for Windows have none. Without them the memory-efficient kernel
takes all, packed rows by a mask.

A CPU takes the first, the third and the fourth document by document (document_attention.py).
"""

import inspect
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch.nn.attention.varlen import varlen_attn

from kernels.autograd import compute_dtype
from kernels.document_attention import document_attention
from kernels.shared_documents import SharedDocuments, attend_unfolded

# --- one call of a layer ------------------------------------------------------------------------


def additive_mask(mask: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor | None:
    """A bool mask, True where a query sees a key, as what is added to scores: 0 or -inf.

    Made once for all layers. SDPA would make it from a bool mask in each layer, and keep each
    layer's for backward. weight: any parameter of the model, for the dtype of its queries.
    """
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=compute_dtype(weight)).masked_fill_(~mask, float("-inf"))


def sdpa(q, k, v, mask: torch.Tensor | None, dropout: float) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None,  # lets SDPA choose its flash kernel
        dropout_p=dropout,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def attend_on_cpu(q, k, v, attention_mask: torch.Tensor | None, dropout: float) -> torch.Tensor:
    """q (batch, heads, seq, head_dim), k and v (batch, kv_heads, keys, head_dim) -> q's shape."""
    batch, _, seq, _ = q.shape
    documents = (attention_mask,)
    if isinstance(attention_mask, SharedDocuments):
        documents = attention_mask
    elif dropout or (attention_mask is not None and attention_mask.ndim == 4):
        return sdpa(q, k, v, attention_mask, dropout)
    elif attention_mask is None:  # every row is a document
        documents = (torch.arange(0, (batch + 1) * seq, seq, dtype=torch.int32),)
    q, k, v = (rearrange(x, "b h s d -> (b s) h d") for x in (q, k, v))
    attended, _ = document_attention(q, k, v, *documents)
    return rearrange(attended, "(b s) h d -> b h s d", s=seq)


def attend_on_gpu(q, k, v, attention_mask: torch.Tensor | None, dropout: float) -> torch.Tensor:
    """Shapes as attend_on_cpu."""
    by_document = partial(attend_by_document, longest=q.shape[2])  # no document is in two rows
    if isinstance(attention_mask, SharedDocuments):
        return attend_unfolded(by_document, q, k, v, attention_mask)
    if attention_mask is not None and attention_mask.ndim == 1:
        return by_document(q, k, v, attention_mask)
    # Only the flash kernel lets several queries share a key. SDPA would fall to its unfused form.
    if attention_mask is not None or not has_flash_kernel(q.device, q.dtype):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return sdpa(q, k, v, attention_mask, dropout)


# torch 2.11 has no such word, and lets queries share a key without it.
SHARE_KEYS: dict[str, Any] = {"enable_gqa": True}
if "enable_gqa" not in inspect.signature(varlen_attn).parameters:
    SHARE_KEYS = {}


def attend_by_document(q, k, v, bounds: torch.Tensor, longest: int) -> torch.Tensor:
    """Shapes as attend_on_cpu; bounds int32 (documents + 1,); longest: tokens, none has more."""
    seq, options = q.shape[2], SHARE_KEYS if q.shape[1] != k.shape[1] else {}
    # Of a batch of one row they would be views, head after head in memory.
    q, k, v = (rearrange(x, "b h s d -> (b s) h d").contiguous() for x in (q, k, v))
    x = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0), **options)
    return rearrange(cast(torch.Tensor, x), "(b s) h d -> b h s d", s=seq)


def reference_attend(q, k, v, attention_mask: torch.Tensor | None, dropout: float) -> torch.Tensor:
    """The twin of both: softmax(q k^T / sqrt(head_dim)) v with every score written out."""
    if isinstance(attention_mask, SharedDocuments):
        return attend_unfolded(partial(reference_attend, dropout=dropout), q, k, v, attention_mask)
    if attention_mask is None or attention_mask.ndim == 1:
        attention_mask = additive_mask(document_mask(attention_mask, q), q)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).float()  # (batch, heads, seq, keys)
    probs = (scores + attention_mask).softmax(-1).to(v.dtype)
    return F.dropout(probs, dropout) @ v


def document_mask(bounds: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor:
    """Bounds of documents (None: every row is one) -> bool (batch, 1, seq, seq)."""
    batch, _, seq, _ = q.shape
    token = torch.arange(batch * seq, device=q.device)
    if bounds is None:
        bounds = torch.arange(0, (batch + 1) * seq, seq, device=q.device)
    document = torch.bucketize(token, bounds.long(), right=True).view(batch, 1, seq)
    same = document[..., :, None] == document[..., None, :]
    return same & torch.ones(seq, seq, dtype=torch.bool, device=q.device).tril()


# --- where packed rows can be told apart by their documents' bounds -------------------------------


def can_attend_by_document_on_cpu(weight: torch.Tensor, dropout: float) -> bool:
    """weight: any parameter of the model, for its device and dtype. No kernel has dropout."""
    return not dropout


def can_attend_by_document_on_gpu(weight: torch.Tensor, dropout: float) -> bool:
    """Parameters as above. The varlen kernel is a flash kernel; model_config checks head_dim."""
    return not dropout and has_flash_kernel(weight.device, compute_dtype(weight))


@torch.compiler.assume_constant_result
def has_flash_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has a flash attention kernel for this device and dtype."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    is_ampere = torch.cuda.get_device_capability(device) >= (8, 0)
    return is_ampere and torch.backends.cuda.is_flash_attention_available()


# What selective activation checkpointing keeps: the outputs of these operators.
ATTENTION_KERNELS = [
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.llm.document_attention.default,
]
