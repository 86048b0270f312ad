"""Attention in tiles of queries against SDPA's kernel, on a CPU: one layer, forward and backward.

    python benchmarks/attention_tiles.py

The two take turns; SDPA is called a document at a time, or for all rows at once where every
document fills its row.
"""

import argparse
import platform
import statistics
import time

import torch
import torch.nn.functional as F
from einops import rearrange
from peers import ROOT  # noqa: F401 (puts the project on the path)

from kernels.attention import document_attention

HEAD_DIM = 64
SHAPES = [  # heads, kv_heads, length of a document, documents
    (8, 8, 512, 8),
    (8, 2, 512, 8),
    (12, 12, 512, 2),
    (16, 8, 2048, 2),
    (8, 8, 60, 68),
    (8, 8, 20, 200),
]


def attend(q, k, v, bounds) -> torch.Tensor:
    return document_attention(q, k, v, bounds)[0]


def attend_by_sdpa(q, k, v, bounds) -> torch.Tensor:
    lengths, is_grouped = bounds.diff().tolist(), q.shape[1] != k.shape[1]
    if lengths[0] >= 512:  # full rows
        q, k, v = (rearrange(x, "(b s) h d -> b h s d", s=lengths[0]) for x in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)
        return rearrange(x, "b h s d -> (b s) h d")
    q, k, v = (rearrange(x, "s h d -> 1 h s d").split(lengths, dim=2) for x in (q, k, v))
    attended = [
        F.scaled_dot_product_attention(*document, is_causal=True, enable_gqa=is_grouped)
        for document in zip(q, k, v, strict=True)
    ]
    return rearrange(torch.cat(attended, dim=2), "1 h s d -> s h d")


def measure(function, tensors, grad, bounds) -> float:
    """Milliseconds of forward and backward."""
    started = time.perf_counter()
    torch.autograd.grad(function(*tensors, bounds), tensors, grad)
    return (time.perf_counter() - started) * 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, ")
    print(f"head_dim {HEAD_DIM}, medians of {rounds} interleaved rounds")
    print("| dtype | heads | kv_heads | documents | tiles, ms | SDPA, ms | SDPA / tiles |")
    print("|---" * 7 + "|")
    for dtype in (torch.bfloat16, torch.float32):
        for heads, kv_heads, length, documents in SHAPES:
            tokens = length * documents
            q, k, v, grad = (
                torch.randn(tokens, count, HEAD_DIM).to(dtype)
                for count in (heads, kv_heads, kv_heads, heads)
            )
            tensors = [x.requires_grad_() for x in (q, k, v)]
            bounds = torch.arange(0, tokens + 1, length, dtype=torch.int32)
            times = [
                [measure(f, tensors, grad, bounds) for f in (attend, attend_by_sdpa)]
                for _ in range(2 + rounds)
            ][2:]
            tiles, sdpa = (statistics.median(column) for column in zip(*times, strict=True))
            ratio = statistics.median(sdpa / tiles for tiles, sdpa in times)
            sizes = f"{str(dtype)[6:]} | {heads} | {kv_heads} | {documents} x {length}"
            print(f"| {sizes} | {tiles:.1f} | {sdpa:.1f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
