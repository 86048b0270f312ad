"""benchmarks/cuda_steps.py on a CPU: a GPU machine is lent for minutes, and it must run there."""

import importlib
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels

CPU = torch.device("cpu")
PEER = "peer: Qwen3, adamw"
STAGES = (PEER, "pretrain adamw", "pretrain", "sft", "dpo", "pretrain moe")


@pytest.fixture
def cuda_steps(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("cuda_steps")


def row(cuda_steps, stage: str, mode: str = "eager"):
    return cuda_steps.Row("tiny", "none", mode, "bf16", stage)


def table(printed: str) -> list[list[str]]:
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.slow
def test_it_runs_without_datasets_and_wandb_and_prints_every_row(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['datasets'] = sys.modules['wandb'] = None\n"
    )
    options = "--device cpu --sizes tiny --steps 1 --modes eager --precisions fp16 --levels none"
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "cuda_steps.py"), *options.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    heading, _, *rows = table(done.stdout)
    assert heading[:6] == ["stage", "size", "precision", "mode", "checkpointing", "tokens/s"]
    assert [[cells[0], cells[4]] for cells in rows] == [[stage, "none"] for stage in STAGES]
    for cells in rows:
        assert cells[1:4] == ["tiny", "fp16", "eager"]
        assert 0 < float(cells[5].replace(",", "")) < math.inf
        flash = "flash_attention_for_cpu"  # ours calls it for each document
        assert cells[8] == (flash if cells[0] == PEER else f"document_attention, {flash}")
        has_peer = cells[0] == "pretrain adamw"
        assert (0 < float(cells[9]) < math.inf) if has_peer else cells[9] == ""
    assert done.stdout.splitlines()[-1] == "Left out, for lack of time: nothing."


def test_a_name_of_a_missing_package_can_stand_in_an_annotation_and_not_be_used(cuda_steps):
    package = cuda_steps.StandIn("package")
    assert package.Dataset | None
    assert not hasattr(package, "__path__")
    with pytest.raises(ImportError, match="not installed"):
        package.load_dataset("corpus")


def test_attention_that_runs_unfused_ends_the_benchmark(cuda_steps):
    step = cuda_steps.our_step(row(cuda_steps, "dpo"), CPU)
    assert cuda_steps.check_step(step) == ["document_attention", "flash_attention_for_cpu"]
    step.model.backend = replace(kernels.CPU, can_attend_by_document=lambda *_: False)
    assert cuda_steps.check_step(step) == ["flash_attention_for_cpu"]
    with sdpa_kernel(SDPBackend.MATH), pytest.raises(SystemExit, match="its unfused form"):
        cuda_steps.check_step(step)


def test_a_step_without_a_known_attention_kernel_ends_the_benchmark(cuda_steps):
    with pytest.raises(SystemExit, match="no attention kernel that is known"):
        cuda_steps.find_kernels(["aten::bmm", "aten::_softmax", "llm::document_attention_backward"])


def test_the_kernels_of_a_gpu_have_short_names(cuda_steps):
    sdpa = "aten::_scaled_dot_product_"
    events = [f"{sdpa}{kind}_attention" for kind in ("flash", "efficient", "cudnn")]
    events += ["torch_attn::_varlen_attn", f"{sdpa}flash_attention_backward"]
    short = ["cudnn_attention", "efficient_attention", "flash_attention", "varlen_attn"]
    assert cuda_steps.find_kernels(events) == short


def test_a_loss_that_is_not_finite_ends_the_benchmark(cuda_steps):
    step = cuda_steps.our_step(row(cuda_steps, "pretrain"), CPU)
    torch.nn.init.constant_(step.model.model.norm.weight, math.nan)
    with pytest.raises(SystemExit, match="loss of a step is nan"):
        cuda_steps.check_step(step)


def test_the_peer_has_our_weights_and_our_loss_without_documents(cuda_steps):
    peer = cuda_steps.peer_step(row(cuda_steps, "peer"), CPU)
    ours = cuda_steps.our_step(row(cuda_steps, "pretrain_adamw"), CPU)
    peer.model.load_state_dict(ours.model.state_dict())
    inputs = {name: peer.batch[name] for name in ("input_ids", "labels")}
    with ours.rt.autocast(), torch.no_grad():
        expected = ours.model(**inputs, skip_logits=True).loss
    assert float(peer()) == pytest.approx(float(expected), rel=1e-3)


def test_a_peer_that_does_not_compile_runs_eagerly_and_says_so(cuda_steps, monkeypatch, capsys):
    def fail(model):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch.nn.Module, "compile", fail)
    done, figures = cuda_steps.run_row(row(cuda_steps, "peer", "compiled"), CPU, 1)
    assert done.mode == "eager"
    assert figures.speed > 0
    assert "does not compile here: RuntimeError('no compiler')" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="no compiler"):  # ours must compile
        cuda_steps.run_row(row(cuda_steps, "pretrain", "compiled"), CPU, 1)


def test_a_row_that_does_not_fit_says_so_and_the_next_one_runs(cuda_steps, monkeypatch, capsys):
    def run_out_of_memory(step, steps):
        raise torch.OutOfMemoryError

    rows = [row(cuda_steps, stage) for stage in ("peer", "pretrain_adamw")]
    monkeypatch.setattr(cuda_steps, "measure", run_out_of_memory)
    assert cuda_steps.print_rows(rows, CPU, 1, math.inf) == []
    assert [cells[5:] for cells in table(capsys.readouterr().out)] == [
        ["out of memory", *4 * [""]]
    ] * 2


def test_no_row_is_started_that_would_end_too_late(cuda_steps, monkeypatch, capsys):
    stages = ("peer", "pretrain", "sft", "dpo")
    rows = [row(cuda_steps, stage) for stage in stages]
    clock = iter(range(0, 1000, 20))  # a row takes 20 s
    monkeypatch.setattr(cuda_steps.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(cuda_steps, "run_row", lambda row, device, steps: (row, None))
    left_out = cuda_steps.print_rows(rows, CPU, 1, minutes=1.5)
    assert len(table(capsys.readouterr().out)) == 2
    assert cuda_steps.describe_left_out(left_out) == (
        "Left out, for lack of time: tiny none eager bf16 (sft, dpo)."
    )
