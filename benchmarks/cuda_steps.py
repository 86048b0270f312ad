"""Tokens per second, share of the card's peak and memory of every stage's step on your GPU.

    python benchmarks/cuda_steps.py                        3 sizes x 3 stages, all ways
    python benchmarks/cuda_steps.py --sizes 22M --stages pretrain --modes compiled

Prints a table row by row. The attention kernel of every row is looked up, and a run that fell back
to attention's unfused arithmetic ends the benchmark. A size that does not fit says so.
"""

import argparse
import time
from itertools import product

import numpy as np
import torch
from peers import ROOT  # noqa: F401 - puts the project on the path
from torch.utils._python_dispatch import TorchDispatchMode

import dpo_train
import sft_train
import train_llm
from corpus.packing import PackedCollator
from dpo_data import PairCollator
from engine import optim
from engine.memory import checkpoint_activations
from engine.meter import flops_per_token, peak_flops
from engine.runtime import compile_blocks, make_runtime
from kernels.attention import ATTENTION_KERNELS
from models import CustomLLM, CustomLLMConfig

NAMES = ("vocab_size", "d_model", "n_layers", "n_heads", "d_ff", "max_seq_len")
SIZES = {  # rows of a micro-batch, then the model by NAMES
    "tiny": (2, (640, 64, 2, 2, 128, 64)),  # to see the script run on a CPU
    "22M": (32, (6400, 512, 6, 8, 1408, 512)),
    "110M": (32, (32000, 768, 12, 12, 2048, 512)),
    "517M": (8, (32000, 1280, 24, 20, 3456, 1024)),
}
STAGES = {"pretrain": train_llm, "sft": sft_train, "dpo": dpo_train}
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}
LEVELS = {"none": False, "selective": "selective", "full": "full"}


class RecordAttention(TorchDispatchMode):
    """The names of the attention kernels that were called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in ATTENTION_KERNELS:
            self.names.add(function.__name__.removesuffix(".default").lstrip("_"))
        elif "attention_math" in function.__name__:
            raise SystemExit("Attention fell back to its unfused form: no fast kernel took it.")
        return function(*args, **(kwargs or {}))


def packed_rows(length: int, rows: int) -> dict[str, torch.Tensor]:
    """Full rows of two documents each. full_batch has no bounds of documents, so that the kernel
    of packed rows would not run.
    """
    positions = [*range(length // 3), *range(length - length // 3)]
    row = {"input_ids": np.arange(length) % 500 + 1, "position_ids": np.array(positions)}
    return PackedCollator(length, pad_token_id=0)([row] * rows)


class Step:
    """A stage's training step as the loops make it, on random weights."""

    def __init__(self, stage: str, model_config, rows: int, dtype, device, level):
        script, length = STAGES[stage], model_config.max_seq_len
        if stage == "dpo":
            self.forward_backward = script.trial_step(script.DEFAULTS)
            batch, self.num_items = PairCollator(0, length).full_batch(rows), rows  # pairs
        else:
            self.forward_backward = script.forward_backward
            batch, self.num_items = packed_rows(length, rows), rows * length  # targets
        self.rt = make_runtime(dtype, device)
        self.model = CustomLLM(model_config).train()
        self.rt.place(self.model)
        checkpoint_activations(self.model, level)
        self.optimizers = optim.build(self.model, script.DEFAULTS)
        self.batch = self.rt.to_device(batch)

    def __call__(self):
        self.forward_backward(self.model, self.batch, self.num_items, self.rt)
        optim.step(self.model, self.optimizers, self.rt, 1.0)


def synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(step: Step, device: torch.device, compiled: bool, steps: int) -> str:
    """The table's cells: tokens/s, share of the peak, GiB, kernels."""
    with RecordAttention() as attention:
        step()
    compile_blocks(step.model, compiled, device)
    for _ in range(3):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    tokens = step.batch["input_ids"].numel() * steps / (time.perf_counter() - started)
    peak = peak_flops(device)
    share = f"{tokens * flops_per_token(step.model) / peak:.1%}" if peak else "unknown"
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    return f"{tokens:,.0f} | {share} | {memory:.2f} | {', '.join(sorted(attention.names))}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["22M", "110M", "517M"])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"])
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("No CUDA device here. (--device cpu --sizes tiny shows that this runs.)")
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, each over {arguments.steps} steps")
    print("| stage, size, precision, mode, checkpointing | tokens/s | of peak | GiB | attention |")
    print("|---|---|---|---|---|")
    choices = (arguments.sizes, arguments.stages, arguments.precisions, arguments.modes)
    for size, stage, precision, mode, level in product(*choices, arguments.levels):
        rows, values = SIZES[size]
        model_config = CustomLLMConfig(**dict(zip(NAMES, values, strict=True)))
        torch._dynamo.reset()
        try:
            how = (PRECISIONS[precision], device, LEVELS[level])
            step = Step(stage, model_config, rows, *how)
            cells = measure(step, device, mode == "compiled", arguments.steps)
        except torch.cuda.OutOfMemoryError:
            cells = "out of memory | | |"
        print(f"| {stage}, {size}, {precision}, {mode}, {level} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
