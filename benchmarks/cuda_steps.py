"""Tokens per second, share of the card's peak and memory of every stage's step on your GPU.

    python benchmarks/cuda_steps.py                               all rows
    python benchmarks/cuda_steps.py --minutes 8                   the most useful rows first
    python benchmarks/cuda_steps.py --modes graph compiled --levels none --precisions fp16
    python benchmarks/cuda_steps.py --device cpu --sizes tiny --steps 1     to see that it runs

One table for benchmarks/README.md, row by row. A step is forward, loss, backward, clipping and the
optimizer. Muon updates the matrices of pretrain, pretrain moe and sft, which is their default;
AdamW does all else. It needs torch, transformers and accelerate, no `datasets` and no `wandb`.

The peer is transformers' Qwen3 of the same shape, with SDPA and AdamW(fused=True). Its autocast,
scaler, clipping, input_ids and labels are ours. It gets its fastest path. It knows no documents in
a row, so that SDPA's causal flash kernel takes it. The whole model is compiled; ours compiles the
blocks and the loss. Ours is divided by the peer where the two rows differ in nothing else.
Mode "graph": the key `cuda_graph` against mode="reduce-overhead"; memory is then what was reserved.

The attention kernel of every other row is looked up in a profile. A step whose attention runs
unfused, or whose loss is not finite, ends the benchmark. A row that does not fit says so.
"""

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from peers import StandIn
from torch.profiler import ProfilerActivity, profile

try:
    import datasets  # noqa: F401
except ImportError:  # the stages import it at their top, but a training step needs no data set
    sys.modules["datasets"] = StandIn("datasets")

import dpo_train
import sft_train
import train_llm
from corpus.packing import PackedCollator
from dpo_data import PairCollator
from engine import optim
from engine.cuda_graph import CALLS_BEFORE, GraphedStep
from engine.device import find_card
from engine.memory import checkpoint_activations
from engine.meter import flops_per_token, peak_flops
from engine.runtime import Runtime, compile_blocks, has_native_bf16, make_runtime
from kernels.attention import ATTENTION_KERNELS
from models import CustomLLM, CustomLLMConfig

NAMES = ("vocab_size", "d_model", "n_layers", "n_heads", "d_ff", "max_seq_len")
SIZES = {  # rows of a micro-batch, then the model by NAMES
    "tiny": (2, (640, 64, 2, 2, 128, 64)),  # to see the script run on a CPU
    "22M": (32, (6400, 512, 6, 8, 1408, 512)),
    "110M": (32, (32000, 768, 12, 12, 2048, 512)),
    "517M": (8, (32000, 1280, 24, 20, 3456, 1024)),
}
PEER = "peer"
STAGES: dict[str, tuple[Any, dict]] = {  # script, and changes of its settings
    PEER: (train_llm, {"optimizer": "adamw"}),  # first: its ratio stands in the next row
    "pretrain_adamw": (train_llm, {"optimizer": "adamw"}),
    "pretrain": (train_llm, {}),
    "sft": (sft_train, {}),
    "dpo": (dpo_train, {}),
    "pretrain_moe": (train_llm, {"use_moe": True}),
}
LABELS = {name: name.replace("_", " ") for name in STAGES} | {PEER: "peer: Qwen3, adamw"}
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}
MODES = ("graph", "compiled", "eager")
LEVELS = {"none": False, "selective": "selective", "full": "full"}  # of checkpointing
# Speed does not depend on them. With the stages' own, which need a warm-up, a loss may overflow.
RATES = {"learning_rate": 1e-4, "muon_learning_rate": 1e-3, "weight_decay": 0.1}
COLUMNS = "stage | size | precision | mode | checkpointing | tokens/s | of peak | peak GiB"
COLUMNS += " | attention | ours / peer"
KERNELS = {kernel.name() for kernel in ATTENTION_KERNELS}
UNFUSED = "aten::_scaled_dot_product_attention_math"


class Row(NamedTuple):
    """What a row of the table measures. Rows come in the order of product() of these fields."""

    size: str
    checkpointing: str
    mode: str
    precision: str
    stage: str


class Figures(NamedTuple):
    """What was measured. peak_share and gib: None where the device does not tell."""

    speed: float  # tokens per second
    peak_share: float | None
    gib: float | None
    kernels: list[str]


@dataclass
class Step:
    """A training step on random weights and one batch. Returns its loss."""

    config: CustomLLMConfig
    model: torch.nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    rt: Runtime
    forward_backward: Callable
    batch: dict[str, torch.Tensor]
    num_items: int  # targets, or pairs
    is_graph: bool

    def __call__(self) -> torch.Tensor:
        sums = self.forward_backward(self.model, self.batch, self.num_items, self.rt)
        optim.step(self.model, self.optimizers, self.rt, 1.0)
        return sums["loss"]


def our_step(row: Row, device: torch.device) -> Step:
    script, changes = STAGES[row.stage]
    settings = script.DEFAULTS | RATES | changes
    rows, config = read_size(row.size, settings.get("use_moe", False))
    rt = make_runtime(PRECISIONS[row.precision], device)
    with device:  # a large model's random weights take a CPU many seconds
        model = CustomLLM(config).train()
    checkpoint_activations(model, LEVELS[row.checkpointing])
    optimizers = optim.build(model, settings)
    compile_blocks(model, row.mode != "eager", rt)
    if script is dpo_train:
        forward_backward = script.trial_step(settings)
        batch, num_items = PairCollator(0, config.max_seq_len).full_batch(rows), rows
    else:
        forward_backward = script.forward_backward
        batch, num_items = packed_rows(config.max_seq_len, rows), rows * config.max_seq_len
    is_graph = row.mode == "graph"
    run = GraphedStep(forward_backward) if is_graph else forward_backward
    return Step(config, model, optimizers, rt, run, rt.to_device(batch), num_items, is_graph)


def peer_step(row: Row, device: torch.device) -> Step:
    """transformers' Qwen3 as its own users train it, on the batch of pretrain."""
    rows, config = read_size(row.size)
    rt = make_runtime(PRECISIONS[row.precision], device)
    stock = config.to_dict() | {"attn_implementation": "sdpa"}
    for key in ("model_type", "architectures"):
        stock.pop(key)
    with device:
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**stock)).train()
    if row.mode != "eager":
        model.compile(**({"mode": "reduce-overhead"} if row.mode == "graph" else {}))
    rate = RATES["learning_rate"]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), fused=True)]
    batch = rt.to_device(packed_rows(config.max_seq_len, rows))
    is_graph = row.mode == "graph"
    return Step(config, model, optimizers, rt, peer_forward_backward, batch, 0, is_graph)


def peer_forward_backward(model, batch: dict, num_targets: int, rt: Runtime) -> dict:
    # A compiled Qwen3 that is given no mask makes one, and SDPA's flash kernel takes none. A
    # dictionary is a mask made already: its None is "causal".
    mask = {"full_attention": None}
    inputs = {"input_ids": batch["input_ids"], "labels": batch["labels"], "attention_mask": mask}
    with rt.autocast():
        loss = model(**inputs, use_cache=False).loss
    rt.backward(loss)
    return {"loss": loss.detach()}


def read_size(size: str, use_moe: bool = False) -> tuple[int, CustomLLMConfig]:
    """(rows of a micro-batch, the model's shape)."""
    rows, values = SIZES[size]
    sizes: dict[str, Any] = dict(zip(NAMES, values, strict=True))
    if use_moe:  # the two experts of a token are as wide as the dense model
        sizes |= {"use_moe": True, "num_experts": 4, "top_k": 2, "moe_d_ff": sizes["d_ff"] // 2}
    return rows, CustomLLMConfig(**sizes)


def packed_rows(length: int, rows: int) -> dict[str, torch.Tensor]:
    """Full rows of two documents each."""
    positions = [*range(length // 3), *range(length - length // 3)]
    row = {"input_ids": np.arange(length) % 500 + 1, "position_ids": np.array(positions)}
    return PackedCollator(length, pad_token_id=0)([row] * rows)


def measure(step: Step, steps: int) -> Figures:
    device = step.rt.device
    for _ in range(CALLS_BEFORE + 2 if step.is_graph else 3):  # compiles, makes AdamW's state
        step()
    kernels = check_step(step)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    wait()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    speed = step.batch["input_ids"].numel() * steps / (time.perf_counter() - started)
    with torch.device("meta"):
        # The peer's are the same.
        flops = speed * flops_per_token(CustomLLM(step.config), step.config.max_seq_len)
    peak = peak_flops(device)
    memory = torch.cuda.max_memory_reserved if step.is_graph else torch.cuda.max_memory_allocated
    gib = memory() / 2**30 if device.type == "cuda" else None
    return Figures(speed, flops / peak if peak else None, gib, kernels)


def check_step(step: Step) -> list[str]:
    """A step's attention kernels; a graph's have no names. SystemExit: unfused, or not finite."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded:
        loss = float(step())
    if not math.isfinite(loss):
        raise SystemExit(f"The loss of a step is {loss}: its speed would say nothing.")
    return [] if step.is_graph else find_kernels(event.name for event in recorded.events())


def find_kernels(events: Iterable[str]) -> list[str]:
    """Short names of the attention kernels among a profile's events.

    A TorchDispatchMode does not see SDPA's unfused form, which leaves no name in a compiled step.
    """
    names = set(events)
    if UNFUSED in names:
        raise SystemExit("Attention fell back to its unfused form: no fast kernel took it.")
    if not names & KERNELS:
        raise SystemExit("A step called no attention kernel that is known: attention ran unfused.")
    short = (name.rpartition("::")[2].lstrip("_") for name in names & KERNELS)
    return sorted(name.removeprefix("scaled_dot_product_") for name in short)


def run_row(row: Row, device: torch.device, steps: int) -> tuple[Row, Figures | None]:
    """(row, its figures; None: out of memory). A peer that does not compile runs eagerly."""
    make_step = peer_step if row.stage == PEER else our_step
    try:
        return row, measure(make_step(row, device), steps)
    except torch.OutOfMemoryError:
        return row, None
    except Exception as error:  # of many kinds, from torch, Triton and transformers
        if row.stage != PEER or row.mode == "eager":
            raise
        print(f"The peer does not compile here: {error!r:.200}", file=sys.stderr, flush=True)
    clean_up()  # here, where the error does not hold the failed step any more
    return run_row(row._replace(mode="eager"), device, steps)


def clean_up():
    """Nothing that is compiled or allocated is left for the next row."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def format_row(row: Row, figures: Figures | None, ratio: float | None) -> str:
    cells = [LABELS[row.stage], row.size, row.precision, row.mode, row.checkpointing]
    if figures is None:
        cells += ["out of memory", "", "", "", ""]
    else:
        cells += [
            f"{figures.speed:,.0f}",
            "" if figures.peak_share is None else f"{figures.peak_share:.1%}",
            "" if figures.gib is None else f"{figures.gib:.2f}",
            ", ".join(figures.kernels),
            "" if ratio is None else f"{ratio:.2f}",
        ]
    return f"| {' | '.join(cells)} |"


def print_heading(device: torch.device, steps: int):
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    if device.type == "cuda" and (card := find_card()):
        name += f", driver {card.driver}"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{name}, {versions}, {steps} steps a row\n\n| {COLUMNS} |")
    print("|---" * len(COLUMNS.split(" | ")) + "|", flush=True)


def print_rows(rows: list[Row], device: torch.device, steps: int, minutes: float) -> list[Row]:
    """Print the rows that there is time for. Returns the others."""
    speeds: dict[Row, float] = {}
    end = time.perf_counter() + 60 * minutes
    seconds = 0.0  # of the row before: the next one will take about as long
    for number, row in enumerate(rows):
        started = time.perf_counter()
        if started + seconds > end:
            return rows[number:]
        done, figures = run_row(row, device, steps)
        clean_up()
        ratio = None
        if figures is not None:
            speeds[row] = figures.speed
            peer = speeds.get(row._replace(stage=PEER))
            ratio = figures.speed / peer if peer and row.stage == "pretrain_adamw" else None
        print(format_row(done, figures, ratio), flush=True)
        seconds = time.perf_counter() - started
    return []


def is_possible(row: Row) -> bool:
    if row.checkpointing != "none":  # transformers' own way of it is no peer of a level of ours
        return row.stage != PEER and row.mode != "graph"
    experts_wait = row.stage == "pretrain_moe" and row.precision == "fp16"
    return row.mode != "graph" or (row.stage != "dpo" and not experts_wait)


def describe_left_out(rows: list[Row]) -> str:
    """One line. Rows that differ in their stage alone are named together."""
    groups = [
        f"{' '.join(alike)} ({', '.join(LABELS[row.stage] for row in members)})"
        for alike, members in groupby(rows, key=lambda row: row[:-1])
    ]
    return f"Left out, for lack of time: {'; '.join(groups) or 'nothing'}."


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["22M", "110M", "517M"])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    parser.add_argument("--minutes", type=float, default=math.inf, help="that the table may take")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("No CUDA device here. (--device cpu --sizes tiny shows that this runs.)")
    device = torch.device(arguments.device)
    if device.type != "cuda":
        arguments.modes = [mode for mode in arguments.modes if mode != "graph"]
    elif not has_native_bf16(device):
        arguments.precisions = ["fp16"]
    how = (arguments.sizes, arguments.levels, arguments.modes, arguments.precisions)
    rows = [*filter(is_possible, (Row(*values) for values in product(*how, arguments.stages)))]
    print_heading(device, arguments.steps)
    left_out = print_rows(rows, device, arguments.steps, arguments.minutes)
    print(f"\n{describe_left_out(left_out)}")


if __name__ == "__main__":
    main()
