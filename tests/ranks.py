"""Runs stages one after the other, on every rank: torchrun tests/ranks.py '[[stage, …], …]'."""

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

FUNCTIONS = {"train_llm": "train", "sft_train": "train_sft", "dpo_train": "train_dpo"}


def main():
    for stage, run_name, config in json.loads(sys.argv[1]):
        train = getattr(importlib.import_module(stage), FUNCTIONS[stage])
        train(run_name=run_name, wandb_config=config)


if __name__ == "__main__":
    main()
