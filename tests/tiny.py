"""What tests share: a corpus and a configuration that train in a second on a CPU, and measures."""

import importlib
import json
import os
import random
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from engine.runtime import Runtime, make_runtime
from engine.tracker import read_metrics
from models import Backbone, CustomLLM, CustomLLMConfig

MODEL = {"d_model": 32, "n_heads": 2, "n_layers": 2, "d_ff": 64}
LOOP = {
    "batch_size": 4,
    "num_epochs": 2,
    "num_workers": 0,
    "optimizer": "adamw",
    "scale_learning_rate": False,
    "dropout": 0.0,
    "mixed_precision": "no",
    "log_every": 1,
    "eval_every": 4,
    "save_every": 4,
    "sample_every": 0,
    "trackers": [],  # importing wandb takes as long as ten steps
}
PRETRAIN = MODEL | LOOP | {"max_seq_len": 32, "vocab_size": 300, "weight_decay": 0.1}
EXACT = (
    "train/loss",
    "train/grad_norm",
    "train/learning_rate",
    "val/loss",
    "val/bits_per_byte",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "kl/chosen",
    "val/rewards/margins",
)


CPU = torch.device("cpu")


def cpu_runtime(dtype: torch.dtype | None = None) -> Runtime:
    """One process on the CPU."""
    return make_runtime(dtype, CPU)


def tiny_model(**changes) -> CustomLLM:
    """64 tokens, width 16, two layers of two heads; the same weights each time."""
    sizes = {"vocab_size": 64, "d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 32}
    torch.manual_seed(0)
    return CustomLLM(CustomLLMConfig(**sizes | changes))


def sentences(count: int, seed: int = 0) -> list[str]:
    """Made-up sentences of a few words, so that there is something to learn."""
    choose = random.Random(seed)
    words = ["天地玄黄", "宇宙洪荒", "日月盈昃", "辰宿列张", "寒来暑往", "秋收冬藏", "闰余成岁"]
    return [
        "，".join(choose.choices(words, k=choose.randint(2, 6))) + f"{i}。" for i in range(count)
    ]


def write_jsonl(path, records) -> str:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def write_corpus(folder, count: int = 60) -> str:
    return write_jsonl(folder / "corpus.jsonl", [{"text": text} for text in sentences(count)])


def pretrain_config(folder, **changes) -> dict:
    """PRETRAIN on a corpus in `folder`, everything written under it."""
    paths = {"dataset": write_corpus(folder), "output_dir": str(folder / "checkpoints")}
    return PRETRAIN | paths | changes


def logged(final) -> list[tuple]:
    """(step, name, value) of every number of a run that must not depend on how it was run."""
    metrics = read_metrics(Path(final).parent / "metrics.jsonl")
    return [(m["step"], name, m[name]) for m in metrics for name in EXACT if name in m]


def write_conversations(folder, count: int = 40) -> str:
    records = [
        {"instruction": f"问{i}：{t[:4]}？", "response": t} for i, t in enumerate(sentences(count))
    ]
    return write_jsonl(folder / "sft.jsonl", records)


def write_preferences(folder, count: int = 40) -> str:
    """Chosen answers are sentences, rejected ones the same backwards."""
    records = [
        {"instruction": f"问{i}：{t[:4]}？", "chosen": t, "rejected": t[::-1]}
        for i, t in enumerate(sentences(count))
    ]
    return write_jsonl(folder / "dpo.jsonl", records)


def sft_config(folder, base: str, **changes) -> dict:
    paths = {"dataset": write_conversations(folder), "output_dir": str(folder / "checkpoints")}
    return LOOP | {"max_length": 64, "init_from": base} | paths | changes


def dpo_config(folder, base: str, **changes) -> dict:
    paths = {"dataset": write_preferences(folder), "output_dir": str(folder / "checkpoints")}
    return (
        LOOP
        | {"max_length": 64, "init_from": base, "gradient_accumulation_steps": 2}
        | paths
        | changes
    )


def peer(module: str):
    """A peer's module. Where it is not installed the test is skipped; with PEERS=1 it fails."""
    if os.environ.get("PEERS"):
        return importlib.import_module(module)
    return pytest.importorskip(module, reason="a peer: see .ci/peers.txt")


def trl_sft_trainer(folder, model_folder: str, tokenizer, conversations: list, **settings):
    """TRL's trainer on the CPU over lists of messages."""
    trl = peer("trl")
    return trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        args=trl.SFTConfig(
            output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, **settings
        ),
        train_dataset=Dataset.from_list([{"messages": turns} for turns in conversations]),
        processing_class=tokenizer,
    )


@contextmanager
def after_step(count: int, action):
    """Call action(optimizer) once, when AdamW has made `count` steps, in whatever stage."""
    done = []

    def hook(optimizer, args, kwargs):
        if isinstance(optimizer, torch.optim.AdamW):
            done.append(1)
            if len(done) == count:
                action(optimizer)

    handle = register_optimizer_step_post_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def before_forward(count: int, action):
    """Call action(backbone) once, before the model's forward pass number `count` with gradients."""
    done = []

    def hook(module, args):
        if isinstance(module, Backbone) and torch.is_grad_enabled():
            done.append(1)
            if len(done) == count:
                action(module)

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def crash_after(steps: int):
    """Let a stage die (as an exception, which is expected here) right after so many steps."""

    def crash(optimizer):
        raise InterruptedError("crash")

    with after_step(steps, crash), pytest.raises(InterruptedError):
        yield


@contextmanager
def no_training():
    """Any optimizer step fails the test."""

    def fail(optimizer):
        pytest.fail("something was trained")

    with after_step(1, fail):
        yield


def weights(folder) -> dict:
    return load_file(Path(folder) / "model.safetensors")


def assert_same_run(one, other):
    """Every number that was logged and every final weight are equal to the bit."""
    assert logged(one) == logged(other)
    expected = weights(other)
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, expected[name]), name


def kept_bytes(function) -> int:
    """Bytes that autograd keeps for backward."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values())


class Calls(TorchDispatchMode):
    """How often each operator is called."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function] += 1
        return function(*args, **(kwargs or {}))
