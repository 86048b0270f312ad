import sys

import pytest
import torch
from tiny import tiny_model, write_jsonl

import kernels
import plan
from engine.memory import LEVELS, largest_batch, on_card
from models import CustomLLMConfig
from plan import DPO, PRETRAIN, SFT, count_characters, count_step, read_config

SIZES = {"vocab_size": 640, "d_model": 64, "n_heads": 2, "n_layers": 2, "d_ff": 128}


def settings(stage: plan.Stage, **changes) -> tuple[plan.Stage, dict, CustomLLMConfig]:
    """A stage, its configuration and a tiny model's."""
    config, _, _ = read_config(stage, [])
    config |= {stage.length_key: 64, "gradient_accumulation_steps": 1} | changes
    sizes: dict = SIZES | {"max_seq_len": 128, "use_moe": config.get("use_moe", False)}
    return stage, config, CustomLLMConfig(**sizes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "level", "changes"),
    [
        (PRETRAIN, False, {}),
        (PRETRAIN, False, {"use_moe": True, "gradient_accumulation_steps": 2}),
        (PRETRAIN, "attention", {"optimizer": "adamw", "mixed_precision": "no"}),
        (SFT, "full", {}),
        (DPO, False, {}),
        (DPO, "full", {"gradient_accumulation_steps": 2}),
    ],
)
def test_the_planned_peak_is_that_of_a_real_step_to_the_byte(stage, level, changes):
    planned = count_step(*settings(stage, **changes)).peak(4, level)
    real = count_step(*settings(stage, **changes), fake=False).peak(4, level)
    assert planned == real
    assert planned["total"] > 4 * planned["param"] / 2


@pytest.mark.slow
def test_the_largest_batch_fits_and_a_twentieth_more_does_not():
    memory = count_step(*settings(PRETRAIN))
    sizes = [largest_batch(memory, level, 3.0) for level in LEVELS]
    assert sizes[0] < sizes[1] <= sizes[2]
    for size, level in zip(sizes, LEVELS, strict=True):
        assert on_card(memory.peak(size, level)["total"]) <= 3.0
        assert on_card(memory.peak(size + max(1, size // 20), level)["total"]) > 3.0
        assert memory.peak_of_backward(size, level) == memory.peak(size, level)["total"]


def test_planning_a_gpu_leaves_every_other_model_as_it_was():
    model, ids = tiny_model(), torch.arange(40).view(2, 20)
    before = model(ids, labels=ids).loss.detach()
    step = count_step(*settings(PRETRAIN))
    step.peak(2, "full")
    assert step.model.backend is kernels.CUDA
    assert model.backend is tiny_model().backend is kernels.CPU
    assert torch.equal(model(ids, labels=ids).loss.detach(), before)


def test_characters_are_counted_and_a_large_corpus_is_estimated(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"text": f"{i:04d}" + "天地玄黄" * 9} for i in range(200)]
    )
    assert count_characters(PRETRAIN, path) == 200 * 40
    estimated = count_characters(PRETRAIN, path, read_at_most=1000)
    assert estimated == pytest.approx(200 * 40, rel=0.2)
    pairs = write_jsonl(tmp_path / "b.jsonl", [{"messages": [{"role": "user", "content": "天地"}]}])
    assert count_characters(SFT, pairs) == len("user天地")


@pytest.mark.slow
def test_the_command_prints_a_plan_for_a_changed_key(monkeypatch, capsys, tmp_path):
    text = write_jsonl(tmp_path / "a.jsonl", [{"text": "天地玄黄" * 9}])
    # So wide and long that 24 GiB hold few rows: many rows take long to make.
    words = "--d_model 1024 --n_layers 1 --d_ff 4096 --max_seq_len 2048 --batch_size 8"
    arguments = ["plan.py", "train_llm.py", *words.split(), "--dataset", text]
    monkeypatch.setattr(sys, "argv", arguments)
    plan.main()
    printed = capsys.readouterr().out
    for part in (
        "Parameters: ",
        "Peak of tensors: ",
        "; fits 24 GiB",
        "Largest batch_size",
        "Time: ",
    ):
        assert part in printed
    assert "(estimated)" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nowhere.py", "error: nowhere.py: expected one of train_llm.py"),
        ("train_llm.py --batchsize 3", "error: wandb_config: unknown key 'batchsize'"),
        ("sft_train.py --init_from nowhere", "error: "),
        ("train_llm.py --d_model 63", "error: Impossible model configuration"),
    ],
)
def test_a_wrong_word_is_one_line(monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["plan.py", *words.split()])
    with pytest.raises(SystemExit, match=message):
        plan.main()
    assert capsys.readouterr().out == ""  # nothing was planned before
