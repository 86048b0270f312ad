"""What fits and how long it takes, before anything runs; no GPU needed.

    python plan.py                                    train_llm.py as it stands
    python plan.py dpo_train.py --batch_size 32       another stage, a key changed for this plan

The memory is that of all tensors that are alive at the worst moment of a training step: a step is
run on tensors without contents (FakeTensorMode) and counted. The hours are arithmetic.
"""

import contextlib
import importlib
import math
import sys
import warnings
import weakref
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import train_llm
from corpus.documents import iter_documents
from corpus.readers import find_files, find_final, is_local, iter_records
from engine.guards import full_batch, stage_loss
from engine.optim import build_optimizers, optimizer_step
from engine.report import PEAK_FLOPS, active_parameters, flops_per_token
from engine.settings import AUTO_ROWS, parse_arguments, resolve_config
from engine.steps import checkpoint_blocks, make_precision
from kernels import cross_entropy as losses
from kernels import masks as attention
from models import CustomLLM, CustomLLMConfig

STAGES = {
    "train_llm.py": "max_seq_len",
    "sft_train.py": "max_length",
    "dpo_train.py": "max_length",
}
LEVELS = (False, "attention", "full")
CARD, CARD_GIB = "3090", 24.0
# Beside the tensors: CUDA's context and libraries, and what the allocator cannot use.
CONTEXT_GIB, FRAGMENTATION = 1.0, 0.10
MFU = (0.24, 0.50)  # plain and compiled 100M-class runs on consumer cards, as others report them
CHARACTERS_PER_TOKEN = 1.6  # Chinese text, 6,400-token BPE
READ_AT_MOST = 20_000_000  # characters; a larger corpus is estimated from its beginning


@contextlib.contextmanager
def as_on_a_gpu():
    """Chunks of logits as large as on a GPU, no look at the labels, and nothing in blocks."""
    logits, softmax = dict(losses.LOGITS_BUDGET), dict(losses.SOFTMAX_BUDGET)
    ignored, in_blocks = set(losses.SKIPS_IGNORED), set(attention.IN_BLOCKS)
    losses.LOGITS_BUDGET["cpu"] = losses.LOGITS_BUDGET["cuda"]
    losses.SOFTMAX_BUDGET.clear()
    losses.SKIPS_IGNORED.clear()
    attention.IN_BLOCKS.clear()
    try:
        yield
    finally:
        losses.LOGITS_BUDGET.update(logits)
        losses.SOFTMAX_BUDGET.update(softmax)
        losses.SKIPS_IGNORED.update(ignored)
        attention.IN_BLOCKS.update(in_blocks)


class PeakBytes(TorchDispatchMode):
    """The most bytes of tensors alive at once: MemTracker's total, without its categories, fast."""

    def __init__(self, *alive: torch.Tensor):
        super().__init__()
        self.alive = self.peak = 0
        self.known = WeakIdKeyDictionary()  # storages: a view has its base's
        self.count(alive)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        self.count(outputs)
        return outputs

    def count(self, tensors):
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage not in self.known:
                self.known[storage] = True
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.forget, storage.nbytes())
        self.peak = max(self.peak, self.alive)

    def forget(self, size: int):
        self.alive -= size


class StepMemory:
    """A stage's model and optimizers, and the peak of their training step in bytes.

    With fake=False on real tensors: what a test compares with.
    """

    def __init__(self, script: str, config: dict, model_config: CustomLLMConfig, fake: bool = True):
        self.script, self.config, self.length = script, config, config[STAGES[script]]
        self.mode = FakeTensorMode() if fake else None
        # bf16 stands for fp16 here: equally large, and its grouped product runs on a CPU.
        dtype = None if config["mixed_precision"] == "no" else torch.bfloat16
        self.precision = make_precision(dtype, torch.device("cpu"))
        with self.mode or contextlib.nullcontext():
            self.model = CustomLLM(model_config).train()
            self.optimizers = build_optimizers(self.model, config)
            self._run(self._batch(1))  # creates the optimizers' state
            self._step()

    def peak(self, batch_size: int, level) -> dict[str, int]:
        """Bytes by category, and "total", at the worst moment of a step's last micro-batch."""
        memory = MemTracker()
        with self._micro_batch(batch_size, level) as batch:
            memory.track_external(self.model, *self.optimizers, *batch.values())
            with memory, warnings.catch_warnings():
                # The tracker's, about blocks that are computed again.
                warnings.filterwarnings("ignore", message="Module is None")
                self._run(batch)
                self._step()
        peak = memory.get_tracker_snapshot("peak")[torch.device("cpu")]
        return {str(kind).rpartition(".")[2].lower(): size for kind, size in peak.items()}

    def peak_of_backward(self, batch_size: int, level) -> int:
        """Bytes at the worst moment before the optimizer's step, which no batch size changes."""
        with self._micro_batch(batch_size, level) as batch:
            states = [optimizer.state_dict()["state"] for optimizer in self.optimizers]
            weights = list(self.model.parameters())
            memory = PeakBytes(weights, [p.grad for p in weights], states, list(batch.values()))
            with memory:
                self._run(batch)
        return memory.peak

    @contextlib.contextmanager
    def _micro_batch(self, batch_size: int, level):
        checkpoint_blocks(self.model, level)
        batch = self._batch(batch_size)
        with self.mode or contextlib.nullcontext():  # outside a tracker, or that sees nothing
            self.model.zero_grad()
            if self.config["gradient_accumulation_steps"] > 1:
                self._run(self._batch(1))  # the gradients are there already
            yield batch

    def _batch(self, batch_size: int) -> dict[str, torch.Tensor]:
        batch = full_batch(self.script, self.length, batch_size)
        if self.mode:
            batch = {name: self.mode.from_tensor(tensor) for name, tensor in batch.items()}
        return batch

    def _run(self, batch: dict):
        with as_on_a_gpu():
            stage_loss(self.script, self.model, batch, self.precision, self.config).backward()

    def _step(self):
        limit = self.config["max_grad_norm"]
        optimizer_step(self.model, self.optimizers, self.precision, limit)


def on_card(tensor_bytes: float) -> float:
    """GiB of the card that a peak of tensors will take, by the stated margin."""
    return tensor_bytes / 2**30 * (1 + FRAGMENTATION) + CONTEXT_GIB


def largest_batches(script: str, config: dict, model_config, card_gib: float) -> dict:
    """The largest micro-batch by checkpointing level, estimated."""
    memory = StepMemory(script, config, model_config)
    return {level: largest_batch(memory, level, card_gib) for level in LEVELS}


def largest_batch(memory: StepMemory, level, card_gib: float) -> int:
    """The largest micro-batch that fits: beyond the first few rows memory grows in proportion."""
    room = (card_gib - CONTEXT_GIB) / (1 + FRAGMENTATION) * 2**30
    peaks: dict[int, float] = {}

    def fits(size: int) -> bool:
        if size not in peaks:
            peaks[size] = memory.peak_of_backward(size, level)
        return peaks[size] <= room

    # Below so many rows the chunk of logits still grows with them.
    chunk = losses.tokens_per_chunk(memory.model.config.vocab_size, torch.device("cuda"))
    rows = math.ceil(chunk / memory.length)
    fits(rows), fits(2 * rows)
    for _ in range(3):  # along the line through the two measured sizes that come nearest
        one, two = sorted(sorted(peaks, key=lambda size: abs(peaks[size] - room))[:2])
        slope = max(1.0, (peaks[two] - peaks[one]) / (two - one))
        size = max(1, math.floor(one + (room - peaks[one]) / slope))
        if any(abs(size - known) <= size // 50 and fits(known) for known in peaks):
            break
        fits(size)
    while size and not fits(size):
        size -= max(1, size // 50)
    return size


def read_config(script: str, arguments: list[str]) -> tuple[dict, CustomLLMConfig, str]:
    """(configuration, model's configuration, where that came from)."""
    module = importlib.import_module(Path(script).stem)
    config = resolve_config(module.DEFAULTS, parse_arguments(arguments, module.DEFAULTS))
    if config["batch_size"] == "auto":
        config["batch_size"] = AUTO_ROWS
    if script == "train_llm.py" and not config["init_from"]:
        return config, train_llm.make_model_config(config, config["vocab_size"]), "wandb_config"
    before = "pretrain" if script == "sft_train.py" else "sft"
    try:
        folder = config["init_from"] or find_final(config["output_dir"], before, "")
    except ValueError:
        shape = train_llm.wandb_config
        found = train_llm.make_model_config(shape, shape["vocab_size"])
        return config, found, f"train_llm.py's wandb_config (no finished {before} run)"
    return config, CustomLLMConfig.from_pretrained(folder), str(folder)


def count_characters(script: str, dataset: str) -> float:
    """Characters of text in a corpus; of a large one estimated from its beginning."""
    files = find_files(dataset)
    total, read, characters = sum(file.stat().st_size for file in files), 0, 0
    for file in files:
        in_file = 0
        for text in file_texts(script, file):
            characters += len(text)
            in_file += len(text.encode())
            if characters > READ_AT_MOST and file.suffix in (".jsonl", ".json", ".txt"):
                return characters * total / (read + in_file)
        read += file.stat().st_size
        if characters > READ_AT_MOST:
            return characters * total / read
    return characters


def file_texts(script: str, file: Path):
    if script == "train_llm.py":
        yield from iter_documents(str(file))
        return

    def strings(value):
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            for part in value.values() if isinstance(value, dict) else value:
                yield from strings(part)

    for _, record in iter_records(file):
        yield from strings(record)


def describe_hours(script: str, config: dict, model) -> list[str]:
    flops = flops_per_token(model) * (4 / 3 if script == "dpo_train.py" else 1)  # the reference
    low, high = (PEAK_FLOPS[CARD] * share for share in MFU)
    bounds = f"on an RTX {CARD} at {MFU[0]:.0%} to {MFU[1]:.0%} of its dense peak (estimated)"
    lines = [f"Speed: {low / flops:,.0f} to {high / flops:,.0f} tokens/s {bounds}"]
    per_token = [flops / high / 3600, flops / low / 3600]  # hours
    lines.append(f"Time: {span(per_token, 1e9)} per billion tokens (estimated)")
    if is_local(config["dataset"]):
        tokens = count_characters(script, config["dataset"]) / CHARACTERS_PER_TOKEN
        epochs = config["num_epochs"]
        lines.append(
            f"Time: {span(per_token, tokens * epochs)} for {epochs} epochs of {config['dataset']}, "
            f"about {tokens:,.0f} tokens (estimated)"
        )
    return lines


def span(hours_per_token: list[float], tokens: float) -> str:
    low, high = (hours * tokens for hours in hours_per_token)
    if high < 1:
        return f"{low * 60:.1f} to {high * 60:.1f} minutes"
    return f"{low:,.1f} to {high:,.1f} hours"


def describe_memory(memory: StepMemory, config: dict) -> list[str]:
    batch_size, level = config["batch_size"], config["gradient_checkpointing"]
    peak = memory.peak(batch_size, level)
    names = {"param": "parameters", "grad": "gradients", "opt": "optimizer", "act": "activations"}
    names |= {"temp": "temporary", "buffer": "buffers", "oth": "batch"}
    parts = ", ".join(f"{names[k]} {v / 2**30:.2f}" for k, v in peak.items() if k in names and v)
    needed = on_card(peak["total"])
    verdict = "fits" if needed <= CARD_GIB else "DOES NOT FIT"
    lines = [
        f"Peak of tensors: {peak['total'] / 2**30:.2f} GiB ({parts})",
        f"With {CONTEXT_GIB:.0f} GiB of context and {FRAGMENTATION:.0%} fragmentation: "
        f"{needed:.2f} GiB; {verdict} {CARD_GIB:.0f} GiB (estimated)",
    ]
    for name in LEVELS:
        size = largest_batch(memory, name, CARD_GIB)
        lines.append(f"Largest batch_size with gradient_checkpointing {name!r}: {size} (estimated)")
    return lines


def plan(script: str, arguments: list[str]) -> list[str]:
    config, model_config, source = read_config(script, arguments)
    memory = StepMemory(script, config, model_config)
    rows = config["batch_size"] * config["gradient_accumulation_steps"]
    tokens = rows * (full_batch(script, memory.length, 1)["input_ids"] > 0).sum()
    total = sum(p.numel() for p in memory.model.parameters())
    return [
        f"{script}, model from {source}",
        f"Parameters: {total:,}, {active_parameters(memory.model):,} active per token",
        f"Tokens per step: up to {int(tokens):,}",
        *describe_memory(memory, config),
        *describe_hours(script, config, memory.model),
    ]


def main():
    words = sys.argv[1:]
    script = Path(words.pop(0)).name if words and not words[0].startswith("--") else "train_llm.py"
    if {"-h", "--help"} & {script, *words}:
        print(__doc__)
        return
    try:
        if script not in STAGES:
            raise ValueError(f"{script}: expected one of {', '.join(STAGES)}.")
        print("\n".join(plan(script, words)))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
