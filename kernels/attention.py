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

A CPU takes the first and the third document by document, with SDPA's flash kernel. In 16 bits its
backward is slow, and ours works in tiles of queries: the scores of one tile stay in the cache, and
all but the softmax is batched matrix products, which run at the full speed of the processor.
Nothing beyond the tile on the diagonal or in another document is computed. Backward computes the
probabilities again instead of keeping them (FlashAttention, arXiv 2205.14135). The scores are
rounded before the softmax: an error as large as the rounding of q and k. All of it is two torch
custom operators: torch.compile and checkpointing see one call each.
"""

import inspect
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch.nn.attention.varlen import varlen_attn

from kernels.autograd import at_least_fp32, compute_dtype
from kernels.shared_documents import unfolding

# --- backward in tiles of queries, for 16 bits on a CPU ------------------------------------------

TILE = 256  # queries
FULL = 32  # tokens: oneDNN compiles a product for each new shape, so that lengths are rounded up


class Span(NamedTuple):
    """Tokens start … end - 1: one document or several short ones, with the start of each."""

    start: int
    end: int
    documents: list[int]


def gather_documents(bounds: list[int]) -> list[Span]:
    """Short documents share a span of up to half a tile: a call costs more than their work."""
    spans: list[Span] = []
    for start, end in pairwise(bounds):
        if spans and end - spans[-1].start <= TILE // 2:
            spans[-1] = Span(spans[-1].start, end, [*spans[-1].documents, start])
        else:
            spans.append(Span(start, end, [start]))
    return spans


def query_tiles(span: Span, group: int, like: torch.Tensor):
    """Yields (queries, their places in by_kv_head's q, keys, mask (places, keys)), in the span and
    in the zeros behind it, which no query of the span sees.

    The mask is -inf where a key comes after its query or belongs to another document.
    """
    length = round_up(span.end - span.start)
    for start in range(0, length, TILE):
        end = min(start + TILE, length)
        mask = like.new_zeros(end - start, end)
        mask[:, start:].fill_(float("-inf")).triu_(1)
        for document in span.documents[1:]:  # such a span is a single tile
            mask[document - span.start :, : document - span.start] = float("-inf")
        mask = mask.repeat_interleave(group, dim=0)
        yield slice(start, end), slice(start * group, end * group), slice(0, end), mask


def probabilities(q, k, mask) -> torch.Tensor:
    """softmax(q k^T / sqrt(head_dim) + mask): q (kv_heads, places, head_dim), k (kv_heads, keys,
    head_dim), mask (places, keys) -> (kv_heads, places, keys).
    """
    return torch.baddbmm(mask, q, k.mT, alpha=q.shape[-1] ** -0.5).softmax(-1)


def round_up(tokens: int) -> int:
    return -(-tokens // FULL) * FULL


def by_kv_head(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(tokens, heads, head_dim) -> (kv_heads, round_up(tokens) * group, head_dim), zeros behind.

    The heads that share a key become places in one matrix product.
    """
    tokens, heads, head_dim = x.shape
    group = heads // kv_heads
    padded = x.new_zeros(kv_heads, round_up(tokens) * group, head_dim)
    padded[:, : tokens * group] = rearrange(x, "n (kv group) d -> kv (n group) d", kv=kv_heads)
    return padded


def by_token(x: torch.Tensor, group: int, tokens: int) -> torch.Tensor:
    """(kv_heads, at least tokens * group, head_dim) -> (tokens, heads, head_dim)."""
    return rearrange(x[:, : tokens * group], "kv (n group) d -> n (kv group) d", group=group)


def backward_in_tiles(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v; shapes as document_attention's, grad is the output's."""
    kv_heads, group, scale = k.shape[1], q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    # A key's gradient is a sum over tiles. In 16 bits each addition would round it.
    sums = torch.promote_types(k.dtype, torch.float32)
    for span in gather_documents(bounds):
        of_span = slice(span.start, span.end)
        queries, keys, values, grads = (by_kv_head(x[of_span], kv_heads) for x in (q, k, v, grad))
        grad_keys, grad_values = torch.zeros(2, *keys.shape, dtype=sums)
        for tile, places, seen, mask in query_tiles(span, group, q):
            query, key = queries[:, places].contiguous(), keys[:, seen].contiguous()
            value, grad_output = values[:, seen].contiguous(), grads[:, places].contiguous()
            probs = probabilities(query, key, mask)
            grad_values[:, seen] += probs.mT @ grad_output
            grad_probs = grad_output @ value.mT
            grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
            grad_keys[:, seen] += grad_scores.mT @ query
            of_tile = grad_q[of_span][tile]
            of_tile[:] = by_token(grad_scores @ key, group, len(of_tile))
        tokens = span.end - span.start
        grad_k[of_span] = by_token(grad_keys.mul_(scale), 1, tokens)
        grad_v[of_span] = by_token(grad_values, 1, tokens)
    return grad_q.mul_(scale), grad_k, grad_v


# --- document by document, on a CPU ---------------------------------------------------------------

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def equal_documents(bounds: list[int]) -> Iterator[tuple[slice, int]]:
    """(tokens, length) of consecutive documents of one length, which a kernel takes at once."""
    start = end = length = 0
    for begin, stop in pairwise(bounds):
        if stop - begin != length and end > start:
            yield slice(start, end), length
        if stop - begin != length:
            start, length = begin, stop - begin
        end = stop
    if end > start:
        yield slice(start, end), length


def by_document(x: torch.Tensor, tokens: slice, length: int) -> torch.Tensor:
    """(tokens, heads, …) -> (documents, heads, length, …), a view."""
    return rearrange(x[tokens], "(n s) h ... -> n h s ...", s=length)


def join(parts: list[torch.Tensor]) -> torch.Tensor:
    """What by_document made of consecutive tokens, together again."""
    rows = [rearrange(part, "n h s ... -> (n s) h ...") for part in parts]
    return torch.cat(rows) if len(rows) > 1 else rows[0].contiguous()


@torch.library.custom_op("llm::document_attention", mutates_args=())
def document_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention within each document; and for backward the log of its softmax's divisors.

    q (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim), of one dtype; bounds int32
    (documents + 1,), where each document starts, and the end; returns q's shape, and at least fp32
    (tokens, heads).
    """
    attended = [
        flash(*(by_document(x, tokens, length) for x in (q, k, v)), 0.0, True)
        for tokens, length in equal_documents(bounds.tolist())
    ]
    output, log_sums = (join(list(parts)) for parts in zip(*attended, strict=True))
    return output, log_sums


@torch.library.custom_op("llm::document_attention_backward", mutates_args=())
def document_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    log_sums: torch.Tensor,
    bounds: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v; grad (tokens, heads, head_dim) is the output's."""
    if q.dtype.itemsize == 2:
        return backward_in_tiles(grad, q, k, v, bounds.tolist())
    tensors = [x.contiguous() for x in (grad, q, k, v, output, log_sums)]
    gradients = [
        flash_backward(*(by_document(x, tokens, length) for x in tensors), 0.0, True)
        for tokens, length in equal_documents(bounds.tolist())
    ]
    grad_q, grad_k, grad_v = (join(list(parts)) for parts in zip(*gradients, strict=True))
    return grad_q, grad_k, grad_v


@document_attention.register_fake
def _(q, k, v, bounds):
    return q.new_empty(q.shape), at_least_fp32(q.new_empty(q.shape[:2]))


@document_attention_backward.register_fake
def _(grad, q, k, v, output, log_sums, bounds):
    return tuple(q.new_empty(x.shape) for x in (q, k, v))


def _keep(ctx, inputs, output):
    q, k, v, bounds = inputs
    ctx.save_for_backward(q, k, v, *output, bounds)
    ctx.set_materialize_grads(False)  # log_sums has none


def _backward(ctx, grad, _):
    return *document_attention_backward(grad, *ctx.saved_tensors), None


document_attention.register_autograd(_backward, setup_context=_keep)


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


@unfolding
def attend_on_cpu(q, k, v, attention_mask: torch.Tensor | None, dropout: float) -> torch.Tensor:
    """q (batch, heads, seq, head_dim), k and v (batch, kv_heads, keys, head_dim) -> q's shape."""
    batch, _, seq, _ = q.shape
    if dropout or (attention_mask is not None and attention_mask.ndim == 4):
        return sdpa(q, k, v, attention_mask, dropout)
    if attention_mask is None:  # every row is a document
        attention_mask = torch.arange(0, (batch + 1) * seq, seq, dtype=torch.int32)
    q, k, v = (rearrange(x, "b h s d -> (b s) h d") for x in (q, k, v))
    attended, _ = document_attention(q, k, v, attention_mask)
    return rearrange(attended, "(b s) h d -> b h s d", s=seq)


@unfolding
def attend_on_gpu(q, k, v, attention_mask: torch.Tensor | None, dropout: float) -> torch.Tensor:
    """Shapes as attend_on_cpu."""
    if attention_mask is not None and attention_mask.ndim == 1:
        return attend_by_document(q, k, v, attention_mask)
    # Only the flash kernel lets several queries share a key. SDPA would fall to its unfused form.
    if attention_mask is not None or not has_flash_kernel(q.device, q.dtype):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return sdpa(q, k, v, attention_mask, dropout)


# torch 2.11 has no such word, and lets queries share a key without it.
SHARE_KEYS: dict[str, Any] = {"enable_gqa": True}
if "enable_gqa" not in inspect.signature(varlen_attn).parameters:
    SHARE_KEYS = {}


def attend_by_document(q, k, v, bounds: torch.Tensor) -> torch.Tensor:
    """Shapes as attend_on_cpu; bounds int32 (documents + 1,)."""
    seq, options = q.shape[2], SHARE_KEYS if q.shape[1] != k.shape[1] else {}
    q, k, v = (rearrange(x, "b h s d -> (b s) h d") for x in (q, k, v))
    x = varlen_attn(q, k, v, bounds, bounds, seq, seq, window_size=(-1, 0), **options)
    return rearrange(cast(torch.Tensor, x), "(b s) h d -> b h s d", s=seq)


@unfolding
def reference_attend(q, k, v, attention_mask: torch.Tensor | None, dropout: float) -> torch.Tensor:
    """The twin of both: softmax(q k^T / sqrt(head_dim)) v with every score written out."""
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
