"""Attention of documents that share tokens, such as both answers to one question.

A row holds [question][chosen][rejected]: the question goes through all else of the model once. For
attention alone the documents are unfolded, [question][chosen] and [question][rejected], so that the
kernels for packed documents take them: no (seq, seq) mask, and no work across documents. Keys of a
question get their gradient from both documents.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange


class SharedDocuments(NamedTuple):
    """A form of attention_mask. All are int; places count through the flattened rows.

    bounds: int32 (documents + 1,), where each unfolded document starts, and the end.
    unfold_index: (unfolded tokens,), the place of each in the rows.
    fold_index: (batch * seq,), which unfolded token has a place's output; any at padding.
    """

    bounds: torch.Tensor
    unfold_index: torch.Tensor
    fold_index: torch.Tensor


def attend_unfolded(attend: Callable, q, k, v, documents: SharedDocuments) -> torch.Tensor:
    """attend(q, k, v, bounds) of the unfolded documents, one row of them.

    q (batch, heads, seq, head_dim), k and v (batch, kv_heads, seq, head_dim) -> q's shape.
    """
    bounds, unfold_index, fold_index = documents
    flat = (rearrange(x, "b h s d -> (b s) h d") for x in (q, k, v))
    # A GPU adds gradients of an index_select in any order: the sum of two is always the same.
    unfolded = (rearrange(x.index_select(0, unfold_index), "n h d -> 1 h n d") for x in flat)
    attended = rearrange(attend(*unfolded, bounds), "1 h n d -> n h d")
    return rearrange(attended.index_select(0, fold_index), "(b s) h d -> b h s d", s=q.shape[2])
