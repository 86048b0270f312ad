import json
from types import SimpleNamespace

import pytest
import torch
import wandb
from test_training import tiny_model

from engine.checkpoint import Run
from engine.report import (
    Meter,
    Tracker,
    active_parameters,
    flops_per_token,
    is_logged_in,
    log_line,
    read_metrics,
    validation_line,
)


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_logged_number_is_one_json_object_a_line(tmp_path):
    tracker = Tracker(Run(tmp_path), "project", {})
    tracker.log({"train/loss": 2.5}, 1)
    tracker.log_samples(["问"], ["答"], 1, lambda text: None)
    tracker.finish()
    assert lines(tmp_path) == [
        {"step": 1, "train/loss": 2.5},
        {"step": 1, "samples": [["问", "答"]]},
    ]


def test_a_resumed_run_drops_the_lines_behind_its_checkpoint_and_a_torn_one(tmp_path):
    written = [json.dumps({"step": step, "train/loss": 1.0}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(written) + '\n{"step": 4, "tra')
    tracker = Tracker(Run(tmp_path, state={"step": 2}), "project", {})
    tracker.log({"train/loss": 9.0}, 3)
    tracker.finish()
    assert [(m["step"], m["train/loss"]) for m in lines(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 9.0)]


@pytest.mark.parametrize("missing", range(1, 21, 2))
def test_a_line_may_be_cut_anywhere_and_hold_any_character(tmp_path, missing):
    whole = (
        json.dumps({"step": 1, "samples": [["问", "a\u2028b\u0085c"]]}, ensure_ascii=False) + "\n"
    )
    torn = json.dumps({"step": 2, "samples": [["春眠不觉晓"]]}, ensure_ascii=False).encode()
    (tmp_path / "metrics.jsonl").write_bytes(whole.encode() + torn[:-missing])
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_wandb_is_offline_without_an_account_and_never_asks(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not is_logged_in()
    tracker = Tracker(Run(tmp_path), "project", {"batch_size": 2})
    tracker.log({"train/loss": 2.5}, 1)
    tracker.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("error", "cause"),
    [(OSError("no route\nto host"), "no route"), (TimeoutError(), "TimeoutError()")],
)
def test_an_unreachable_wandb_stops_no_run(tmp_path, monkeypatch, capsys, error, cause):
    real = wandb.init

    def unreachable(mode, **options):
        if mode == "online":
            raise error
        return real(mode=mode, **options)

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "init", unreachable)
    Tracker(Run(tmp_path), "project", {}).finish()
    printed = capsys.readouterr().out
    assert f"wandb cannot be reached ({cause}): logging offline." in printed
    assert printed.endswith("; wandb: offline\n")


def test_an_account_is_seen_in_the_environment_and_in_netrc(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    netrc.chmod(0o600)
    assert is_logged_in()
    netrc.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert is_logged_in()


def test_other_ranks_write_nothing(tmp_path):
    tracker = Tracker(Run(tmp_path), "project", {}, is_main=False)
    tracker.log({"train/loss": 1.0}, 1)
    tracker.log_samples(["a"], ["b"], 1, print)
    tracker.finish()
    assert not list(tmp_path.iterdir())


def test_flops_count_active_weights_of_matrix_products_and_causal_attention():
    model = tiny_model(max_seq_len=32)
    weights = sum(p.numel() for p in model.parameters())
    assert flops_per_token(model) == 6 * weights + 6 * 2 * 16 * 32
    untied = tiny_model(max_seq_len=32, tie_word_embeddings=False)
    assert flops_per_token(untied) == flops_per_token(model)


def test_only_the_chosen_experts_are_active():
    model = tiny_model(use_moe=True, num_experts=4, top_k=1, moe_d_ff=8)
    total = sum(p.numel() for p in model.parameters())
    assert active_parameters(model) == total - 2 * 3 * (3 * 16 * 8)


def test_the_meter_counts_real_tokens_and_leaves_pauses_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("engine.report.time.perf_counter", lambda: now[0])
    sampler = SimpleNamespace(total_steps=10, start_step=2)
    meter = Meter(tiny_model(), sampler, 1000, torch.device("cpu"))
    meter.count(600)
    now[0] += 2
    with meter.paused():
        now[0] += 5
    now[0] += 1
    metrics = meter.read(4)
    assert metrics["train/tokens_per_second"] == pytest.approx(200)
    assert metrics["train/tokens_seen"] == 1600
    assert metrics["train/eta_seconds"] == pytest.approx(8 / 2 * 6)
    assert metrics["memory/allocated_gib"] > 0
    meter.count(50)
    now[0] += 1
    assert meter.read(5)["train/tokens_per_second"] == pytest.approx(50)


def test_the_log_line_shows_what_the_design_lists():
    metrics = {
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
    assert log_line(metrics, 5, 20) == (
        "step 5/20 | epoch 0.25 | loss 2.5000 | lr 1.00e-04 | grad 0.50 | "
        "12,346 tok/s | mfu 40.0% | 1.00/2.00 GiB | eta 1:02:03"
    )
    line = validation_line({"val/loss": 1.0, "val/bits_per_byte": 0.5}, 5)
    assert line == "step 5 | validation: loss 1.0000 | bits per byte 0.5000"
