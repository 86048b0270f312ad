import json
import re
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import CPU, cpu_runtime, tiny_model

from corpus.packing import PackedCollator
from engine.meter import Meter, active_parameters, flops_per_token, log_line
from engine.report import Log, describe_run, step_metrics
from engine.runs import Run
from engine.steps import StepSampler, count_targets, output_sums

LINE = {
    "train/loss": 2.5,
    "train/learning_rate": 1e-4,
    "train/grad_norm": 0.5,
    "train/epoch": 0.25,
    "train/tokens_per_second": 12345.6,
    "train/mfu": 0.4,
    "train/eta_seconds": 3723,
    "memory/allocated_gib": 1.0,
    "memory/peak_gib": 2.0,
}


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def make_log(folder, rt=None):
    loader = SimpleNamespace(start_step=2, total_steps=10)
    every = {f"{name}_every": "auto" for name in ("log", "eval", "sample", "save")}
    every |= {"trackers": [], "max_seq_len": 32}
    return Log(Run(folder), "project", every, rt or cpu_runtime(), tiny_model(), loader, 1000)


# --- the log ----------------------------------------------------------------------------------


def test_the_log_prints_what_it_writes(tmp_path, capsys):
    with make_log(tmp_path) as log:
        log.count(600)
        log.train(LINE, 3, " | and more")
        log.validation({"val/loss": 1.0, "val/bits_per_byte": 0.5}, 5)
        log.samples(["问\n"], ["\n答\n案"], 5)
    log.draw()
    log.finish()
    printed = capsys.readouterr().out
    assert re.search(r"^step 3/10 \| epoch 0\.25 \| loss 2\.5000 .* \| and more$", printed, re.M)
    assert "\nstep 5 | validation: loss 1.0000 | bits per byte 0.5000\n" in printed
    assert "\n  问 ⇒ 答 案\n" in printed
    train, validation, samples = lines(tmp_path)
    assert (train["step"], train["train/loss"], train["train/tokens_seen"]) == (3, 2.5, 1600)
    assert validation == {"step": 5, "val/loss": 1.0, "val/bits_per_byte": 0.5}
    assert samples == {"step": 5, "samples": [["问\n", "\n答\n案"]]}
    assert log.state()["tokens_seen"] == 1600
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_other_ranks_write_and_print_nothing_and_count_all_the_same(tmp_path, capsys):
    with make_log(tmp_path, replace(cpu_runtime(), rank=1)) as log:
        log.count(600)
        log.train(LINE, 3)
        log.validation({"val/loss": 1.0}, 3)
        log.samples(["a"], ["b"], 3)
    log.draw()
    log.finish()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""
    assert log.state() == {"tokens_seen": 1600, "tracker_ids": {}}


def test_a_token_costs_each_card_its_share_of_the_flops(tmp_path):
    alone, shared = (make_log(tmp_path, replace(cpu_runtime(), rank=1, world=n)) for n in (1, 4))
    assert alone.meter.flops == flops_per_token(tiny_model(), 32) == 4 * shared.meter.flops


def test_a_run_is_described_by_its_whole_configuration_and_what_it_comes_to():
    config = {"seed": 1, "batch_size": 2, "gradient_accumulation_steps": 3, "num_epochs": 2}
    config |= {"max_steps": 0, "scale_learning_rate": False}
    config |= {"optimizer": "muon", "learning_rate": 5e-4, "muon_learning_rate": 2e-3}
    model = tiny_model()
    loader = SimpleNamespace(order=StepSampler(20, config), row_length=16, tokens_per_step=96)
    described = describe_run(config, model, loader, cpu_runtime(torch.bfloat16))
    assert all(f"\n  {key}: {value}\n" in described for key, value in config.items())
    count = sum(p.numel() for p in model.parameters())
    assert described.endswith(
        f"Model: {count:,} parameters ({count:,} active per token), bfloat16 on cpu; up to 96 "
        "tokens per step, 4 steps per epoch, 8 steps in all.\n"
        "Peak learning rate 0.0005, Muon 0.002."
    )


# --- a step's numbers -------------------------------------------------------------------------


def moe_micro_batches() -> list[dict]:
    """Four, of different numbers of rows and of real tokens."""
    draw, collate, batches = np.random.default_rng(0), PackedCollator(16, 0), []
    for lengths in ([16, 3, 9], [4], [16, 16, 16, 12], [2, 7]):
        rows = [
            {"input_ids": draw.integers(1, 64, n), "position_ids": np.arange(n)} for n in lengths
        ]
        batches.append(collate(rows))
    return batches


def test_a_mixture_of_experts_reports_its_balance_over_the_whole_step():
    model, rt, batches = tiny_model(use_moe=True, moe_d_ff=16), cpu_runtime(), moe_micro_batches()
    for layer in model.model.layers:  # a router with preferences: the micro-batches differ
        torch.nn.init.normal_(layer.mlp.gate.weight)
    num_targets, num_tokens = count_targets(batches, rt)
    totals, outputs = Counter(), []
    for batch in rt.accumulate(model, batches):
        outputs.append(model(**batch, num_items_in_batch=num_targets, skip_logits=True))
        totals.update(output_sums(outputs[-1], batch))
    metrics = step_metrics(totals, num_tokens, rt)

    real = [int(batch["attention_mask"].sum()) for batch in batches]
    assert num_tokens == sum(real) == 101
    assert len(set(real)) == 4
    balances = [float(output.aux_loss.detach()) for output in outputs]
    expected = sum(b * n for b, n in zip(balances, real, strict=True)) / sum(real)
    assert metrics["train/aux_loss"] == pytest.approx(expected, rel=1e-5)
    loads = sum(o.expert_load * n for o, n in zip(outputs, real, strict=True)) / sum(real)
    assert metrics["train/max_expert_load"] == pytest.approx(float(loads.max()), rel=1e-5)
    losses = [float(output.loss.detach()) for output in outputs]
    assert metrics["train/loss"] == pytest.approx(sum(losses), rel=1e-5)

    # One forward pass over all rows meets the same tokens and sends them to the same experts.
    names = ("input_ids", "position_ids", "attention_mask")
    together = model(**{name: torch.cat([batch[name] for batch in batches]) for name in names})
    assert metrics["train/max_expert_load"] == pytest.approx(
        float(together.expert_load.max()), rel=1e-5
    )

    # Neither the last micro-batch alone nor a mean that ignores the micro-batches' sizes.
    highest = [float(output.expert_load.max()) for output in outputs]
    for name, values in (("train/aux_loss", balances), ("train/max_expert_load", highest)):
        assert abs(metrics[name] - values[-1]) > 1e-2
        assert abs(metrics[name] - sum(values) / 4) > 1e-2


def test_a_dense_model_reports_its_loss_alone_and_fp16_its_scale():
    totals = {"loss": torch.tensor(2.5)}
    assert step_metrics(totals, 10, cpu_runtime()) == {"train/loss": 2.5}
    scaled = step_metrics(totals, 10, cpu_runtime(torch.float16))
    assert scaled == {"train/loss": 2.5, "train/loss_scale": 2.0**16}


# --- speed ------------------------------------------------------------------------------------


def test_flops_count_active_weights_of_matrix_products_and_causal_attention():
    model = tiny_model(max_seq_len=32)
    weights = sum(p.numel() for p in model.parameters())
    assert flops_per_token(model, 32) == 6 * weights + 6 * 2 * 16 * 32
    assert flops_per_token(model, 8) == 6 * weights + 6 * 2 * 16 * 8, "rows shorter than a context"
    untied = tiny_model(max_seq_len=32, tie_word_embeddings=False)
    assert flops_per_token(untied, 32) == flops_per_token(model, 32)


def test_only_the_chosen_experts_are_active():
    model = tiny_model(use_moe=True, num_experts=4, top_k=1, moe_d_ff=8)
    total = sum(p.numel() for p in model.parameters())
    assert active_parameters(model) == total - 2 * 3 * (3 * 16 * 8)


def test_the_meter_counts_real_tokens_and_leaves_pauses_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    meter = Meter(1e6, start_step=2, total_steps=10, tokens_seen=1000, device=CPU)
    meter.tokens_seen += 600
    now[0] += 2
    with meter.paused("eval"):
        now[0] += 5
    now[0] += 1
    assert meter.shares() == "37.5% training, 62.5% validation and samples, 0.0% saves"
    metrics = meter.read(4)
    assert metrics["train/tokens_per_second"] == pytest.approx(200)
    assert metrics["train/tokens_seen"] == 1600
    assert metrics["train/eta_seconds"] == pytest.approx(8 / 2 * 6)
    assert metrics["memory/allocated_gib"] > 0
    meter.tokens_seen += 50
    now[0] += 1
    assert meter.read(5)["train/tokens_per_second"] == pytest.approx(50)


def test_the_log_line_shows_what_the_design_lists():
    assert log_line(LINE, 5, 20) == (
        "step 5/20 | epoch 0.25 | loss 2.5000 | lr 1.00e-04 | grad 0.50 | "
        "12,346 tok/s | mfu 40.0% | 1.00/2.00 GiB | eta 1:02:03"
    )
