"""Attention of documents that share tokens, such as both answers to one question.

A row holds [question][chosen][rejected]: the question goes through all else of the model once. For
attention alone the documents are unfolded, [question][chosen] and [question][rejected], so that the
kernels for packed documents take them: no (seq, seq) mask, and no work across documents. Keys of a
question get their gradient from both documents.
"""

from collections.abc import Callable
from functools import wraps
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


def unfolding(attend: Callable) -> Callable:
    """attend(q, k, v, attention_mask, dropout), which takes SharedDocuments too."""

    @wraps(attend)
    def attend_any(q, k, v, attention_mask, dropout: float) -> torch.Tensor:
        if not isinstance(attention_mask, SharedDocuments):
            return attend(q, k, v, attention_mask, dropout)
        bounds, unfold_index, fold_index = attention_mask
        flat = (rearrange(x, "b h s d -> (b s) h d") for x in (q, k, v))
        # A GPU adds gradients of an index_select in any order: the sum of two is always the same.
        unfolded = (rearrange(x.index_select(0, unfold_index), "n h d -> 1 h n d") for x in flat)
        attended = rearrange(attend(*unfolded, bounds, dropout), "1 h n d -> n h d")
        folded = attended.index_select(0, fold_index)
        return rearrange(folded, "(b s) h d -> b h s d", s=q.shape[2])

    return attend_any
