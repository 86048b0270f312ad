"""Causal attention on a CPU, a block of queries at a time.

The scores of one block stay in the cache, and all but the softmax is batched matrix products, which
run at the full speed of the processor: in bf16 half the time of SDPA. Nothing beyond the block on
the diagonal or in another document is computed, and backward computes the probabilities again
instead of keeping them (FlashAttention, arXiv 2205.14135). In 16 bits the scores are rounded before
the softmax: an error of the size that rounding q and k has made already.

Two operators of torch's own kind, so that torch.compile and checkpointing see one call each.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from einops import rearrange

BLOCK = 128  # queries


class Span(NamedTuple):
    """Tokens start … end - 1: one document, or several short ones, each with its start."""

    start: int
    end: int
    documents: list[int]


def gather_documents(bounds: list[int]) -> list[Span]:
    """Short documents share a span of up to half a block: there a call costs more than its work."""
    spans: list[Span] = []
    for start, end in pairwise(bounds):
        if spans and end - spans[-1].start <= BLOCK // 2:
            spans[-1] = Span(spans[-1].start, end, [*spans[-1].documents, start])
        else:
            spans.append(Span(start, end, [start]))
    return spans


def query_blocks(span: Span, group: int, like: torch.Tensor):
    """Yields (queries, rows of q by kv head, keys, mask (rows, keys)), counted in the span.

    The mask is -inf where a key is behind its query or in another document.
    """
    length = span.end - span.start
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        mask = like.new_zeros(end - start, end)
        mask[:, start:].fill_(float("-inf")).triu_(1)
        for document in span.documents[1:]:  # such a span is a single block
            mask[document - span.start :, : document - span.start] = float("-inf")
        mask = mask.repeat_interleave(group, dim=0)
        yield slice(start, end), slice(start * group, end * group), slice(0, end), mask


def probabilities(q, k, mask) -> torch.Tensor:
    """softmax(q k^T / sqrt(head_dim) + mask): q (kv_heads, rows, head_dim), k (kv_heads, keys,
    head_dim), mask (rows, keys) -> (kv_heads, rows, keys)."""
    return torch.baddbmm(mask, q, k.mT, alpha=q.shape[-1] ** -0.5).softmax(-1)


def by_kv_head(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(tokens, heads, head_dim) -> (kv_heads, tokens * group, head_dim): heads that share a key
    become rows of one matrix product."""
    return rearrange(x, "n (kv group) d -> kv (n group) d", kv=kv_heads).contiguous()


def by_token(x: torch.Tensor, group: int) -> torch.Tensor:
    return rearrange(x, "kv (n group) d -> n (kv group) d", group=group)


@torch.library.custom_op("llm::blocked_attention", mutates_args=())
def blocked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor
) -> torch.Tensor:
    """Causal attention within each document.

    q (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim), of one dtype; bounds int32
    (documents + 1,), where each document starts, and the end; returns q's shape.
    """
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    output = q.new_empty(q.shape)
    for span in gather_documents(bounds.tolist()):
        of_span = slice(span.start, span.end)
        queries, keys, values = (by_kv_head(x[of_span], kv_heads) for x in (q, k, v))
        for block, rows, seen, mask in query_blocks(span, group, q):
            # Contiguous: a batched product copies any other operand, and slowly.
            probs = probabilities(queries[:, rows].contiguous(), keys[:, seen].contiguous(), mask)
            mixed = probs @ values[:, seen].contiguous()
            output[of_span][block] = by_token(mixed, group)
    return output


@torch.library.custom_op("llm::blocked_attention_backward", mutates_args=())
def blocked_attention_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v from that of the output, grad (tokens, heads, head_dim)."""
    kv_heads, group, scale = k.shape[1], q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    # A key's gradient is a sum over blocks: added up in 16 bits it would be rounded every time.
    sums = torch.promote_types(k.dtype, torch.float32)
    for span in gather_documents(bounds.tolist()):
        of_span = slice(span.start, span.end)
        queries, keys, values, grads = (by_kv_head(x[of_span], kv_heads) for x in (q, k, v, grad))
        grad_keys, grad_values = torch.zeros(2, *keys.shape, dtype=sums)
        for block, rows, seen, mask in query_blocks(span, group, q):
            query, key = queries[:, rows].contiguous(), keys[:, seen].contiguous()
            value, grad_output = values[:, seen].contiguous(), grads[:, rows].contiguous()
            probs = probabilities(query, key, mask)
            grad_values[:, seen] += probs.mT @ grad_output
            grad_probs = grad_output @ value.mT
            grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
            grad_keys[:, seen] += grad_scores.mT @ query
            grad_q[of_span][block] = by_token(grad_scores @ key, group)
        grad_k[of_span] = by_token(grad_keys.mul_(scale), 1)
        grad_v[of_span] = by_token(grad_values, 1)
    return grad_q.mul_(scale), grad_k, grad_v


@blocked_attention.register_fake
def _(q, k, v, bounds):
    return q.new_empty(q.shape)


@blocked_attention_backward.register_fake
def _(grad, q, k, v, bounds):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return *blocked_attention_backward(grad, *ctx.saved_tensors), None


blocked_attention.register_autograd(_backward, setup_context=_keep)
