"""Runs stages one after the other, on every rank: torchrun tests/ranks.py '[[stage, …], …]'."""

import importlib
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent.parent))

FUNCTIONS = {"train_llm": "train", "sft_train": "train_sft", "dpo_train": "train_dpo"}


def configure(shard: bool):
    """The state that the stage's own Accelerator finds: plain, or FSDP2.

    Accelerate itself does not set up FSDP2 where there is no GPU.
    """
    AcceleratorState._reset_state(reset_partial_state=False)
    ranks = PartialState(cpu=True)  # an AcceleratorState takes its distributed_type from here
    ranks.distributed_type = DistributedType.MULTI_CPU
    if shard:
        Accelerator(cpu=True, mixed_precision="no")
        ranks.distributed_type = DistributedType.FSDP
        AcceleratorState().fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)


@contextmanager
def expect_shards(shard: bool):
    """Fail unless modules with shards compute, or with replicas none."""
    seen = set()

    def note(module, args):
        seen.update({FSDPModule, DistributedDataParallel} & set(type(module).__mro__))

    handle = register_module_forward_pre_hook(note)
    yield
    handle.remove()
    assert seen == ({FSDPModule} if shard else {DistributedDataParallel}), seen


def fail(*arguments, **options):
    raise torch.OutOfMemoryError("of one card")


def main():
    if os.environ["RANK"] == "1":
        torch.searchsorted = fail  # all samples fail at one rank, and nothing else changes
    for stage, run_name, config, shard in json.loads(sys.argv[1]):
        configure(shard)
        train = getattr(importlib.import_module(stage), FUNCTIONS[stage])
        with expect_shards(shard):
            train(run_name=run_name, wandb_config=config)


if __name__ == "__main__":
    main()
