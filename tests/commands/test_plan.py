import sys

import pytest
from tiny import write_jsonl

import plan
from models import CustomLLMConfig
from plan import StepMemory, count_characters, largest_batch, on_card, read_config

SIZES = {"vocab_size": 640, "d_model": 64, "n_heads": 2, "n_layers": 2, "d_ff": 128}


def settings(script: str, **changes):
    """(configuration, model's configuration) of a stage with a tiny model."""
    config, _, _ = read_config(script, [])
    config |= {plan.STAGES[script]: 64, "gradient_accumulation_steps": 1} | changes
    use_moe = config.get("use_moe", False)
    return config, CustomLLMConfig(**SIZES, max_seq_len=128, use_moe=use_moe)


@pytest.mark.parametrize(
    ("script", "level", "changes"),
    [
        ("train_llm.py", False, {}),
        ("train_llm.py", False, {"use_moe": True, "gradient_accumulation_steps": 2}),
        ("train_llm.py", "attention", {"optimizer": "adamw", "mixed_precision": "no"}),
        ("sft_train.py", "full", {}),
        ("dpo_train.py", False, {}),
        ("dpo_train.py", "full", {"gradient_accumulation_steps": 2}),
    ],
)
def test_the_planned_peak_is_that_of_a_real_step_to_the_byte(script, level, changes):
    config, model_config = settings(script, **changes)
    planned = StepMemory(script, config, model_config).peak(4, level)
    real = StepMemory(script, config, model_config, fake=False).peak(4, level)
    assert planned == real
    assert planned["total"] > 4 * planned["param"] / 2


def test_the_largest_batch_fits_and_a_twentieth_more_does_not():
    config, model_config = settings("train_llm.py")
    memory = StepMemory("train_llm.py", config, model_config)
    sizes = [largest_batch(memory, level, 3.0) for level in plan.LEVELS]
    assert sizes[0] < sizes[1] <= sizes[2]
    for size, level in zip(sizes, plan.LEVELS, strict=True):
        assert on_card(memory.peak(size, level)["total"]) <= 3.0
        assert on_card(memory.peak(size + max(1, size // 20), level)["total"]) > 3.0
        assert memory.peak_of_backward(size, level) == memory.peak(size, level)["total"]


def test_losses_and_attention_are_as_before_after_planning():
    from kernels.masks import IN_BLOCKS

    from kernels.cross_entropy import LOGITS_BUDGET, SKIPS_IGNORED, SOFTMAX_BUDGET

    before = dict(LOGITS_BUDGET), dict(SOFTMAX_BUDGET), set(SKIPS_IGNORED), set(IN_BLOCKS)
    with plan.as_on_a_gpu():
        assert LOGITS_BUDGET["cpu"] == LOGITS_BUDGET["cuda"]
        assert not (SOFTMAX_BUDGET or SKIPS_IGNORED or IN_BLOCKS)
    assert before == (LOGITS_BUDGET, SOFTMAX_BUDGET, SKIPS_IGNORED, IN_BLOCKS)


def test_characters_are_counted_and_a_large_corpus_is_estimated(tmp_path, monkeypatch):
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"text": f"{i:04d}" + "天地玄黄" * 9} for i in range(200)]
    )
    assert count_characters("train_llm.py", path) == 200 * 40
    monkeypatch.setattr(plan, "READ_AT_MOST", 1000)
    assert count_characters("train_llm.py", path) == pytest.approx(200 * 40, rel=0.2)
    pairs = write_jsonl(tmp_path / "b.jsonl", [{"messages": [{"role": "user", "content": "天地"}]}])
    assert count_characters("sft_train.py", pairs) == len("user天地")


def test_the_command_prints_a_plan_for_a_changed_key(monkeypatch, capsys, tmp_path):
    text = write_jsonl(tmp_path / "a.jsonl", [{"text": "天地玄黄" * 9}])
    words = "--d_model 32 --n_heads 2 --n_layers 1 --d_ff 64 --max_seq_len 32 --vocab_size 320"
    arguments = ["plan.py", "train_llm.py", *words.split(), "--dataset", text]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(plan, "LEVELS", (False,))
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
