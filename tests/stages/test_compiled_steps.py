"""What torch.compile compiles: the training step, all of it, and nothing else. On a GPU's path."""

import numpy as np
import pytest
import torch
from gpu_like import LIKE_A_GPU, Graphs
from tiny import (
    cpu_runtime,
    dpo_config,
    pretrain_config,
    sft_config,
    tiny_model,
)
from torch import nn

import dpo_train
import sft_train
import train_llm
from corpus.packing import PackedCollator
from engine import evaluation
from engine.memory import checkpoint_activations

LENGTH, LAYERS = 32, 2
pytestmark = pytest.mark.slow  # it compiles


def packed(*rows: list[int]) -> dict:
    """A batch of rows, each given as the lengths of its documents."""
    parts = [np.concatenate([np.arange(length) for length in lengths]) for lengths in rows]
    examples = [{"input_ids": positions + 1, "position_ids": positions} for positions in parts]
    return PackedCollator(LENGTH, pad_token_id=0)(examples)


@pytest.mark.parametrize(
    ("use_moe", "dtype", "level"),
    [
        (False, torch.float16, "selective"),
        (True, torch.float16, "full"),
    ],
    ids=str,
)
def test_every_block_of_every_step_runs_compiled_also_after_validation_and_samples(
    tokenizer, use_moe, dtype, level
):
    torch._dynamo.reset()
    model = tiny_model(vocab_size=320, use_moe=use_moe, n_kv_heads=1, n_layers=LAYERS).train()
    model.backend, rt, graphs = LIKE_A_GPU, cpu_runtime(dtype), Graphs()
    checkpoint_activations(model, level)
    for block in model.model.layers:
        block.compile(backend=graphs, fullgraph=True)

    def step(batch: dict):
        before = graphs.calls
        train_llm.forward_backward(model, batch, 10, rt)
        assert graphs.calls - before == LAYERS  # torch.compile takes checkpointing into the graph

    def look():
        before = vars(graphs).copy()
        evaluation.validate(model, [packed([32], [9]), packed([5])], 100, rt)
        evaluation.sample(model, tokenizer, ["天地"], rt, max_new_tokens=3)
        assert vars(graphs) == before

    look()
    step(packed([32], [10, 22], [5, 9, 18], [30]))
    step(packed([32], [32], [32], [32]))
    look()
    step(packed([3, 4, 5], [6, 7], [8], [9]))
    step(packed([30]))  # what is left over at the end of an epoch
    step(packed([32], [10, 22], [5, 9, 18], [30]))
    assert graphs.compiled <= 4


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_a_stage_compiles_its_steps_and_no_sample_or_validation(
    monkeypatch, tmp_path, base_model, stage
):
    torch._dynamo.reset()
    compile_module, graphs = nn.Module.compile, Graphs()
    monkeypatch.setattr(nn.Module, "compile", lambda m: compile_module(m, backend=graphs))
    train, config = {
        "pretrain": (train_llm.train, pretrain_config(tmp_path)),
        "sft": (sft_train.train_sft, sft_config(tmp_path, base_model)),
        "dpo": (dpo_train.train_dpo, dpo_config(tmp_path, base_model)),
    }[stage]
    config |= {"torch_compile": True, "gradient_accumulation_steps": 2, "max_steps": 4}
    train(wandb_config=config | {"eval_every": 1, "sample_every": 2, "device": "cpu"})
    layers, micro_batches, steps = 2, 2, 4
    assert graphs.calls == layers * micro_batches * steps
    assert graphs.compiled <= 4
