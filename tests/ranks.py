"""Runs stages one after the other, on every rank: torchrun tests/ranks.py '[[stage, …], …]'."""

import importlib
import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

sys.path.insert(0, str(Path(__file__).parent.parent))

FUNCTIONS = {"train_llm": "train", "sft_train": "train_sft", "dpo_train": "train_dpo"}


def configure(shard: bool):
    """The state that the stage's own Accelerator finds: plain, or FSDP2.

    Accelerate itself does not set up FSDP2 where there is no GPU.
    """
    AcceleratorState._reset_state(reset_partial_state=False)
    if shard:
        Accelerator(cpu=True, mixed_precision="no")
        AcceleratorState._shared_state |= {
            "distributed_type": DistributedType.FSDP,
            "fsdp_plugin": FullyShardedDataParallelPlugin(fsdp_version=2),
        }


def main():
    # Muon multiplies in bf16. Over shards it sums, and so rounds, in another order.
    torch.Tensor.bfloat16 = torch.Tensor.float
    for stage, run_name, config, shard in json.loads(sys.argv[1]):
        configure(shard)
        train = getattr(importlib.import_module(stage), FUNCTIONS[stage])
        train(run_name=run_name, wandb_config=config)


if __name__ == "__main__":
    main()
