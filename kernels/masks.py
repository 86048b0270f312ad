"""Attention: which positions see which, and the kernel that computes it on this device.

Documents packed into one row never see each other. Three forms of one thing say so, and attend()
takes each as its `attention_mask`:

    None                          plain causal rows: SDPA picks its flash kernel
    bool (batch, 1, seq, keys)    any pattern: padding, packed rows, DPO's shared questions
    int32 (documents + 1,)        packed rows: flash attention over the documents alone, no
                                  row-squared mask and no work across documents

A CPU takes the first and the last in blocks of queries: blocked_attention.py.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch.nn.attention.varlen import varlen_attn

from kernels.attention import blocked_attention

ATTENTION_KERNELS = [
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.llm.blocked_attention.default,
]
IN_BLOCKS = {"cpu"}  # devices that take blocked_attention.py's attention, blocked_swiglu.py's MLP


def attend(q, k, v, attention_mask: torch.Tensor | None, dropout: float = 0.0) -> torch.Tensor:
    """q (batch, heads, seq, head_dim), k and v (batch, kv_heads, keys, head_dim) -> q's shape."""
    is_grouped, (rows, _, seq, _) = q.shape[1] != k.shape[1], q.shape
    in_blocks = q.device.type in IN_BLOCKS and not dropout
    if attention_mask is None and in_blocks:  # every row is a document
        attention_mask = torch.arange(0, (rows + 1) * seq, seq, dtype=torch.int32)
    if attention_mask is None or attention_mask.ndim == 4:
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=attention_mask,
            is_causal=attention_mask is None,  # lets SDPA pick its flash kernel
            dropout_p=dropout,
            enable_gqa=is_grouped,
        )
    q, k, v = (rearrange(x, "b h s d -> (b s) h d") for x in (q, k, v))
    if in_blocks:
        x = blocked_attention(q, k, v, attention_mask)
    else:
        bounds, longest = (attention_mask, attention_mask), (seq, seq)  # of queries, of keys
        x = varlen_attn(q, k, v, *bounds, *longest, window_size=(-1, 0), enable_gqa=is_grouped)
    return rearrange(x, "(b s) h d -> b h s d", s=seq)


def can_attend_by_document(weight: torch.Tensor, dropout: float) -> bool:
    """Whether attention over documents runs for a model: on a CPU, or 16-bit on Ampere or newer."""
    if weight.device.type in IN_BLOCKS:
        return not dropout
    dtype = weight.dtype
    if torch.is_autocast_enabled(weight.device.type):
        dtype = torch.get_autocast_dtype(weight.device.type)
    if weight.device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or dropout:
        return False
    return torch.cuda.get_device_capability(weight.device) >= (8, 0)


def build_attention_mask(input_ids, attention_mask, position_ids, past: int):
    """None where plain causal attention is right, else bool (batch, 1, seq, past + seq).

    Documents packed into one row are told apart by position_ids that restart at 0. Whether they do
    is not looked up, since that would make a GPU wait: given position_ids always build the mask.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask  # made by the caller: DPO's shared questions
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
        # A padding query keeps itself as its one key: a row with none would be undefined.
        mask = mask & (attention_mask.bool()[:, None, :] | (key == query[:, None]))
    return mask[:, None]  # (batch, 1, seq, past + seq)
