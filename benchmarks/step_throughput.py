"""Tokens per second and peak memory of one full training step, against transformers' own models.

    python benchmarks/step_throughput.py                 dense, 22M, all precisions
    python benchmarks/step_throughput.py --model moe     4 experts, top-2, against Qwen3-MoE
    python benchmarks/step_throughput.py --model 110M --precisions bf16

A step is forward, loss, backward, clipping and AdamW. Every variant is a process of its own that
makes one step when it is asked to; they are asked in turn, so what disturbs the machine disturbs
all alike. Memory is the process's largest resident set, libraries included.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
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
PEERS = {"22M": ["llama", "qwen3"], "110M": ["llama", "qwen3"], "moe": ["qwen3-moe", "dense"]}
OURS = ("ours", "dense")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


def build(name: str, sizes: dict, length: int):
    """One of our models, or transformers' of the same sizes, both randomly initialised."""
    config = CustomLLMConfig(**sizes, max_seq_len=length)
    if name in OURS:
        return CustomLLM(config)
    import transformers

    stock = config.to_dict()
    for key in ("model_type", "architectures", "rope_parameters", "head_dim"):
        stock.pop(key)
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**stock))
    stock["head_dim"] = config.head_dim
    if name == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**stock))
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**stock, output_router_logits=True)
    )


def serve_steps(arguments):
    """Make one step for every line that comes in; answer with its seconds and the peak so far."""
    rows, length = arguments.shape
    name, dtype, compiled = arguments.variant.split("/")
    sizes = SIZES["22M" if name == "dense" else arguments.model]
    if name in OURS:
        keep_freed_memory()  # as make_accelerator does on a CPU
    model = build(name, sizes, length).train()
    if compiled == "compiled" and name in OURS:
        compile_blocks(model, True, make_runtime(None, torch.device("cpu")))
    elif compiled == "compiled":
        for layer in model.model.layers:
            layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, fused=True)
    rt = make_runtime(PRECISIONS[dtype], torch.device("cpu"))
    input_ids = torch.randint(
        0, sizes["vocab_size"], (rows, length), generator=torch.manual_seed(0)
    )
    options = {"skip_logits": True} if name in OURS else {"use_cache": False}

    def make_step() -> float:  # a function: after it no variable keeps the step's graph
        with rt.autocast():
            loss = model(input_ids=input_ids, labels=input_ids, **options).loss
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
        words = ["--variant", variant, "--model", arguments.model, "--shape"]
        command = [sys.executable, __file__, *words, *map(str, arguments.shape)]
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
    parser.add_argument("--variant", help="serve steps of one variant (used by the script itself)")
    arguments = parser.parse_args()
    if arguments.variant:
        serve_steps(arguments)
        return
    names = ["ours", *PEERS[arguments.model]]
    for dtype in arguments.precisions:
        for mode in arguments.modes:
            results = measure(arguments, [f"{name}/{dtype}/{mode}" for name in names])
            losses = [f"{runs[0]['loss']:.3f}" for runs in results.values()]
            print(f"\n{arguments.model}, {arguments.shape}, losses {', '.join(losses)}")
            columns = {"tokens_per_second": "tokens/s", "peak_gib": "peak GiB"}
            print_table(results, columns, f"ours/{dtype}/{mode}", PRECISIONS[dtype])


if __name__ == "__main__":
    main()
