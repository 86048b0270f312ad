"""What does not fit: batch_size "auto", and the message; a GPU that is too small is made up."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from tiny import MODEL, dpo_config, logged, pretrain_config, sft_config

from dpo_train import train_dpo
from engine import guards as out_of_memory
from engine.guards import explain_out_of_memory, fit_batch_size, largest_micro_batch
from engine.optim import build_optimizers
from engine.preference import AnswerScorer
from models import CustomLLM, CustomLLMConfig
from plan import read_config
from sft_train import train_sft
from train_llm import train

SCRIPTS = ("train_llm.py", "sft_train.py", "dpo_train.py")
LONE_GPU = SimpleNamespace(device=torch.device("cuda"), dtype=None, autocast=nullcontext)
ALONE = SimpleNamespace(num_processes=1)


@pytest.fixture
def small_gpu(monkeypatch):
    """The CPU in a GPU's place, with memory for so many rows in a forward pass."""
    tried = []

    def set_up(most_rows: int):
        for model in (CustomLLM, AnswerScorer):
            real = model.forward

            def forward(self, input_ids, *arguments, real=real, **options):
                tried.append(len(input_ids))
                if torch.is_grad_enabled() and len(input_ids) > most_rows:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                return real(self, input_ids, *arguments, **options)

            monkeypatch.setattr(model, "forward", forward)
        monkeypatch.setattr(out_of_memory, "to_device", lambda batch, device: batch)
        return tried

    return set_up


def tiny_parts(script: str):
    config, _, _ = read_config(script, ["--batch_size", "auto", "--optimizer", "muon"])
    config |= {"batch_size": "auto", "max_seq_len" if script == SCRIPTS[0] else "max_length": 32}
    torch.manual_seed(0)
    model = CustomLLM(CustomLLMConfig(64, max_seq_len=64, **MODEL)).train()
    return config | {"gradient_accumulation_steps": 2}, model, build_optimizers(model, config)


@pytest.mark.parametrize("script", SCRIPTS)
def test_auto_takes_the_largest_micro_batch_that_fits_and_changes_nothing_else(small_gpu, script):
    tried, said = small_gpu(20), []
    config, model, optimizers = tiny_parts(script)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = fit_batch_size(script, config, model, optimizers, LONE_GPU, ALONE, said.append)
    assert (found["batch_size"], found["gradient_accumulation_steps"]) == (16, 4)  # 64 rows still
    assert tried == [64, 32, 16]
    assert said == ["batch_size auto: 64 rows of a step in 4 micro-batches of 16."]
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not any(optimizer.state for optimizer in optimizers)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_tried_has_gradients_and_optimizer_state_beside_it(small_gpu, monkeypatch):
    small_gpu(64)
    config, model, optimizers = tiny_parts(SCRIPTS[0])
    seen = []

    def fits(*arguments):
        seen.append(all(p.grad is not None for p in model.parameters()))
        seen.append(sum(len(optimizer.state) for optimizer in optimizers))
        return True

    monkeypatch.setattr(out_of_memory, "backward_fits", fits)
    fit_batch_size(SCRIPTS[0], config, model, optimizers, LONE_GPU, ALONE, print)
    assert seen == [True, len(list(model.parameters()))]


def test_a_number_stays_what_it_is_and_a_divisor_is_found_for_any_number_of_rows():
    config = {"batch_size": 3, "gradient_accumulation_steps": 5}
    assert fit_batch_size("train_llm.py", config, None, [], None, None, print) is config
    assert largest_micro_batch(96, lambda size: size <= 40) == 32
    assert largest_micro_batch(7, lambda size: size <= 6) == 1
    with pytest.raises(MemoryError, match="Not even one row fits in this GPU"):
        largest_micro_batch(8, lambda size: False)


def test_on_a_cpu_auto_trains_as_the_number_it_stands_for(tmp_path):
    runs = []
    for size in ("auto", 32):
        config = pretrain_config(tmp_path, batch_size=size, output_dir=str(tmp_path / str(size)))
        runs.append(logged(train(wandb_config=config)))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("stage", ["train_llm.py", "sft_train.py", "dpo_train.py"])
def test_out_of_memory_in_a_step_says_what_to_change(
    monkeypatch, tmp_path, base_model, small_gpu, stage
):
    card = SimpleNamespace(total_memory=2 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    config = {
        "train_llm.py": pretrain_config(tmp_path),
        "sft_train.py": sft_config(tmp_path, base_model),
        "dpo_train.py": dpo_config(tmp_path, base_model),
    }[stage]
    run = {"train_llm.py": train, "sft_train.py": train_sft, "dpo_train.py": train_dpo}[stage]
    small_gpu(3)
    monkeypatch.setattr("plan.largest_batches", lambda *_: {False: 2, "attention": 5, "full": 6})
    message = (
        r"batch_size 4 and gradient_checkpointing False\. Estimated to fit its 2\.0 GiB, by "
        r"gradient_checkpointing: 2 with False, 5 with 'attention', 6 with 'full'\. Lower batch"
    )
    with pytest.raises(MemoryError, match=message):
        run(wandb_config=config)


def test_the_sizes_in_the_message_are_those_of_the_plan_for_this_card(monkeypatch):
    config, model, _ = tiny_parts(SCRIPTS[0])
    card = SimpleNamespace(total_memory=2 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    with pytest.raises(MemoryError) as caught, explain_out_of_memory(SCRIPTS[0], config, model):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    sizes = [int(word) for word in str(caught.value).replace(",", " ").split() if word.isdigit()]
    assert len(sizes) == 3
    assert 1000 < sizes[0] < sizes[1] <= sizes[2]
