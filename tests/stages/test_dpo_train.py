import json
import math
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import (
    after_step,
    assert_same_run,
    crash_after,
    dpo_config,
    logged,
    no_training,
    peer,
    write_conversations,
    write_jsonl,
    write_preferences,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from corpus.chat_format import as_prompt
from corpus.make_pairs import make_pairs
from dpo_data import prepare_dpo_data
from dpo_train import DEFAULTS, pair_losses, train_dpo
from engine.guards import NumericalError
from engine.preference import AnswerScorer
from engine.tracker import read_metrics
from models import CustomLLM


def metrics_of(final) -> list[dict]:
    return read_metrics(Path(final).parent / "metrics.jsonl")


@pytest.mark.slow
def test_held_out_accuracy_rises_from_one_half(tmp_path, base_model, capsys):
    config = dpo_config(tmp_path, base_model, num_epochs=6, learning_rate=5e-3)
    final = train_dpo(wandb_config=config)
    validation = [m for m in metrics_of(final) if "val/rewards/accuracies" in m]
    assert validation[0]["step"] == 0
    assert validation[0]["val/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert validation[0]["val/rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert validation[-1]["val/rewards/accuracies"] > 0.8
    assert validation[-1]["val/loss"] < 0.6
    first = next(m for m in metrics_of(final) if m["step"] == 1)
    for name in ("rewards/chosen", "rewards/rejected", "logps/rejected", "kl/chosen"):
        assert name in first
    assert type(AutoModelForCausalLM.from_pretrained(final)).__name__ == "Qwen3ForCausalLM"
    assert AutoTokenizer.from_pretrained(final).eos_token == "<|im_end|>"
    assert "Before preference optimization" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("crash_at", [3, 7])
def test_a_crashed_run_resumes_bit_equal(tmp_path, base_model, crash_at):
    for name in ("straight", "crashed"):
        (tmp_path / name).mkdir()
    changes = {"dropout": 0.1, "batch_size": 2}
    straight = train_dpo(wandb_config=dpo_config(tmp_path / "straight", base_model, **changes))
    with crash_after(crash_at):
        train_dpo(wandb_config=dpo_config(tmp_path / "crashed", base_model, **changes))
    resumed = train_dpo(wandb_config=dpo_config(tmp_path / "crashed", base_model, **changes))
    assert_same_run(resumed, straight)


@pytest.mark.slow
def test_many_small_micro_batches_train_as_one_big_batch(tmp_path, base_model):
    def losses(batch_size, accumulation):
        config = dpo_config(tmp_path, base_model, batch_size=batch_size, eval_every=0)
        config |= {"gradient_accumulation_steps": accumulation}
        config |= {"output_dir": str(tmp_path / str(batch_size)), "learning_rate": 1e-3}
        final = train_dpo(wandb_config=config)
        return [value for _, name, value in logged(final) if name in ("train/loss", "kl/chosen")]

    big, small = losses(8, 1), losses(2, 4)
    assert len(big) == len(small) > 6
    assert big == pytest.approx(small, abs=1e-5)


@pytest.mark.slow
def test_the_reference_is_computed_once_and_again_when_weights_or_data_change(
    tmp_path, base_model, capsys
):
    def computes(run_name: str, reference: str | None = None) -> bool:
        train_dpo(wandb_config=config, run_name=run_name, reference_model_path=reference)
        printed = capsys.readouterr().out
        named = f"Computing the reference's log-probabilities with {reference or base_model} …"
        assert printed.count("Computing the reference's") == printed.count(named)
        return named in printed

    def caches() -> set:
        return set((tmp_path / "checkpoints" / "cache").glob("reference-*"))

    config = dpo_config(tmp_path, base_model, max_steps=1)
    assert computes("one")
    [first] = caches()
    assert {path.name for path in first.iterdir()} == {"train.npy", "validation.npy"}
    written = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert not computes("two")
    assert computes("three", str(tmp_path / "checkpoints" / "dpo" / "one" / "final"))
    assert len(caches()) == 2
    other = shutil.copytree(base_model, tmp_path / "other")
    sizes = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(sizes | {"rms_norm_eps": 1e-3}))
    assert computes("other", other), "the same weights compute something else"
    assert len(caches()) == 3
    write_preferences(tmp_path, count=41)
    assert computes("four")
    assert len(caches()) == 4
    assert written == {path: path.stat().st_mtime_ns for path in first.iterdir()}


@pytest.mark.slow
def test_another_reference_gives_a_margin_at_the_start(tmp_path, base_model):
    config = dpo_config(tmp_path, base_model, learning_rate=1e-2)
    trained = train_dpo(wandb_config=config, run_name="trained")
    final = train_dpo(wandb_config=config, run_name="other", reference_model_path=trained)
    assert abs(metrics_of(final)[0]["val/rewards/margins"]) > 1e-3


@pytest.mark.slow
def test_a_learning_rate_that_breaks_the_model_warns_saves_and_stops(tmp_path, base_model, capsys):
    changes = {"learning_rate": 0.5, "eval_every": 1, "save_every": 0, "max_steps": 4}
    config = dpo_config(tmp_path, base_model, **changes)
    train_dpo(wandb_config=config, run_name="warned")
    printed = capsys.readouterr().out
    assert printed.count("WARNING: chosen answers of the validation set") == 1
    assert "Lower learning_rate, raise beta, or set rpo_alpha" in printed
    with pytest.raises(NumericalError, match=r"by stop_on_collapse; saved .*step_0000000\d"):
        train_dpo(wandb_config=config | {"stop_on_collapse": True}, run_name="stopped")


def test_a_signal_saves_and_exits_with_0(tmp_path, base_model, capsys):
    stops = after_step(1, lambda _: signal.raise_signal(signal.SIGTERM))
    with stops, pytest.raises(SystemExit) as stopped:
        train_dpo(wandb_config=dpo_config(tmp_path, base_model))
    assert stopped.value.code == 0
    assert "Stopped by SIGTERM" in capsys.readouterr().out


def test_bad_input_stops_before_training(tmp_path, base_model):
    config = dpo_config(tmp_path, base_model)
    with no_training(), pytest.raises(ValueError, match="beta=0 must be above 0"):
        train_dpo(wandb_config=config | {"beta": 0})
    with no_training(), pytest.raises(ValueError, match="No finished sft run"):
        train_dpo(wandb_config=config | {"init_from": None})
    Path(config["dataset"]).write_text('{"instruction": "问", "chosen": "好"}\n', encoding="utf-8")
    found = r"dpo\.jsonl:1: .*found keys \['chosen', 'instruction'\]"
    with no_training(), pytest.raises(ValueError, match=found):
        train_dpo(wandb_config=config)


def test_pairs_of_one_question_cannot_be_validated_and_stop_before_training(tmp_path, base_model):
    config = dpo_config(tmp_path, base_model)
    answers = ({"instruction": "问", "chosen": f"好{i}", "rejected": f"坏{i}"} for i in range(5))
    write_jsonl(Path(config["dataset"]), answers)
    found = r"dpo\.jsonl: every usable record asks the same question.* one other question\.$"
    with no_training(), pytest.raises(ValueError, match=found):
        train_dpo(wandb_config=config)


def test_pairs_are_made_from_the_models_own_answers_and_go_on_where_they_stopped(
    tmp_path, base_model
):
    prompts = write_conversations(tmp_path, count=5)
    whole, half = tmp_path / "whole.jsonl", tmp_path / "half.jsonl"
    make_pairs(base_model, prompts, str(whole), max_new_tokens=8)
    lines = whole.read_text(encoding="utf-8").splitlines(keepends=True)
    records = [json.loads(line) for line in lines]
    answers = {
        record["instruction"]: record["response"]
        for record in map(json.loads, Path(prompts).read_text(encoding="utf-8").splitlines())
    }
    assert records
    for record in records:
        assert record["chosen"] == answers[record["instruction"]] != record["rejected"]
    half.write_text("".join(lines[:2]) + lines[2][:10], encoding="utf-8")
    make_pairs(base_model, prompts, str(half), max_new_tokens=8)
    assert half.read_text(encoding="utf-8") == whole.read_text(encoding="utf-8")


def test_a_prompt_that_fills_the_context_makes_no_pair(tmp_path, base_model, capsys):
    records = [{"instruction": text, "output": "答"} for text in ("天地玄黄" * 500, "问")]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", records)
    make_pairs(base_model, prompts, str(tmp_path / "made.jsonl"), max_new_tokens=8)
    assert "1 prompt fills the model's context" in capsys.readouterr().out
    made = (tmp_path / "made.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["instruction"] for line in made] == ["问"]


def test_pairs_that_were_made_are_never_lost_and_other_files_refused(tmp_path, base_model):
    prompts = write_conversations(tmp_path, count=1)
    [prompt] = map(json.loads, Path(prompts).read_text(encoding="utf-8").splitlines())
    made = tmp_path / "made.jsonl"
    # A line separator inside a text is no end of a line, and what follows it is kept.
    pair = {"instruction": prompt["instruction"], "chosen": "一\u2028二", "rejected": "三"}
    made.write_text(json.dumps(pair, ensure_ascii=False) + "\n", encoding="utf-8")
    before = made.read_bytes()
    make_pairs(base_model, prompts, str(made))
    assert made.read_bytes() == before
    for line in ('{"text": "字"}\n{"te', "[1]\n"):
        made.write_text(line, encoding="utf-8")
        with pytest.raises(ValueError, match=r"made\.jsonl:1: no pair that was made here"):
            make_pairs(base_model, prompts, str(made))
        assert made.read_text(encoding="utf-8") == line
    with pytest.raises(ValueError, match=r"--output .*\.txt: pairs are JSON lines"):
        make_pairs(base_model, prompts, str(tmp_path / "made.txt"))


@pytest.mark.slow
def test_the_command_makes_pairs_and_prints_one_line_for_errors(run_script, base_model, tmp_path):
    prompts = write_conversations(tmp_path, count=1)
    made = run_script("dpo_data.py", "--make_pairs", prompts, "--model", base_model)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "pairs.jsonl").exists()
    failed: subprocess.CompletedProcess = run_script("dpo_data.py", "--inspect")
    assert failed.returncode == 1
    assert failed.stderr.strip().splitlines()[-1].startswith("error: No finished sft run")


@pytest.mark.peer
def test_loss_rewards_and_gradients_equal_trls(tmp_path, base_model):
    trl = peer("trl")
    config = dpo_config(tmp_path, base_model)
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    tokenizer.eos_token = "<|im_end|>"
    splits, collate = prepare_dpo_data(
        tokenizer, config["dataset"], 256, None, cache_dir=str(tmp_path / "cache")
    )
    pairs = [*splits["train"], *splits["validation"]]
    torch.manual_seed(0)
    reference = CustomLLM.from_pretrained(base_model, dtype=torch.float32).eval()
    policy = CustomLLM.from_pretrained(base_model, dtype=torch.float32).eval()
    for parameter in policy.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    policy.save_pretrained(tmp_path / "policy")
    batch = collate(pairs)
    with torch.no_grad():
        batch["reference_logps"] = AnswerScorer(reference)(**batch).view(-1, 2)
    options = DEFAULTS | {"beta": 0.3}
    losses, sums = pair_losses(AnswerScorer(policy)(**batch), batch, options)
    losses.mean().backward()

    lines = Path(config["dataset"]).read_text(encoding="utf-8").splitlines()
    records = [  # as text, to which TRL adds the end token: its chat format adds a newline more
        {
            "prompt": as_prompt(tokenizer, r["instruction"]),
            "chosen": r["chosen"],
            "rejected": r["rejected"],
        }
        for r in map(json.loads, lines)
    ]
    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "trl"),
            beta=0.3,
            max_length=256,
            per_device_train_batch_size=len(records),
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(records),
        processing_class=tokenizer,
    )
    theirs = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, theirs)
    loss.backward()
    assert losses.mean().item() == pytest.approx(loss.item(), abs=1e-5)
    logged_rewards = trainer._metrics["eval" if not trainer.model.training else "train"]
    chosen = logged_rewards["rewards/chosen"][-1]
    assert float(sums["rewards/chosen"]) / len(pairs) == pytest.approx(chosen, abs=1e-5)
    peers = dict(trainer.model.named_parameters())
    for name, parameter in policy.named_parameters():
        assert torch.allclose(parameter.grad, peers[name].grad, atol=1e-5), name
