"""What a save costs training: written at once, or copied and then written by a thread.

    python benchmarks/saves.py [--rounds 5] [--optimizer adamw] [--tokens 128]

A model of 109.5 M parameters trains in fp32. In every round it is saved in both ways, one after the
other, into the same folder; both write the same bytes. "save" is the time of checkpoint.save, in
which training waits. "slower steps" is how much longer the steps take in all that run while the
thread writes, against the steps before and behind.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import peers
import torch
import transformers

from engine import checkpoint, optim
from engine.runs import Run
from engine.runtime import Runtime, keep_freed_memory, make_runtime
from models import CustomLLM, CustomLLMConfig

SIZES: dict[str, Any] = {
    "vocab_size": 32_000,
    "d_model": 768,
    "n_heads": 12,
    "n_layers": 12,
    "d_ff": 2048,
}


class Training:
    """A model, its optimizers and its steps."""

    def __init__(self, optimizer: str, tokens: int, folder: Path):
        torch.manual_seed(0)
        self.rt: Runtime = make_runtime(None, peers.DEVICE)
        self.model = CustomLLM(CustomLLMConfig(max_seq_len=tokens, **SIZES))
        self.rt.place(self.model)
        rates = {"learning_rate": 1e-4, "muon_learning_rate": 1e-4, "weight_decay": 0.1}
        self.optimizers = optim.build(self.model, rates | {"optimizer": optimizer})
        self.ids = torch.randint(0, SIZES["vocab_size"], (1, tokens), device=peers.DEVICE)
        self.run, self.saves = Run(folder), 0

    def step(self) -> float:
        """Its seconds."""
        began = time.perf_counter()
        self.rt.backward(self.model(self.ids, labels=self.ids, skip_logits=True).loss)
        float(optim.step(self.model, self.optimizers, self.rt, 1.0))
        return time.perf_counter() - began

    def save(self) -> float:
        """Its seconds."""
        self.saves += 1
        state, began = {"step": self.saves, "val_loss": None}, time.perf_counter()
        parts = self.run, self.model, self.optimizers, self.rt
        checkpoint.save(*parts, state, {"keep_checkpoints": 1})
        return time.perf_counter() - began


def measure(training: Training) -> dict[str, float]:
    """Seconds of one round."""
    at_once = training.save()
    alone = [training.step() for _ in range(4)]
    with training.rt.writer:
        copied, beside = training.save(), []
        while (thread := training.rt.writer.thread) and thread.is_alive():
            beside.append(training.step())
    alone += [training.step() for _ in range(4)]
    slower = sum(beside) - statistics.mean(alone) * len(beside)
    return {
        "save, at once": at_once,
        "save, copied": copied,
        "copied / at once": copied / at_once,
        "the thread writes": training.rt.writer.seconds,
        "a step": statistics.mean(alone),
        "slower steps": slower,
        "(copied + slower) / at once": (copied + slower) / at_once,
    }


def main():
    parser = argparse.ArgumentParser(description="What a save costs training.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--tokens", type=int, default=128, help="of a step")
    parser.add_argument("--folder", default=None, help="on the disk that is written to")
    arguments = parser.parse_args()
    keep_freed_memory()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        training = Training(arguments.optimizer, arguments.tokens, Path(name))
        training.step()
        measure(training)  # not counted: memory and files are new
        rounds = [measure(training) for _ in range(arguments.rounds)]
        size = sum(path.stat().st_size for path in training.run.checkpoint.iterdir())
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{peers.describe_cpu()}; load {load}")
    print(f"{arguments.optimizer}, {size / 2**30:.2f} GiB a save")
    print("\n| | median | lowest | highest |\n|---|---|---|---|")
    for row in rounds[0]:
        values = [numbers[row] for numbers in rounds]
        texts = (f"{f(values):.3f}" for f in (statistics.median, min, max))
        print(f"| {row} | {' | '.join(texts)} |")


if __name__ == "__main__":
    main()
