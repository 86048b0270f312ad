"""A CPU that walks a GPU's path, so that what a GPU would run is tested where there is none.

Importing it gives the varlen attention operator of torch a kernel for the CPU. LIKE_A_GPU is
kernels.CUDA for tensors on the CPU. `card` answers torch's questions about a GPU, and `Graphs`
counts what runs compiled.
"""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import varlen

import kernels
from engine.memory import PLANNED_GPU

HALF = (torch.float16, torch.bfloat16)

# As on an Ampere card.
LIKE_A_GPU = replace(kernels.CUDA, can_attend_by_document=PLANNED_GPU.can_attend_by_document)


def scores_and_values(query, key, value, bounds):
    """(probabilities (heads, tokens, tokens), q, k, v (heads, tokens, head_dim)), all in fp32.

    Shapes as torch's varlen_attn; causal within each document.
    """
    group = query.shape[1] // key.shape[1]
    token = torch.arange(len(query))
    document = torch.bucketize(token, bounds.long(), right=True)
    hidden = (document[:, None] != document) | (token > token[:, None])  # (tokens, tokens)
    heads_first = query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    q, k, v = (x.float().transpose(0, 1) for x in heads_first)
    scores = q @ k.mT * query.shape[-1] ** -0.5
    return scores.masked_fill(hidden, float("-inf")).softmax(-1), q, k, v


@varlen._varlen_attn.register_kernel("cpu")
def _(query, key, value, bounds, bounds_of_keys, longest, longest_key, is_causal=False, *_, **__):
    """Refuses what the flash kernel refuses."""
    assert query.dtype in HALF and query.dtype == key.dtype == value.dtype
    assert query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    assert bounds.dtype == torch.int32 and query.stride(-1) == 1 and is_causal
    probs, _, _, v = scores_and_values(query, key, value, bounds)
    output = torch.empty_like(query).copy_((probs @ v).transpose(0, 1))
    log_sum_exp = torch.zeros(query.shape[1], len(query))
    return output, log_sum_exp, torch.zeros(2, dtype=torch.uint64)


@varlen._varlen_attn_backward.register_kernel("cpu")
def _(grad, query, key, value, output, log_sum_exp, bounds, *_, **__):
    probs, q, k, v = scores_and_values(query, key, value, bounds)
    grad = grad.float().transpose(0, 1)
    grad_probs = grad @ v.mT
    grad_scores = probs * (grad_probs - (grad_probs * probs).sum(-1, keepdim=True))
    grad_scores *= query.shape[-1] ** -0.5

    def fold(x):  # the heads that share a key: (heads, tokens, head_dim) -> key's shape
        return x.transpose(0, 1).unflatten(1, (key.shape[1], -1)).sum(2)

    gradients = (grad_scores @ k).transpose(0, 1), fold(grad_scores.mT @ q), fold(probs.mT @ grad)
    pairs = zip((query, key, value), gradients, strict=True)
    return tuple(torch.empty_like(x).copy_(gradient) for x, gradient in pairs)


@contextmanager
def card(capability: tuple[int, int], flash: bool = True, name: str = "NVIDIA GeForce RTX 3090"):
    """torch's answers about a GPU. The tensors stay on the CPU."""
    native_bf16 = capability >= (8, 0)

    def supports_bf16(including_emulation: bool = True) -> bool:
        return native_bf16 or including_emulation

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        patch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        patch.setattr(torch.cuda, "is_bf16_supported", supports_bf16)
        patch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: flash)
        yield


class Graphs:
    """A backend for torch.compile that counts the graphs that it gets and the calls of them."""

    def __init__(self):
        self.compiled = self.calls = 0

    def __call__(self, graph, example_inputs):
        self.compiled += 1

        def run(*inputs):
            self.calls += 1
            return graph(*inputs)

        return run
