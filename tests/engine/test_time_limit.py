"""A run that ends in time: how many steps, and that nothing else changes."""

import json
from pathlib import Path

import pytest
import torch
from tiny import cpu_runtime, logged, pretrain_config, tiny_model

from engine import optim
from engine.settings import parse_seconds
from engine.time_limit import seconds_per_step
from models import CustomLLM
from train_llm import forward_backward, train


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("8h", 28800), ("90m", 5400), ("1h30m", 5400), ("1.5h", 5400), ("45s", 45)],
)
def test_a_time_is_hours_minutes_and_seconds(text, seconds):
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("value", ["", "8", "h", "8 h", "-1h", "8d", 8, 0.5, "0h", True])
def test_what_is_no_time_is_refused_and_an_example_is_given(tmp_path, value):
    with pytest.raises(ValueError, match=r"time_limit=.* must be a time such as '8h', '90m'"):
        train(wandb_config=pretrain_config(tmp_path, time_limit=value))


def test_the_steps_that_are_timed_change_neither_weights_nor_optimizers():
    model, rt = tiny_model(), cpu_runtime()
    config = {"optimizer": "muon", "learning_rate": 1.0, "muon_learning_rate": 1.0}
    optimizers = optim.build(model.train(), config | {"weight_decay": 0.5})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = cpu_batch()
    assert seconds_per_step([[ids, ids]] * 20, model, optimizers, rt, forward_backward) > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(optimizer.state for optimizer in optimizers)
    assert all(parameter.grad is None for parameter in model.parameters())


def cpu_batch() -> dict:
    ids = torch.randint(1, 64, (2, 16), generator=torch.manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.mark.slow
def test_a_run_ends_in_time_and_a_resumed_one_takes_the_same_steps(tmp_path, capsys):
    config = pretrain_config(tmp_path, num_epochs=100_000, time_limit="4s", save_every=0)
    final = Path(train(wandb_config=config))
    steps = json.loads((final.parent / "time_limit.json").read_text())["steps"]
    assert "time_limit 4s: " in (printed := capsys.readouterr().out)
    assert f"{steps:,} steps in all" in printed and steps > 10
    # The same number of steps without a limit gives the same bits.
    plain = config | {"time_limit": None, "max_steps": steps, "output_dir": str(tmp_path / "b")}
    other = train(wandb_config=plain)
    one, two = (CustomLLM.from_pretrained(path).state_dict() for path in (final, other))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert logged(final) == logged(other)


def test_no_time_for_a_single_step_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"time_limit='0\.001s' leaves no time for a step"):
        train(wandb_config=pretrain_config(tmp_path, time_limit="0.001s"))
