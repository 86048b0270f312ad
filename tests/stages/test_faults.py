"""Kills, full disks, damaged checkpoints, numbers that are not finite. The long version is
benchmarks/fault_injection.py, which the first test runs with few faults.
"""

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tiny import assert_same_run, crash_after, dpo_config, pretrain_config, sft_config

import dpo_train
import sft_train
import train_data
import train_llm
from engine.checkpoint import find_damage, list_checkpoints
from engine.steps import NumericalError, StepSampler
from train_llm import train

ROOT = Path(__file__).parent.parent
STAGES = {
    "pretrain": (train_llm, train_llm.train, pretrain_config),
    "sft": (sft_train, sft_train.train_sft, sft_config),
    "dpo": (dpo_train, dpo_train.train_dpo, dpo_config),
}


def step_names(run_folder) -> list[str]:
    return [path.name for path in list_checkpoints(Path(run_folder))]


def test_killed_runs_and_runs_on_a_full_disk_end_bit_equal_to_undisturbed_ones(tmp_path):
    script = ROOT / "benchmarks" / "fault_injection.py"
    command = [sys.executable, str(script), "--kills", "4", "--seed", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    for stage in STAGES:
        kills = [int(row[3]) for row in rows if row[:2] == [stage, "kill"]]
        assert sum(kills) == 4
        full = {row[2] for row in rows if row[:2] == [stage, "disk full"]}
        assert {"data preparation", "checkpoint", "final save"} <= full
    assert all(row[3] == row[6] for row in rows), "as many bit-equal as faults"


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_run_with_a_damaged_newest_checkpoint_ends_bit_equal(
    tmp_path, monkeypatch, capsys, damage
):
    config = pretrain_config(tmp_path, dropout=0.1, num_epochs=1)
    straight = train(wandb_config=config, run_name="straight")
    with monkeypatch.context() as patch:
        crash_after(patch, train_llm, 11)
        with pytest.raises(InterruptedError):
            train(wandb_config=config, run_name="run")
    run_folder = tmp_path / "checkpoints" / "pretrain" / "run"
    path = list_checkpoints(run_folder)[-1] / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 4
    path.write_bytes(data if damage == "flip" else data[:-1000])
    resumed = train(wandb_config=config, run_name="run")
    printed = capsys.readouterr().out
    assert f"Skipping {path.parent}: model.safetensors is damaged" in printed
    assert f"Resuming {run_folder} at step 4." in printed
    assert_same_run(resumed, straight)
    assert step_names(run_folder) == step_names(Path(straight).parent)
    assert not any(map(find_damage, list_checkpoints(run_folder)))


def test_a_checkpoint_before_a_damaged_one_is_kept_though_older(tmp_path, monkeypatch):
    config = pretrain_config(tmp_path, keep_checkpoints=1, eval_every=0)

    def crash(at: int, **changes):
        with monkeypatch.context() as patch:
            crash_after(patch, train_llm, at)
            with pytest.raises(InterruptedError):
                train(wandb_config=config | changes, run_name="run")

    run_folder = tmp_path / "checkpoints" / "pretrain" / "run"
    crash(9, save_every=8)
    (run_folder / "step_00000008" / "state.json").write_text("")
    crash(5)
    assert step_names(run_folder) == ["step_00000004"]


def test_a_run_killed_before_its_run_json_was_whole_can_start_again(tmp_path):
    config = pretrain_config(tmp_path, max_steps=1)
    run_folder = tmp_path / "checkpoints" / "pretrain" / "run"
    run_folder.mkdir(parents=True)
    (run_folder / ".lock").touch()
    (run_folder / "run.json.tmp").write_text('{"d_mod')
    train(wandb_config=config, run_name="run")
    assert json.loads((run_folder / "run.json").read_text(encoding="utf-8"))["max_steps"] == 1
    assert not list(run_folder.glob("*.tmp"))


def test_two_runs_that_prepare_the_same_data_do_it_once(tmp_path, monkeypatch):
    config = pretrain_config(tmp_path)
    arguments = (None, config["dataset"], 32, 300, 0.05, str(tmp_path / "cache"))
    real, written, rows = train_data._write_rows, [], []
    other = threading.Thread(
        target=lambda: rows.append(train_data.prepare_data(*arguments)[0]["train"])
    )

    def write(*these):
        written.append(1)
        if len(written) == 1:
            other.start()
            other.join(timeout=1)  # long enough to get in the way, if nothing held it back
        real(*these)

    monkeypatch.setattr(train_data, "_write_rows", write)
    rows.append(train_data.prepare_data(*arguments)[0]["train"])
    other.join()
    assert len(written) == 1
    assert rows[0].to_list() == rows[1].to_list()


def ruin(monkeypatch, module, at: int, what: str, value: float):
    """Make a gradient, before a stage's update, or a weight, after it, inf or NaN."""
    real, done = module.optimizer_step, []

    def step(model, *arguments):
        done.append(1)
        weight = model.lm_head.weight
        if len(done) == at and what == "gradient":
            weight.grad[0, 0] = value
        norm = real(model, *arguments)
        if len(done) == at and what == "weight":
            torch.nn.init.constant_(weight, value)
        return norm

    monkeypatch.setattr(module, "optimizer_step", step)


def stopped(tmp_path, stage: str, base_model: str, **changes) -> tuple[str, list[str]]:
    """(the error, the checkpoints left) of a run that stops for its numbers."""
    _, function, make_config = STAGES[stage]
    config = make_config(tmp_path, *([] if stage == "pretrain" else [base_model]), **changes)
    with pytest.raises(NumericalError) as caught:
        function(wandb_config=config, run_name="run")
    return str(caught.value), step_names(tmp_path / "checkpoints" / stage / "run")


SMALL = {"batch_size": 2, "num_epochs": 3, "gradient_accumulation_steps": 1}


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_not_finite_at_a_save_stop_the_run_before_it(
    tmp_path, base_model, monkeypatch, stage, value
):
    ruin(monkeypatch, STAGES[stage][0], 8, "gradient", value)
    message, checkpoints = stopped(tmp_path, stage, base_model, **SMALL)
    assert f"Stopped at step 8: the gradient norm of step 8 is {value}" in message
    assert "the last good checkpoint is" in message
    assert checkpoints == ["step_00000004"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_step_that_ruined_a_run_is_named_with_its_rows_though_not_logged(
    tmp_path, base_model, monkeypatch, stage
):
    samplers = []
    real = StepSampler.__init__

    def keep(self, *arguments, **options):
        real(self, *arguments, **options)
        samplers.append(self)

    monkeypatch.setattr(StepSampler, "__init__", keep)
    ruin(monkeypatch, STAGES[stage][0], 6, "gradient", float("inf"))
    message, checkpoints = stopped(tmp_path, stage, base_model, log_every=5, **SMALL)
    rows = ", ".join(map(str, samplers[0].step_rows(5)))
    assert "Stopped at step 8: the gradient norm of step 6 is inf" in message
    assert f"Training rows of step 6: {rows}." in message
    assert re.search(r"the last good checkpoint is \S+step_00000004\)", message)
    assert checkpoints == ["step_00000004"]


def test_a_loss_not_finite_names_its_rows(tmp_path, base_model, monkeypatch):
    ruin(monkeypatch, train_llm, 6, "weight", float("nan"))
    message, _ = stopped(tmp_path, "pretrain", base_model)
    assert re.search(r"step 7: the loss is nan .* Training rows of step 7: \d+, \d+", message)


@pytest.mark.parametrize("eval_every", [0, 4])
def test_weights_not_finite_are_never_saved(tmp_path, base_model, monkeypatch, eval_every):
    ruin(monkeypatch, train_llm, 8, "weight", float("nan"))
    message, checkpoints = stopped(tmp_path, "pretrain", base_model, eval_every=eval_every)
    found = "the loss is nan" if eval_every else "its weights are not finite"  # validation's loss
    assert re.search(f"step 8: {found} .*step_00000004", message)
    assert checkpoints == ["step_00000004"]
