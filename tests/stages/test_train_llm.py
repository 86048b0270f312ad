import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import warm
from conftest import ROOT
from scripts import start
from tiny import (
    after_step,
    assert_same_run,
    crash_after,
    logged,
    no_training,
    pretrain_config,
    weights,
    write_jsonl,
)
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.checkpoint import list_checkpoints
from engine.guards import NumericalError
from engine.tracker import read_metrics
from models import Backbone
from train_llm import train


def metrics_of(final) -> list[dict]:
    return read_metrics(Path(final).parent / "metrics.jsonl")


@pytest.mark.slow
def test_a_run_learns_and_its_final_folder_is_a_plain_qwen3_checkpoint(tmp_path, capsys):
    final = train(wandb_config=pretrain_config(tmp_path, num_epochs=12, learning_rate=5e-3))
    printed = capsys.readouterr().out
    unigram = float(printed.split("token frequencies alone: ")[1].split()[0])
    validation = [value for _, name, value in logged(final) if name == "val/loss"]
    assert validation[-1] < min(unigram - 1, validation[0])
    model = AutoModelForCausalLM.from_pretrained(final)
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.generation_config.eos_token_id == sorted(
        tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    )
    run = Path(final).parent
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "<td>documents</td><td>60</td>" in report, "what the preparation counted"
    assert f"python sft_train.py --init_from {final}" in report
    assert "batch_size: 4" in printed and "tokens per step" in printed and "parameters" in printed
    assert "tok/s" in printed and "eta" in printed


def test_the_printed_configuration_shows_the_vocabulary_that_auto_came_to(tmp_path, capsys):
    final = train(wandb_config=pretrain_config(tmp_path, vocab_size="auto", max_steps=1))
    tokens = len(AutoTokenizer.from_pretrained(final))
    assert 300 < tokens <= 4096
    assert f"  vocab_size: {tokens}\n" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("crash_at", [2, 5, 11])
def test_a_crashed_run_resumes_bit_equal_with_dropout_and_workers(tmp_path, crash_at):
    for name in ("straight", "crashed"):
        (tmp_path / name).mkdir()
    changes = {"dropout": 0.1, "num_workers": 2, "num_epochs": 4}
    changes["optimizer"] = "muon" if crash_at == 5 else "adamw"
    straight = train(wandb_config=pretrain_config(tmp_path / "straight", **changes))
    with crash_after(crash_at):
        train(wandb_config=pretrain_config(tmp_path / "crashed", **changes))
    resumed = train(wandb_config=pretrain_config(tmp_path / "crashed", **changes))
    assert len(list((tmp_path / "crashed/checkpoints/pretrain").iterdir())) == 1
    assert_same_run(resumed, straight)


@pytest.mark.slow
def test_a_killed_process_resumes_bit_equal(tmp_path):
    (tmp_path / "straight").mkdir()
    config = pretrain_config(tmp_path, num_epochs=8, save_every=5, dropout=0.1, num_workers=2)
    straight = train(
        wandb_config=config | {"output_dir": str(tmp_path / "straight")}, run_name="run"
    )
    words = [word for key, value in config.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, str(ROOT / "train_llm.py"), "--run_name", "run", *words]
    metrics = tmp_path / "checkpoints/pretrain/run/metrics.jsonl"
    for kill_at in (7, 23):
        process = start(command, tmp_path)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if metrics.exists() and f'"step": {kill_at},' in metrics.read_text():
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    finished = warm.run(command, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "Resuming" in finished.stdout
    assert_same_run(str(metrics.parent / "final"), straight)
    assert not list(metrics.parent.glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_says_how_to_resume_and_exits_with_0(tmp_path, capsys, number):
    config = pretrain_config(tmp_path, eval_every=0, save_every=0)
    stops = after_step(1, lambda _: signal.raise_signal(number))
    with stops, pytest.raises(SystemExit) as stopped:
        train(wandb_config=config, run_name="run")
    assert stopped.value.code == 0
    assert f"Stopped by {number.name}" in (printed := capsys.readouterr().out)
    assert "Resume with: " in printed
    assert [p.name for p in list_checkpoints(tmp_path / "checkpoints/pretrain/run")] == [
        "step_00000001"
    ]
    resumed = train(wandb_config=config, run_name="run")
    straight = train(wandb_config=config | {"output_dir": str(tmp_path / "straight")})
    assert weights(resumed).keys() == weights(straight).keys()
    for name, tensor in weights(resumed).items():
        assert torch.equal(tensor, weights(straight)[name]), name


@pytest.mark.slow
def test_many_small_micro_batches_train_as_one_big_batch(tmp_path):
    def losses(**changes):
        output = str(tmp_path / str(changes["batch_size"]))
        config = pretrain_config(tmp_path, **changes, output_dir=output, eval_every=0)
        return [value for _, name, value in logged(train(wandb_config=config)) if "loss" in name]

    big = losses(batch_size=8, gradient_accumulation_steps=1)
    small = losses(batch_size=2, gradient_accumulation_steps=4)
    assert len(big) == len(small) > 3
    assert big == pytest.approx(small, abs=1e-5)


@pytest.mark.slow
def test_a_mixture_of_experts_trains_and_logs_its_balance(tmp_path):
    final = train(wandb_config=pretrain_config(tmp_path, use_moe=True, moe_d_ff=16))
    first = metrics_of(final)[0]
    assert first["train/aux_loss"] >= 0.99
    assert 0.25 <= first["train/max_expert_load"] <= 1
    assert type(AutoModelForCausalLM.from_pretrained(final)).__name__ == "Qwen3MoeForCausalLM"


@pytest.mark.slow
def test_the_balance_of_experts_is_logged_of_the_whole_step_and_not_of_its_last_micro_batch(
    tmp_path,
):
    """Three steps that leave the weights as they are, so that the second is as the first."""
    seen = []

    def look(module, args, output):
        if isinstance(module, Backbone) and torch.is_grad_enabled():
            (_, attention_mask, *_), (_, aux_loss, _) = args, output
            tokens = int(attention_mask.sum())
            seen.append((tokens, aux_loss.item() * tokens))

    def run(batch_size: int, micro_batches: int) -> list[dict]:
        changes: dict = {"batch_size": batch_size, "gradient_accumulation_steps": micro_batches}
        changes |= {"use_moe": True, "moe_d_ff": 16, "learning_rate": 1e-9, "max_steps": 3}
        output = str(tmp_path / f"{micro_batches} micro-batches")
        seen.clear()
        final = train(wandb_config=pretrain_config(tmp_path, **changes, output_dir=output))
        return [m for m in metrics_of(final) if "train/loss" in m]

    handle = register_module_forward_hook(look)
    try:
        whole, halves = run(8, 1), run(4, 2)
    finally:
        handle.remove()
    # A load is a mean over tokens: over two halves it is the whole's.
    loads = [[m["train/max_expert_load"] for m in metrics] for metrics in (whole, halves)]
    assert loads[1] == pytest.approx(loads[0], abs=1e-5)
    # The balancing loss is a product of two such means, and trained on in each micro-batch by
    # itself. What is logged is its mean over tokens, which is only near the whole's.
    assert len(seen) == 6
    for first, metrics in zip(range(0, 6, 2), halves, strict=True):
        tokens, sums = zip(*seen[first : first + 2], strict=True)
        assert metrics["train/aux_loss"] == pytest.approx(sum(sums) / sum(tokens), abs=1e-5)
    balances = [[m["train/aux_loss"] for m in metrics] for metrics in (whole, halves)]
    assert balances[1] == pytest.approx(balances[0], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_learning_rate_of_each_optimizer_is_logged(tmp_path, optimizer):
    changes = {"optimizer": optimizer, "learning_rate": 1e-3, "muon_learning_rate": 1e-2}
    changes |= {"warmup_ratio": 0.5, "max_steps": 4}
    metrics = metrics_of(train(wandb_config=pretrain_config(tmp_path, **changes)))
    trained = [m for m in metrics if "train/loss" in m]
    assert [m["train/learning_rate"] for m in trained[:2]] == pytest.approx([5e-4, 1e-3])
    rates = [m.get("train/muon_learning_rate") for m in trained[:2]]
    assert rates == ([None, None] if optimizer == "adamw" else pytest.approx([5e-3, 1e-2]))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(tmp_path):
    def ruin(optimizer):
        torch.nn.init.constant_(optimizer.param_groups[0]["params"][0], float("nan"))

    found = r"step 7: the loss is nan .*step_00000004"
    with after_step(6, ruin), pytest.raises(NumericalError, match=found):
        train(wandb_config=pretrain_config(tmp_path))


@pytest.mark.slow
def test_a_finished_run_is_returned_and_not_trained_again(tmp_path):
    config = pretrain_config(tmp_path)
    final = train(wandb_config=config, run_name="run")
    with no_training():
        assert train(wandb_config=config, run_name="run") == final


@pytest.mark.slow
def test_init_from_continues_with_another_models_weights_and_tokenizer(tmp_path, capsys):
    first = train(wandb_config=pretrain_config(tmp_path), run_name="first")
    config = pretrain_config(tmp_path, init_from=first, learning_rate=1e-9, num_epochs=1)
    second = train(wandb_config=config, run_name="second")
    assert "Starting from" in capsys.readouterr().out
    for name, tensor in weights(second).items():
        assert torch.allclose(tensor, weights(first)[name], atol=1e-6), name


BAD = {
    "unknown key": ({"learning_rat": 1e-3}, "unknown key 'learning_rat'.*'learning_rate'"),
    "wrong type": ({"batch_size": "many"}, "batch_size='many' must be \"auto\" or a whole number"),
    "zero": ({"batch_size": 0}, 'batch_size=0 must be "auto" or at least 1'),
    "choice": ({"mixed_precision": "fp8"}, "mixed_precision='fp8' must be one of"),
    "heads": ({"d_model": 30, "n_heads": 4}, "d_model=30 is not divisible by n_heads=4"),
    "odd head": ({"d_model": 30, "n_heads": 2}, "head_dim=15"),
    "top_k": ({"use_moe": True, "top_k": 5}, r"top_k=5 must be in 1..num_experts=4"),
    "memory": (
        {"n_layers": 10**9},
        r"n_layers=1000000000, .*: these weights take .* GiB, and this machine has",
    ),
    "no dataset": ({"dataset": "nowhere.jsonl"}, r"nowhere\.jsonl: no such file"),
    "no tokenizer": ({"tokenizer_path": "nowhere"}, "No tokenizer could be loaded from 'nowhere'"),
    "small vocabulary": ({"vocab_size": 100}, "vocab_size=100 must be at least"),
    "no model": ({"init_from": "nowhere"}, "nowhere"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_error_before_training(tmp_path, changes, message):
    with no_training(), pytest.raises(ValueError, match=message):
        train(wandb_config=pretrain_config(tmp_path) | changes)


def test_broken_data_names_file_and_line(tmp_path):
    config = pretrain_config(tmp_path)
    Path(config["dataset"]).write_text('{"text": "一"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"corpus\.jsonl:2: broken JSON"):
        train(wandb_config=config)
    write_jsonl(Path(config["dataset"]), [{"body": "一"}])
    with pytest.raises(ValueError, match=r"corpus\.jsonl:1: expected .*'body'"):
        train(wandb_config=config)


@pytest.mark.slow
def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    small = train(wandb_config=pretrain_config(tmp_path, num_epochs=1), run_name="small")
    large = train(wandb_config=pretrain_config(tmp_path, num_epochs=1, vocab_size=400))
    config = pretrain_config(tmp_path, init_from=small, tokenizer_path=large)
    with pytest.raises(
        ValueError, match=r"tokens, .* 320 .*small.*: use that folder's own tokenizer"
    ):
        train(wandb_config=config, run_name="mixed")


@pytest.mark.slow
def test_the_command_line_prints_one_line_for_bad_input_and_exits_with_1(tmp_path):
    command = [sys.executable, str(ROOT / "train_llm.py"), "--batch_siz", "3"]
    done = warm.run(command, tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: wandb_config: unknown key")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
