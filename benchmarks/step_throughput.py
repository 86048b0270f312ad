"""Tokens per second and peak memory of one full training step, against others' models.

    python benchmarks/step_throughput.py                 dense, 22M, all precisions
    python benchmarks/step_throughput.py --model moe     4 experts, top-2, against Qwen3-MoE
    python benchmarks/step_throughput.py --model 110M --precisions bf16
    python benchmarks/step_throughput.py --minimind CHECKOUT --nanogpt CHECKOUT

minimind and nanoGPT are the models of the reader's own checkouts, as they are. "qwen3+fused" is
Qwen3 with torch's fused loss (`linear_cross_entropy` in chunks) in place of its own. Liger's
kernels are Triton's: they do not run on a CPU.

A step is forward, loss, backward, clipping and AdamW. Every variant is a process of its own that
makes one step when it is asked to; they are asked in turn, so what disturbs the machine disturbs
all alike. Memory is the process's largest resident set, libraries included.
"""

import argparse
import contextlib
import importlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from peers import print_table

from engine.runtime import compile_blocks, keep_freed_memory, make_runtime
from models import CustomLLM, CustomLLMConfig

SIZES = {
    "22M": {"vocab_size": 6400, "d_model": 512, "n_heads": 8, "n_layers": 6, "d_ff": 1408},
    "110M": {"vocab_size": 32000, "d_model": 768, "n_heads": 12, "n_layers": 12, "d_ff": 2048},
    "moe": {"vocab_size": 6400, "d_model": 512, "n_heads": 8, "n_layers": 6, "d_ff": 704},
}
SIZES["moe"] |= {"use_moe": True, "num_experts": 4, "top_k": 2, "moe_d_ff": 704}
# "dense" is ours with what one token meets of the mixture: two experts of 704 are one of 1,408.
DENSE = ["llama", "qwen3", "qwen3+fused"]
PEERS = {"22M": DENSE, "110M": DENSE, "moe": ["qwen3-moe", "dense"]}
OURS = ("ours", "dense")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


def build(arguments, name: str, sizes: dict, length: int) -> tuple[torch.nn.Module, Callable]:
    """A model with random weights, and what computes its loss on input_ids.

    Ours, or one of the same sizes: transformers', minimind's, nanoGPT's.
    """
    config = CustomLLMConfig(**sizes, max_seq_len=length)
    if name in OURS:
        ours = CustomLLM(config)
        return ours, lambda ids: ours(input_ids=ids, labels=ids, skip_logits=True).loss
    if name == "nanogpt":
        return build_nanogpt(arguments.nanogpt, sizes, length)
    if name == "minimind":
        model = build_minimind(arguments.minimind, sizes)
    else:
        model = build_stock(name, config)
    if name == "qwen3+fused":
        return model, lambda ids: fused_loss(model, ids)
    return model, lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss


def build_stock(name: str, config: CustomLLMConfig):
    import transformers

    stock = config.to_dict()
    for key in ("model_type", "architectures", "rope_parameters", "head_dim"):
        stock.pop(key)
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**stock))
    stock["head_dim"] = config.head_dim
    if name in ("qwen3", "qwen3+fused"):
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**stock))
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**stock, output_router_logits=True)
    )


def fused_loss(model, input_ids: torch.Tensor) -> torch.Tensor:
    """Qwen3's loss without its logits."""
    states = model.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
    return torch.nn.functional.linear_cross_entropy(
        states.flatten(0, 1),
        model.lm_head.weight,
        input_ids[:, 1:].flatten(),
        options=torch.nn.LinearCrossEntropyOptions(),
    )


def build_minimind(checkout: str, sizes: dict):
    sys.path.insert(0, checkout)
    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

    heads = {"num_attention_heads": sizes["n_heads"], "num_key_value_heads": sizes["n_heads"]}
    widths = {"vocab_size": sizes["vocab_size"], "intermediate_size": sizes["d_ff"]}
    config = MiniMindConfig(sizes["d_model"], sizes["n_layers"], **widths, **heads)
    return MiniMindForCausalLM(config)


def build_nanogpt(checkout: str, sizes: dict, length: int) -> tuple[torch.nn.Module, Callable]:
    """Its own kind of model: learned positions, GELU of four times the width."""
    sys.path.insert(0, checkout)
    model = importlib.import_module("model")
    shape = {"n_layer": sizes["n_layers"], "n_head": sizes["n_heads"], "n_embd": sizes["d_model"]}
    with contextlib.redirect_stdout(sys.stderr):  # it prints its number of parameters
        gpt = model.GPT(
            model.GPTConfig(block_size=length, vocab_size=sizes["vocab_size"], bias=False, **shape)
        )
    return gpt, lambda ids: gpt(ids[:, :-1], ids[:, 1:].contiguous())[1]


def serve_steps(arguments):
    """Make one step for every line that comes in; answer with its seconds and the peak so far."""
    rows, length = arguments.shape
    name, dtype, compiled = arguments.variant.split("/")
    sizes = SIZES["22M" if name == "dense" else arguments.model]
    if name in OURS:
        keep_freed_memory()  # as make_accelerator does on a CPU
    model, loss_of = build(arguments, name, sizes, length)
    model.train()
    if compiled == "compiled" and name in OURS:
        compile_blocks(model, True, make_runtime(None, torch.device("cpu")))
    elif compiled == "compiled":
        for layer in model.transformer.h if name == "nanogpt" else model.model.layers:
            layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, fused=True)
    rt = make_runtime(PRECISIONS[dtype], torch.device("cpu"))
    input_ids = torch.randint(
        0, sizes["vocab_size"], (rows, length), generator=torch.manual_seed(0)
    )

    def make_step() -> float:  # a function: after it no variable keeps the step's graph
        with rt.autocast():
            loss = loss_of(input_ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    for _ in sys.stdin:
        started = time.perf_counter()
        result = {"loss": make_step()}
        result["tokens_per_second"] = rows * length / (time.perf_counter() - started)
        result["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(result), flush=True)


def measure(arguments, variants: list[str]) -> dict:
    """Steps of all variants in turn, after two rounds that warm up and compile."""
    processes: dict[str, Any] = {}
    for variant in variants:
        words = ["--variant", variant, "--model", arguments.model]
        words += [f"--minimind={arguments.minimind}", f"--nanogpt={arguments.nanogpt}"]
        command = [sys.executable, __file__, *words, "--shape", *map(str, arguments.shape)]
        processes[variant] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    results: dict[str, list[dict]] = {variant: [] for variant in variants}
    for round_number in range(2 + arguments.rounds):
        for variant, process in processes.items():
            print("step", file=process.stdin, flush=True)
            result = json.loads(process.stdout.readline())
            if round_number >= 2:
                results[variant].append(result)
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(SIZES), default="22M")
    parser.add_argument("--shape", type=int, nargs=2, default=[8, 512], metavar="N")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minimind", default="", help="a checkout of minimind")
    parser.add_argument("--nanogpt", default="", help="a checkout of nanoGPT")
    parser.add_argument("--variant", help="serve steps of one variant (used by the script itself)")
    arguments = parser.parse_args()
    if arguments.variant:
        serve_steps(arguments)
        return
    names = ["ours", *PEERS[arguments.model]]
    if arguments.model != "moe":
        names += [name for name in ("minimind", "nanogpt") if getattr(arguments, name)]
    for dtype in arguments.precisions:
        for mode in arguments.modes:
            results = measure(arguments, [f"{name}/{dtype}/{mode}" for name in names])
            losses = [f"{runs[0]['loss']:.3f}" for runs in results.values()]
            print(f"\n{arguments.model}, {arguments.shape}, losses {', '.join(losses)}")
            columns = {"tokens_per_second": "tokens/s", "peak_gib": "peak GiB"}
            print_table(results, columns, f"ours/{dtype}/{mode}", PRECISIONS[dtype])


if __name__ == "__main__":
    main()
