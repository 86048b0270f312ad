"""Attention document by document against SDPA's own kernels, on a CPU: forward and backward.

    python benchmarks/document_attention.py

One layer. The two take turns. SDPA is called for all documents at once where they are of one
length, otherwise for one after the other. In 16 bits ours has a backward of its own.
"""

import argparse
import platform
import statistics
import time
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from peers import ROOT  # noqa: F401 (puts the project on the path)

from engine.runtime import keep_freed_memory
from kernels.document_attention import document_attention

HEAD_DIM = 64
MIXED = [300, 20, 512, 61, 512, 95, 700, 33, 44, 210, 512, 130, 400, 55, 512]  # 4,096 tokens
SHAPES = [  # heads, kv_heads, lengths of the documents
    (8, 8, [512] * 8),
    (8, 2, [512] * 8),
    (12, 12, [512] * 2),
    (8, 8, [128] * 32),
    (16, 8, [2048] * 2),
    (8, 8, [60] * 68),
    (8, 8, [20] * 200),
    (8, 8, MIXED),
]


def attend(q, k, v, bounds) -> torch.Tensor:
    return document_attention(q, k, v, bounds)[0]


def attend_by_sdpa(q, k, v, bounds) -> torch.Tensor:
    lengths, is_grouped = bounds.diff().tolist(), q.shape[1] != k.shape[1]
    sdpa = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=is_grouped)
    if len(set(lengths)) == 1:
        q, k, v = (rearrange(x, "(b s) h d -> b h s d", s=lengths[0]) for x in (q, k, v))
        return rearrange(sdpa(q, k, v), "b h s d -> (b s) h d")
    q, k, v = (rearrange(x, "s h d -> 1 h s d").split(lengths, dim=2) for x in (q, k, v))
    documents = zip(q, k, v, strict=True)
    attended = [sdpa(*document) for document in documents]
    return rearrange(torch.cat(attended, dim=2), "1 h s d -> s h d")


def measure(function, tensors, grad, bounds) -> float:
    """Milliseconds of forward and backward."""
    started = time.perf_counter()
    torch.autograd.grad(function(*tensors, bounds), tensors, grad)
    return (time.perf_counter() - started) * 1e3


def main():
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, ")
    print(f"head_dim {HEAD_DIM}, medians of {rounds} interleaved rounds")
    print("| dtype | heads | kv_heads | documents | ours, ms | SDPA, ms | SDPA / ours |")
    print("|---" * 7 + "|")
    for dtype in (torch.bfloat16, torch.float32):
        for heads, kv_heads, lengths in SHAPES:
            tokens = sum(lengths)
            q, k, v, grad = (
                torch.randn(tokens, count, HEAD_DIM).to(dtype)
                for count in (heads, kv_heads, kv_heads, heads)
            )
            tensors = [x.requires_grad_() for x in (q, k, v)]
            bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            times = [
                [measure(f, tensors, grad, bounds) for f in (attend, attend_by_sdpa)]
                for _ in range(2 + rounds)
            ][2:]
            ours, sdpa = (statistics.median(column) for column in zip(*times, strict=True))
            ratio = statistics.median(sdpa / ours for ours, sdpa in times)
            documents = "mixed" if lengths is MIXED else f"{len(lengths)} x {lengths[0]}"
            sizes = f"{str(dtype)[6:]} | {heads} | {kv_heads} | {documents}"
            print(f"| {sizes} | {ours:.1f} | {sdpa:.1f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
