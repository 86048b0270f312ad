"""Peak memory of a pre-training step by gradient_checkpointing level, without running one.

    python benchmarks/memory.py

The sum of all live tensors at the worst moment, counted on tensors without contents; plan.py says
what a card needs beside it. tests/commands/test_plan.py shows that the count equals a real step's.
"""

import argparse

import peers  # noqa: F401 - puts the project on the path

import plan
from engine.memory import LEVELS, on_card
from models import CustomLLMConfig

NAMES = ("vocab_size", "d_model", "n_layers", "n_heads", "d_ff")
SHAPES = {  # rows and tokens of a micro-batch, then the model by NAMES
    "22M, vocab 6,400": (32, 512, (6400, 512, 6, 8, 1408)),
    "110M, vocab 32,000": (32, 512, (32000, 768, 12, 12, 2048)),
    "110M, vocab 151,680": (32, 512, (151680, 768, 12, 12, 2048)),
    "517M, vocab 32,000": (16, 1024, (32000, 1280, 24, 20, 3456)),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    arguments = parser.parse_args()
    print("GiB of tensors (and with plan.py's margin on the card, estimated)")
    print("| model | parameters | batch | " + " | ".join(f"{level!r}" for level in LEVELS) + " |")
    print("|---" * (3 + len(LEVELS)) + "|")
    for name, (rows, length, values) in SHAPES.items():
        sizes = dict(zip(NAMES, values, strict=True))
        config, _, _ = plan.read_config(plan.PRETRAIN, ["--optimizer", arguments.optimizer])
        config["max_seq_len"] = length
        model_config = CustomLLMConfig(**sizes, max_seq_len=length)
        step = plan.count_step(plan.PRETRAIN, config, model_config)
        peaks = [step.peak(rows, level)["total"] for level in LEVELS]
        cells = [f"{peak / 2**30:.2f} ({on_card(peak):.1f})" for peak in peaks]
        total = sum(p.numel() for p in step.model.parameters())
        print(f"| {name} | {total / 1e6:.1f} M | {rows} x {length} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
