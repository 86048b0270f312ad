"""A step never makes the GPU wait for its host, counted on a CPU; and it leaves no graph behind."""

import contextlib
import math
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from gpu_like import LIKE_A_GPU
from tiny import (
    cpu_runtime,
    dpo_config,
    pretrain_config,
    sft_config,
    tiny_model,
    write_conversations,
    write_corpus,
    write_preferences,
)
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

import dpo_train
import kernels
import sft_train
import train_llm
from corpus.packing import PackedCollator
from dpo_data import prepare_dpo_data
from engine import optim, steps
from engine.guards import FiniteGuard
from engine.memory import checkpoint_activations
from engine.preference import AnswerScorer, count_pairs
from models import Backbone
from sft_data import prepare_sft_data
from train_data import prepare_data

OPTIMIZER = {"learning_rate": 1e-3, "muon_learning_rate": 1e-2, "weight_decay": 0.1}
ORDER = {"batch_size": 4, "gradient_accumulation_steps": 2, "num_epochs": 1, "max_steps": 3}
ORDER |= {"seed": 0, "num_workers": 0}


class CountLooks(TorchDispatchMode):
    """Counts what would make a GPU wait for its host: item() in all its forms, and copies to it.

    What was copied may be looked at: its memory stands for the host's.
    """

    def __enter__(self):
        self.looks, self.patch, self.on_host = 0, pytest.MonkeyPatch(), []
        for name in ("cpu", "numpy", "tolist"):
            self.patch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *exception):
        self.patch.undo()
        return super().__exit__(*exception)

    def counted(self, method):
        def call(tensor, *arguments, **options):
            result = method(tensor, *arguments, **options)
            self.looks += not any(tensor.data_ptr() == host.data_ptr() for host in self.on_host)
            if method.__name__ == "cpu":
                self.on_host.append(result)
            return result

        return call

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.looks += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_every_way_to_look_at_a_value_is_counted():
    value = torch.ones(())
    looks = [float, bool, lambda v: v.item(), lambda v: v.cpu(), lambda v: v[None].tolist()]
    for look in looks:
        with CountLooks() as counter:
            look(value)
        assert counter.looks == 1


def looks_in_steps(module, rows, collate, count, forward_backward, rt, optimizer) -> list[int]:
    """How often each step looks at a value, from its first forward to after its update.

    module: the model, or what scores its answers. count: of the targets, before a step begins.
    """
    model = module.model if isinstance(module, AnswerScorer) else module
    model.backend = LIKE_A_GPU
    optimizers = optim.build(model, OPTIMIZER | {"optimizer": optimizer})
    loader = steps.StepLoader(rows, collate, ORDER, rt)
    finite = FiniteGuard(None, loader.order, rt)
    looks = []
    for step, micro_batches in loader:
        num_targets, _ = count(micro_batches, rt)
        totals: Counter = Counter()
        with CountLooks() as counter:
            for batch in rt.accumulate(module, micro_batches):
                totals.update(forward_backward(module, batch, num_targets, rt))
            finite.note(step, optim.step(model, optimizers, rt, 1.0))
        looks.append(counter.looks)
        assert len(micro_batches) == 2
        assert math.isfinite(totals["loss"])
    return looks


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [("adamw", torch.bfloat16), ("muon", torch.bfloat16), ("muon", torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
def test_a_pretraining_step_never_waits_for_the_device_but_for_the_counts_of_experts(
    tmp_path, tokenizer_folder, optimizer, dtype, use_moe
):
    path, cache = write_corpus(tmp_path), str(tmp_path / "cache")
    splits, tokenizer = prepare_data(tokenizer_folder, path, 32, cache_dir=cache)
    model, rt = tiny_model(vocab_size=320, use_moe=use_moe).train(), cpu_runtime(dtype)
    checkpoint_activations(model, False if use_moe else "attention")
    data = splits["train"], PackedCollator(32, tokenizer.pad_token_id), steps.count_targets
    looks = looks_in_steps(model, *data, train_llm.forward_backward, rt, optimizer)
    layers, micro_batches = 2, 2
    assert looks == [layers * micro_batches if use_moe else 0] * 3


def test_an_sft_step_never_waits_for_the_device(tmp_path, tokenizer):
    path, cache = write_conversations(tmp_path), str(tmp_path / "cache")
    rows, collate = prepare_sft_data(tokenizer, path, 64, cache_dir=cache)
    data = rows, collate, steps.count_targets
    model, rt = tiny_model(vocab_size=320).train(), cpu_runtime()
    looks = looks_in_steps(model, *data, sft_train.forward_backward, rt, "adamw")
    assert looks == [0, 0, 0]


def test_a_dpo_step_never_waits_for_the_device(tmp_path, tokenizer):
    path, cache = write_preferences(tmp_path), str(tmp_path / "cache")
    pairs, collate = prepare_dpo_data(tokenizer, path, 64, cache_dir=cache)
    pairs = pairs.add_column("reference_logps", list(np.zeros((len(pairs), 2), np.float32)))

    def forward_backward(*arguments):
        return dpo_train.forward_backward(*arguments, dpo_train.DEFAULTS)

    scorer, rt = AnswerScorer(tiny_model(vocab_size=320).train()), cpu_runtime()
    looks = looks_in_steps(scorer, pairs, collate, count_pairs, forward_backward, rt, "adamw")
    assert looks == [0, 0, 0]


def test_the_same_count_finds_what_only_a_cpu_looks_at(tmp_path, tokenizer):
    rows, collate = prepare_sft_data(
        tokenizer, write_conversations(tmp_path), 64, cache_dir=str(tmp_path / "cache")
    )
    batch = collate([rows[0]])
    for backend, is_seen in ((LIKE_A_GPU, False), (kernels.CPU, True)):
        model = tiny_model(vocab_size=320).train()
        model.backend = backend
        with CountLooks() as counter:
            sft_train.forward_backward(model, batch, 1, cpu_runtime())
        assert (counter.looks > 0) == is_seen, backend.name


class Mark:
    """Lives as long as the graph that it is put into."""


@contextlib.contextmanager
def watch_graphs():
    """Yields a list: at each forward pass with gradients, whether a graph before it still lives."""
    marks, alive = [], []

    def look(module, args):
        if isinstance(module, Backbone) and torch.is_grad_enabled():
            alive.append(any(mark() for mark in marks))

    def put_mark(module, args, output):
        if isinstance(module, Backbone) and torch.is_grad_enabled():
            mark = Mark()
            output[0].grad_fn.metadata["mark"] = mark
            marks.append(weakref.ref(mark))

    handles = register_module_forward_pre_hook(look), register_module_forward_hook(put_mark)
    try:
        yield alive
    finally:
        for handle in handles:
            handle.remove()


def test_a_graph_that_lives_on_is_seen_and_one_that_is_gone_is_not():
    model, ids = tiny_model(), torch.ones(1, 8, dtype=torch.long)
    with watch_graphs() as alive:
        kept = model(ids, labels=ids, skip_logits=True)
        kept.loss.backward()
        kept = model(ids, labels=ids, skip_logits=True)
        del kept
        model(ids, labels=ids, skip_logits=True)
    assert alive == [False, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_a_micro_batchs_graph_is_gone_before_the_next_forward(tmp_path, base_model, stage):
    train, make_config = {
        "pretrain": (train_llm.train, lambda folder, _: pretrain_config(folder)),
        "sft": (sft_train.train_sft, sft_config),
        "dpo": (dpo_train.train_dpo, dpo_config),
    }[stage]
    config = make_config(tmp_path, base_model) | {"batch_size": 2, "eval_every": 0}
    with watch_graphs() as alive:
        train(wandb_config=config | {"gradient_accumulation_steps": 2, "max_steps": 2})
    assert alive == [False] * 4


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_nobody_asks_whether_gradients_of_fp16_overflowed(optimizer):
    model, rt = tiny_model(), cpu_runtime(torch.float16)
    optimizers = optim.build(model, OPTIMIZER | {"optimizer": optimizer})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    rt.scaler.scale(torch.ones(()))  # creates the scale
    with CountLooks() as counter:
        optim.step(model, optimizers, rt, 1.0)
    assert counter.looks == 0
