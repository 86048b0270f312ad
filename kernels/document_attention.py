"""Attention document by document on a CPU: two torch custom operators, each one call to
torch.compile and checkpointing. A GPU has the varlen flash kernel for it (kernels/attention.py).

Documents of about one length are taken at once: a call costs more than the work of a short one.
SDPA's flash kernel computes forward, and backward except where that is slow: in 16 bits and up to
1,920 tokens. There ours works in tiles of queries. The scores of a tile stay in the cache, and all
but the softmax is batched matrix products, which run at the full speed of the processor. Nothing
beyond the tile on the diagonal is computed. Backward computes the probabilities again instead of
keeping them (FlashAttention, arXiv 2205.14135). The scores are rounded before the softmax: an error
as large as the rounding of q and k.
"""

from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from einops import rearrange

from kernels.autograd import at_least_fp32

TILE = 256  # queries
TILED_UP_TO = 1920  # tokens of a document, in 16 bits
# Keys of a group of short documents, tokens * kv_heads: in backward the scores must fit the cache.
AT_ONCE, AT_ONCE_IN_BACKWARD = 2**15, 2**12

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


# --- documents that are computed at once ----------------------------------------------------------


class Group(NamedTuple):
    """Documents that are filled up to one length, each by its last token again and again.

    tokens: (documents * length,), where each is in the rows; a slice where nothing is filled up.
    own, repeated: the places whose output is written, and all others; None: every one is written.
    """

    length: int
    tokens: Any
    own: Any = None
    repeated: Any = None

    def is_whole(self, x: torch.Tensor) -> bool:
        """Whether its documents are all that there are in rows x."""
        return isinstance(self.tokens, slice) and self.tokens == slice(0, len(x))

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens of the rows, …) -> (documents * length, …)."""
        is_slice = isinstance(self.tokens, slice)
        return x[self.tokens] if is_slice else x.index_select(0, self.tokens)

    def take_gradient(self, x: torch.Tensor) -> torch.Tensor:
        """take() for the output's gradient: 0 at a token that is there a second time."""
        x = self.take(x)
        return x if self.repeated is None else x.index_fill_(0, self.repeated, 0)

    def put(self, x: torch.Tensor, output: torch.Tensor):
        """The opposite of take, for what queries give: written into output."""
        if isinstance(self.tokens, slice):
            output[self.tokens] = x
        else:
            output.index_copy_(0, self.tokens[self.own], x.index_select(0, self.own))

    def add(self, x: torch.Tensor, output: torch.Tensor):
        """The same for what keys give: added to output, because documents may share tokens."""
        if isinstance(self.tokens, slice):
            output[self.tokens] = x
        else:  # contiguous: 20 times as fast
            output.index_add_(0, self.tokens, x.to(output.dtype).contiguous())


def round_up(length: int) -> int:
    """oneDNN compiles a product for each new shape: there must be few."""
    step = 32 if length <= TILE else 64
    return -(-length // step) * step


@lru_cache(maxsize=16)
def arrange(bounds: tuple[int, ...], tokens: int, rounded: int) -> list[Group]:
    """Documents of one length, together.

    tokens: the most of a group of several documents. rounded: lengths up to it are rounded up, and
    their groups have 1, 2, 4, … documents.
    """
    together: dict[tuple[int, int], list[tuple[int, int]]] = {}
    run = length = 0
    for start, end in pairwise(bounds):
        before, length = length, end - start
        if length <= rounded:
            together.setdefault((round_up(length), -1), []).append((start, end))
        else:  # only neighbours: nothing is copied then
            run = run if length == before else start
            together.setdefault((length, run), []).append((start, end))
    groups = []
    for (length, _), documents in together.items():
        while length and documents:
            count = min(len(documents), max(1, tokens // length))
            if length <= rounded:
                count = 2 ** (count.bit_length() - 1)
            groups.append(make_group(documents[:count], length))
            documents = documents[count:]
    return groups


def make_group(documents: list[tuple[int, int]], length: int) -> Group:
    """documents: (start, end) of each, in order."""
    first, last = documents[0][0], documents[-1][1]
    if last - first == sum(end - start for start, end in documents) == length * len(documents):
        return Group(length, slice(first, last))
    starts, ends = torch.tensor(documents).T.unsqueeze(2)  # (documents, 1) each
    tokens = starts + torch.arange(length)  # (documents, length)
    own = (tokens < ends).flatten()
    return Group(length, tokens.minimum(ends - 1).flatten(), *places_of(own))


def places_of(own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a bool tensor is True, and where it is False."""
    return own.nonzero().squeeze(1), (~own).nonzero().squeeze(1)


def share(group: Group, unfold_index: torch.Tensor, is_kept: torch.Tensor) -> Group:
    """A group of unfolded documents as one of documents that share tokens.

    is_kept: bool (unfolded tokens,), the copies whose output fold_index takes.
    """
    length, tokens, own, _ = group
    if isinstance(tokens, slice):
        tokens = torch.arange(tokens.start, tokens.stop)
    is_own = is_kept[tokens]
    if own is not None:
        is_own &= torch.zeros_like(is_own).index_fill_(0, own, True)
    return Group(length, unfold_index[tokens], *places_of(is_own))


def groups_of(
    bounds: torch.Tensor,
    unfold_index: torch.Tensor | None,
    fold_index: torch.Tensor | None,
    tokens: int,
    rounded: int,
) -> list[Group]:
    """Groups of the documents. With the indices of SharedDocuments they share tokens."""
    groups = arrange(tuple(bounds.tolist()), tokens, rounded)
    if unfold_index is None or fold_index is None:
        return groups
    is_kept = fold_index[unfold_index] == torch.arange(len(unfold_index))
    return [share(group, unfold_index, is_kept) for group in groups]


# --- backward in tiles of queries -----------------------------------------------------------------


@lru_cache(maxsize=16)
def causal_mask(size: int, group: int, keys: int, dtype: torch.dtype) -> torch.Tensor:
    """(size * group, keys), -inf where a key comes after its query: the queries are the last."""
    mask = torch.zeros(size, keys, dtype=dtype)
    mask[:, keys - size :].fill_(float("-inf")).triu_(1)
    return mask.repeat_interleave(group, dim=0)


def query_tiles(length: int, group: int, dtype: torch.dtype):
    """Yields (places of the queries in by_kv_head's q, keys, mask (places, keys)). The first tile
    has all keys.
    """
    size = TILE if group == 1 else TILE // 2
    # Large enough for many lengths: a tile's mask is a part of it.
    mask = causal_mask(size, group, size + 2 ** (length - 1).bit_length(), dtype)
    for start in reversed(range(0, length, size)):
        end = min(start + size, length)
        last = mask.shape[1] - size + end - start
        part = mask[: (end - start) * group, last - end : last]
        yield slice(start * group, end * group), slice(0, end), part


def probabilities(q, k, mask) -> torch.Tensor:
    """softmax(q k^T / sqrt(head_dim) + mask): q (batch, places, head_dim), k (batch, keys,
    head_dim), mask (places, keys) -> (batch, places, keys).
    """
    return torch.baddbmm(mask, q, k.mT, alpha=q.shape[-1] ** -0.5).softmax(-1)


def scaled_product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * (left @ right), batched, scaled before it is rounded."""
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=scale)


def by_kv_head(x: torch.Tensor, length: int, kv_heads: int) -> torch.Tensor:
    """(documents * length, heads, head_dim) -> (documents * kv_heads, length * group, head_dim).

    The heads that share a key become places in one matrix product.
    """
    pattern = "(n s) (kv group) d -> (n kv) (s group) d"
    return rearrange(x, pattern, s=length, kv=kv_heads).contiguous()


def by_token(x: torch.Tensor, length: int, kv_heads: int) -> torch.Tensor:
    """The opposite of by_kv_head."""
    return rearrange(x, "(n kv) (s group) d -> (n s) (kv group) d", s=length, kv=kv_heads)


def backward_in_tiles(
    length: int, grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v of documents of one length: q and grad, the output's, (documents *
    length, heads, head_dim), k and v (documents * length, kv_heads, head_dim). Those of k and v are
    at least fp32.
    """
    kv_heads, scale = k.shape[1], q.shape[-1] ** -0.5
    queries, keys, values, grads = (by_kv_head(x, length, kv_heads) for x in (q, k, v, grad))
    grad_queries = torch.empty_like(queries)
    # A key's gradient is a sum over tiles. In 16 bits each addition would round it.
    sums = torch.promote_types(k.dtype, torch.float32)
    grad_keys, grad_values = torch.empty(2, *keys.shape, dtype=sums)
    for places, seen, mask in query_tiles(length, q.shape[1] // kv_heads, q.dtype):
        query, key = queries[:, places].contiguous(), keys[:, seen].contiguous()
        value, grad_output = values[:, seen].contiguous(), grads[:, places].contiguous()
        probs = probabilities(query, key, mask)
        grad_probs = grad_output @ value.mT
        grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
        grad_queries[:, places] = scaled_product(grad_scores, key, scale)
        of_keys, of_values = scaled_product(grad_scores.mT, query, scale), probs.mT @ grad_output
        if seen.stop == length:
            grad_keys.copy_(of_keys)
            grad_values.copy_(of_values)
        else:
            grad_keys[:, seen] += of_keys
            grad_values[:, seen] += of_values
    of_q, of_k, of_v = (
        by_token(x, length, kv_heads) for x in (grad_queries, grad_keys, grad_values)
    )
    return of_q, of_k, of_v


# --- the operators --------------------------------------------------------------------------------


def by_document(x: torch.Tensor, length: int) -> torch.Tensor:
    """(documents * length, heads, …) -> (documents, heads, length, …), a view."""
    return rearrange(x, "(n s) h ... -> n h s ...", s=length)


def result_like(x: torch.Tensor, groups: list[Group]) -> torch.Tensor:
    """0 where documents may share tokens or leave some out; filling it takes time. Contiguous."""
    is_filled = groups and groups[0].is_whole(x)
    return x.new_empty(x.shape) if is_filled else x.new_zeros(x.shape)


def is_tiled(dtype: torch.dtype, length: int) -> bool:
    return dtype.itemsize == 2 and length <= TILED_UP_TO


@torch.library.custom_op("llm::document_attention", mutates_args=())
def document_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: torch.Tensor,
    unfold_index: torch.Tensor | None = None,
    fold_index: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention within each document; and for backward the log of its softmax's divisors.

    q (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim), of one dtype; bounds int32
    (documents + 1,), where each document starts, and the end, and the indices of documents that
    share tokens: as in SharedDocuments. Returns q's shape, and at least fp32 (tokens, heads).
    """
    # A longer one gains nothing, if its tokens need not be gathered anyway.
    rounded = TILE if unfold_index is None else TILED_UP_TO
    rounded = rounded if q.dtype.itemsize == 2 else 0
    groups = groups_of(bounds, unfold_index, fold_index, AT_ONCE // k.shape[1], rounded)
    output, log_sums = (result_like(x, groups) for x in (q, at_least_fp32(q[..., 0])))
    for group in groups:
        inputs = (by_document(group.take(x), group.length) for x in (q, k, v))
        attended, log_sum = flash(*inputs, 0.0, True)
        attended = rearrange(attended, "n h s d -> (n s) h d")
        log_sum = rearrange(log_sum, "n h s -> (n s) h")
        if group.is_whole(q):
            return attended.contiguous(), log_sum.contiguous()
        group.put(attended, output)
        group.put(log_sum, log_sums)
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
    unfold_index: torch.Tensor | None,
    fold_index: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v; grad (tokens, heads, head_dim) is the output's."""
    is_narrow = q.dtype.itemsize == 2
    tokens = (AT_ONCE_IN_BACKWARD if is_narrow else AT_ONCE) // k.shape[1]
    rounded = TILED_UP_TO if is_narrow else 0
    groups = groups_of(bounds, unfold_index, fold_index, tokens, rounded)
    grad_q, grad_k, grad_v = (result_like(x, groups) for x in (q, k, v))
    for group in groups:
        tensors = [group.take_gradient(grad), *map(group.take, (q, k, v))]
        if is_tiled(q.dtype, group.length):
            of_q, of_k, of_v = backward_in_tiles(group.length, *tensors)
        else:
            tensors += [group.take(output), group.take(log_sums)]
            inputs = (by_document(x.contiguous(), group.length) for x in tensors)
            gradients = flash_backward(*inputs, 0.0, True)
            of_q, of_k, of_v = (rearrange(x, "n h s d -> (n s) h d") for x in gradients)
            if group.is_whole(q):
                return of_q.contiguous(), of_k.contiguous(), of_v.contiguous()
        group.put(of_q, grad_q)
        group.add(of_k, grad_k)
        group.add(of_v, grad_v)
    return grad_q, grad_k, grad_v


@document_attention.register_fake
def _(q, k, v, bounds, unfold_index=None, fold_index=None):
    return q.new_empty(q.shape), at_least_fp32(q.new_empty(q.shape[:2]))


@document_attention_backward.register_fake
def _(grad, q, k, v, output, log_sums, bounds, unfold_index, fold_index):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _keep(ctx, inputs, output):
    q, k, v, *documents = inputs
    ctx.save_for_backward(q, k, v, *output, *documents)
    ctx.set_materialize_grads(False)  # log_sums has none


def _backward(ctx, grad, _):
    return *document_attention_backward(grad, *ctx.saved_tensors), None, None, None


document_attention.register_autograd(_backward, setup_context=_keep)
