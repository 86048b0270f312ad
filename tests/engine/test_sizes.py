"""What protects a run: sizes that fit. A GPU that is too small is made up."""

import contextlib
import copy
import inspect
import re
import traceback
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from tiny import (
    CPU,
    LOOP,
    MODEL,
    before_forward,
    dpo_config,
    logged,
    pretrain_config,
    sft_config,
)
from torch.nn.modules.module import register_module_forward_pre_hook

import dpo_train
import sft_train
import train_llm
from corpus.packing import PackedCollator
from dpo_data import PairCollator
from engine import memory, optim
from engine.guards import (
    backward_fits,
    check_memory,
    explain_oom,
    fit_batch_size,
    largest_micro_batch,
)
from engine.runtime import Runtime, make_runtime
from engine.settings import run_from_command_line
from models import Backbone, CustomLLM, CustomLLMConfig

STAGES = ("pretrain", "sft", "dpo")
CARD = SimpleNamespace(total_memory=2 * 2**30)


@dataclass
class SmallGpu(Runtime):
    """The CPU in a GPU's place."""

    def to_device(self, batch: dict) -> dict:
        return batch


def small_gpu() -> SmallGpu:
    return SmallGpu(torch.device("cuda"), None, make_runtime(None, CPU).scaler)


class Trial:
    """A stage's forward_backward on a GPU with memory for so many rows. It notes what is tried."""

    def __init__(self, forward_backward, most_rows: int):
        self.forward_backward, self.most_rows = forward_backward, most_rows
        self.tried: list[int] = []

    def __call__(self, model, batch: dict, num_targets: int, rt: Runtime):
        self.tried.append(len(batch["input_ids"]))
        if self.tried[-1] > self.most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.forward_backward(model, batch, num_targets, rt)


def tiny_parts(stage: str):
    """(configuration, model, optimizers, forward_backward, full_batch) of a stage."""
    scripts = {"pretrain": train_llm, "sft": sft_train, "dpo": dpo_train}
    config = scripts[stage].DEFAULTS | LOOP
    config |= {"batch_size": "auto", "gradient_accumulation_steps": 2, "optimizer": "muon"}
    config |= {"weight_decay": 0.1}
    torch.manual_seed(0)
    sizes: dict = MODEL | {"max_seq_len": 64}
    model = CustomLLM(CustomLLMConfig(64, **sizes)).train()
    if stage == "dpo":
        trial = dpo_train.trial_step(config), PairCollator(0, 32).full_batch
    else:
        trial = scripts[stage].forward_backward, PackedCollator(32, 0).full_batch
    return config, model, optim.build(model, config), *trial


@pytest.mark.parametrize("stage", STAGES)
def test_auto_takes_the_largest_micro_batch_that_fits_and_changes_nothing_else(stage, capsys):
    config, model, optimizers, forward_backward, full_batch = tiny_parts(stage)
    trial = Trial(forward_backward, 20)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = fit_batch_size(config, model, optimizers, small_gpu(), trial, full_batch)
    assert (found["batch_size"], found["gradient_accumulation_steps"]) == (16, 4)  # 64 rows still
    assert found | {"batch_size": "auto", "gradient_accumulation_steps": 2} == config
    assert trial.tried == [64, 32, 16]
    printed = capsys.readouterr().out
    assert printed == "batch_size auto: 64 rows of a step in 4 micro-batches of 16.\n"
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not any(optimizer.state for optimizer in optimizers)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_tried_has_gradients_and_optimizer_state_beside_it():
    config, model, optimizers, _, full_batch = tiny_parts("pretrain")
    seen = []

    def look(model, batch: dict, num_targets: int, rt: Runtime):
        seen.append(all(p.grad is not None for p in model.parameters()))
        seen.append(sum(len(optimizer.state) for optimizer in optimizers))

    fit_batch_size(config, model, optimizers, small_gpu(), look, full_batch)
    assert seen == [True, len(list(model.parameters()))]


def test_where_not_even_one_row_fits_the_error_says_what_to_change():
    config, model, optimizers, forward_backward, full_batch = tiny_parts("pretrain")
    trial = Trial(forward_backward, 0)
    with pytest.raises(MemoryError, match=r"Not even one row .* set gradient_checkpointing to \"f"):
        fit_batch_size(config, model, optimizers, small_gpu(), trial, full_batch)
    assert trial.tried == [64, 32, 16, 8, 4, 2, 1]


def test_ranks_take_what_fits_on_all_of_them():
    class SecondRankIsSmaller(SmallGpu):
        def any(self, flag: bool) -> bool:
            return flag or trial.tried[-1] > 8

    config, model, optimizers, forward_backward, full_batch = tiny_parts("pretrain")
    trial = Trial(forward_backward, 20)
    rt = SecondRankIsSmaller(**vars(small_gpu()))
    assert fit_batch_size(config, model, optimizers, rt, trial, full_batch)["batch_size"] == 8


def test_a_number_stays_what_it_is_and_a_divisor_is_found_for_any_number_of_rows():
    config = {"batch_size": 3, "gradient_accumulation_steps": 5}
    assert fit_batch_size(config, None, [], None, None, None) is config
    assert largest_micro_batch(96, lambda size: size <= 40) == 32
    assert largest_micro_batch(7, lambda size: size <= 6) == 1
    with pytest.raises(MemoryError, match="Not even one row fits in this GPU"):
        largest_micro_batch(8, lambda size: False)


@pytest.mark.slow
def test_on_a_cpu_auto_trains_as_the_number_it_stands_for(tmp_path):
    runs = []
    for size in ("auto", 32):
        config = pretrain_config(tmp_path, batch_size=size, output_dir=str(tmp_path / str(size)))
        runs.append(logged(train_llm.train(wandb_config=config)))
    assert runs[0] == runs[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_out_of_memory_in_a_step_says_what_to_change(monkeypatch, tmp_path, base_model, stage):
    def run_out(backbone):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: CARD)
    train, config = {
        "pretrain": (train_llm.train, pretrain_config(tmp_path)),
        "sft": (sft_train.train_sft, sft_config(tmp_path, base_model)),
        "dpo": (dpo_train.train_dpo, dpo_config(tmp_path, base_model)),
    }[stage]
    message = (
        r"batch_size 4 and gradient_checkpointing False\. Estimated to fit its 2\.0 GiB, by "
        r"gradient_checkpointing: (\d+) with False, (\d+) with 'selective', (\d+) with 'full'\. "
        r"Lower batch_size and raise gradient_accumulation_steps in proportion, or set batch_size "
        r"to \"auto\"\.$"
    )
    with before_forward(2, run_out), pytest.raises(MemoryError, match=message) as caught:
        train(wandb_config=config)
    sizes = [int(size) for size in re.search(message, str(caught.value)).groups()]
    assert 100 < sizes[0] < sizes[1] <= sizes[2]


@contextlib.contextmanager
def no_memory_in_inference(number: int):
    """The forward pass without gradients of this number finds no memory."""
    calls = []

    def hook(module, args):
        if isinstance(module, Backbone) and not torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == number:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "place"), [(1, "reference_logps"), (5, "validate")], ids=["reference", "validation"]
)
def test_out_of_memory_before_the_first_step_says_what_to_change(
    monkeypatch, tmp_path, base_model, number, place
):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: CARD)
    message = "memory ended with batch_size 4 .* Estimated to fit its 2.0 GiB"
    with no_memory_in_inference(number), pytest.raises(MemoryError, match=message) as caught:
        dpo_train.train_dpo(wandb_config=dpo_config(tmp_path, base_model))
    frames = traceback.extract_tb(caught.value.__cause__.__traceback__)
    assert place in [frame.name for frame in frames]
    assert not list(tmp_path.glob("checkpoints/*/*/step_*"))


def test_out_of_memory_elsewhere_is_one_line_on_the_command_line(monkeypatch):
    def train(wandb_config=None):
        raise torch.OutOfMemoryError("CUDA out of memory.\nA long story.")

    monkeypatch.setattr("sys.argv", ["train_llm.py"])
    with pytest.raises(SystemExit, match=r"^error: The GPU's memory ended before .*nvidia-smi"):
        run_from_command_line(train, {})


def test_a_trial_runs_what_trains_and_leaves_no_trace_of_its_size(monkeypatch):
    config, model, optimizers, forward_backward, full_batch = tiny_parts("pretrain")
    batches, resets = [], []

    def look(model, batch: dict, num_targets: int, rt: Runtime):
        batches.append(batch)
        return forward_backward(model, batch, num_targets, rt)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append(len(batches)))
    fit_batch_size(config, model, optimizers, small_gpu(), look, full_batch)
    assert resets == [len(batches)]
    ends = batches[0]["cu_seq_lens_q"]  # each row is a document: training's own kernel runs
    assert ends.tolist() == list(range(0, 65 * 32, 32))


def test_a_trial_leaves_the_state_of_a_resumed_run_as_it_was():
    config, model, optimizers, forward_backward, full_batch = tiny_parts("pretrain")
    rt = small_gpu()
    forward_backward(model, full_batch(2), 1, rt)
    optim.step(model, optimizers, rt, 1.0)
    before = copy.deepcopy([optimizer.state_dict()["state"] for optimizer in optimizers])
    fit_batch_size(config, model, optimizers, rt, forward_backward, full_batch)
    after = [optimizer.state_dict()["state"] for optimizer in optimizers]
    torch.testing.assert_close(after, before, atol=0, rtol=0)


@pytest.mark.parametrize("script", [train_llm, sft_train, dpo_train])
def test_a_stage_tries_what_it_has_compiled_and_distributed(script):
    lines = inspect.getsource(script).splitlines()
    names = ("checkpoint.resume(", "compile_blocks(", "sharding.distribute(", "fit_batch_size(")
    places = [next(i for i, line in enumerate(lines) if name in line) for name in names]
    assert places == sorted(places)


def test_ranks_try_without_exchanging_gradients():
    class Exchanging:
        """Stands for accelerate: inside, no gradients are exchanged."""

        entered: list = []

        def no_sync(self, model):
            self.entered.append(model)
            return contextlib.nullcontext()

    rt = make_runtime(None, CPU, accelerator=Exchanging())
    _, model, _, forward_backward, full_batch = tiny_parts("pretrain")
    assert backward_fits(model, full_batch(1), rt, forward_backward)
    assert rt.accelerator.entered == [model]


@pytest.mark.slow
def test_the_sizes_in_the_message_are_those_that_are_counted_for_this_card(monkeypatch):
    config, model, _, *trial = tiny_parts("pretrain")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: CARD)
    with pytest.raises(MemoryError) as caught, explain_oom(config, model.config, *trial):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    sizes = [int(word) for word in str(caught.value).replace(",", " ").split() if word.isdigit()]
    assert len(sizes) == 3
    assert 1000 < sizes[0] < sizes[1] <= sizes[2]
    step = memory.StepMemory(config, model.config, *trial)
    assert sizes == list(memory.largest_batches(step, 2.0).values())


def test_other_errors_of_a_step_stay_what_they_are():
    config, model, _, *trial = tiny_parts("pretrain")
    with pytest.raises(KeyError, match="other"), explain_oom(config, model.config, *trial):
        raise KeyError("other")


TOO_LARGE = [{"n_layers": 10**9}, {"vocab_size": 2**31, "d_model": 2**14, "n_heads": 2**7}]
TOO_LARGE.append({"use_moe": True, "num_experts": 10**9})


@pytest.mark.parametrize("sizes", TOO_LARGE, ids=str)
def test_weights_larger_than_this_machines_memory_are_refused_by_name(sizes):
    named = ", .*".join(f"{name}={value}" for name, value in sizes.items() if name != "use_moe")
    with pytest.raises(ValueError, match=f"{named}, .*: these weights take .* GiB, and this mach"):
        check_memory(CustomLLMConfig(**sizes))
    check_memory(CustomLLMConfig())
