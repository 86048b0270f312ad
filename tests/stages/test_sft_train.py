import json
import signal
from pathlib import Path

import pytest
import torch
from tiny import (
    after_step,
    assert_same_run,
    crash_after,
    logged,
    no_training,
    peer,
    sft_config,
    trl_sft_trainer,
    weights,
    write_corpus,
    write_jsonl,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from corpus.records import to_messages
from models import CustomLLM
from sft_data import prepare_sft_data
from sft_train import DEFAULTS, mix_in_pretraining, train_sft


@pytest.mark.slow
def test_a_run_learns_and_its_chat_model_knows_its_template_and_where_to_stop(
    tmp_path, base_model, capsys
):
    config = sft_config(tmp_path, base_model, num_epochs=25, learning_rate=1e-2)
    final = train_sft(wandb_config=config)
    validation = [value for _, name, value in logged(final) if name == "val/loss"]
    assert validation[-1] < validation[0] - 0.5
    printed = capsys.readouterr().out
    assert f"Starting from {base_model}" in printed
    assert "Before fine-tuning:" in printed
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert tokenizer.eos_token == "<|im_end|>"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "问1：天地玄黄？"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    model = AutoModelForCausalLM.from_pretrained(final)
    output = model.generate(**prompt, max_new_tokens=60, do_sample=False)
    assert output[0, -1] == tokenizer.eos_token_id
    assert output.shape[1] < prompt["input_ids"].shape[1] + 60


@pytest.mark.slow
@pytest.mark.parametrize("crash_at", [3, 7])
def test_a_crashed_run_resumes_bit_equal(tmp_path, base_model, crash_at):
    for name in ("straight", "crashed"):
        (tmp_path / name).mkdir()
    changes = {"dropout": 0.1, "num_epochs": 3, "batch_size": 2}
    straight = train_sft(wandb_config=sft_config(tmp_path / "straight", base_model, **changes))
    with crash_after(crash_at):
        train_sft(wandb_config=sft_config(tmp_path / "crashed", base_model, **changes))
    resumed = train_sft(wandb_config=sft_config(tmp_path / "crashed", base_model, **changes))
    assert_same_run(resumed, straight)


@pytest.mark.slow
def test_many_small_micro_batches_train_as_one_big_batch(tmp_path, base_model):
    def losses(**changes):
        output = str(tmp_path / str(changes["batch_size"]))
        config = sft_config(tmp_path, base_model, **changes, output_dir=output, eval_every=0)
        final = train_sft(wandb_config=config)
        return [value for _, name, value in logged(final) if name == "train/loss"]

    big = losses(batch_size=4, gradient_accumulation_steps=1)
    small = losses(batch_size=1, gradient_accumulation_steps=4)
    assert len(big) == len(small) > 2
    assert big == pytest.approx(small, abs=1e-5)


def test_a_signal_saves_and_exits_with_0(tmp_path, base_model, capsys):
    stops = after_step(1, lambda _: signal.raise_signal(signal.SIGTERM))
    with stops, pytest.raises(SystemExit) as stopped:
        train_sft(wandb_config=sft_config(tmp_path, base_model))
    assert stopped.value.code == 0
    assert "Stopped by SIGTERM" in capsys.readouterr().out


def test_the_newest_pretrained_model_is_taken_and_named(tmp_path, base_model, capsys):
    config = sft_config(tmp_path, base_model, max_steps=1)
    config["output_dir"] = str(Path(base_model).parents[2])
    del config["init_from"]
    train_sft(wandb_config=config)
    assert f"Starting from {base_model}" in capsys.readouterr().out


def test_without_a_pretrained_model_one_error_names_the_command(tmp_path):
    config = sft_config(tmp_path, "", init_from=None)
    with pytest.raises(
        ValueError, match=r"No finished pretrain run .* `python train_llm\.py` first"
    ):
        train_sft(wandb_config=config)


@pytest.mark.slow
def test_any_qwen3_folder_can_be_fine_tuned(tmp_path, tokenizer):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "qwen")
    tokenizer.save_pretrained(tmp_path / "qwen")
    final = train_sft(wandb_config=sft_config(tmp_path, str(tmp_path / "qwen"), max_steps=2))
    assert AutoModelForCausalLM.from_pretrained(final).config.head_dim == 16


@pytest.mark.slow
def test_pretraining_text_is_mixed_in_by_its_share_of_rows(tmp_path, base_model):
    config = DEFAULTS | sft_config(tmp_path, base_model, pretrain_mix_ratio=0.5, seed=1)
    config["pretrain_dataset"] = write_corpus(tmp_path, count=200)
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    rows, _ = prepare_sft_data(tokenizer, config["dataset"], 64, cache_dir=str(tmp_path / "cache"))
    mixed = mix_in_pretraining(rows, config)
    assert len(mixed) == 2 * len(rows)
    assert mixed[len(rows)]["labels"] == mixed[len(rows)]["input_ids"]
    assert mixed.info.description != rows.info.description
    final = train_sft(wandb_config=config | {"max_steps": 2})
    assert weights(final)
    with pytest.raises(ValueError, match="pretrain_mix_ratio=1 must be below 1"):
        train_sft(wandb_config=config | {"pretrain_mix_ratio": 1})


def test_bad_data_stops_before_training(tmp_path, base_model):
    config = sft_config(tmp_path, base_model)
    Path(config["dataset"]).write_text('{"body": "问"}\n', encoding="utf-8")
    found = r"sft\.jsonl:1: no SFT record; found keys \['body'\]; accepted: "
    with no_training(), pytest.raises(ValueError, match=found):
        train_sft(wandb_config=config)
    with no_training(), pytest.raises(ValueError, match="nowhere"):
        train_sft(wandb_config=config, data_path="nowhere.jsonl")


def test_answers_to_one_question_cannot_be_validated_and_stop_before_training(tmp_path, base_model):
    config = sft_config(tmp_path, base_model)
    answers = ({"instruction": "问", "response": f"答{i}"} for i in range(5))
    write_jsonl(Path(config["dataset"]), answers)
    found = r"sft\.jsonl: every usable record asks the same question.* one other question\.$"
    with no_training(), pytest.raises(ValueError, match=found):
        train_sft(wandb_config=config)


@pytest.mark.peer
def test_the_loss_equals_trls(tmp_path, base_model):
    peer("trl")
    config = sft_config(tmp_path, base_model)
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    tokenizer.eos_token = "<|im_end|>"
    rows, collate = prepare_sft_data(
        tokenizer, config["dataset"], 256, None, cache_dir=str(tmp_path / "cache")
    )
    batch = collate([*rows["train"], *rows["validation"]])
    model = CustomLLM.from_pretrained(base_model, dtype=torch.float32).eval()
    ours = model(**batch).loss.item()

    lines = Path(config["dataset"]).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    trainer = trl_sft_trainer(
        tmp_path / "trl",
        base_model,
        tokenizer,
        [to_messages(record) for record in records],
        assistant_only_loss=True,
        max_length=256,
        per_device_train_batch_size=len(records),
    )
    theirs = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    with torch.no_grad():
        assert ours == pytest.approx(float(trainer.compute_loss(trainer.model, theirs)), abs=1e-5)
