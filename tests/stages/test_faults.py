"""Kills, full disks, damaged checkpoints, numbers that are not finite. The long version is
benchmarks/fault_injection.py, which the first test runs with few faults.
"""

import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from filelock import FileLock
from tiny import (
    after_step,
    assert_same_run,
    before_forward,
    crash_after,
    dpo_config,
    no_training,
    pretrain_config,
    sft_config,
)

from dpo_train import train_dpo
from engine.checkpoint import find_damage, list_checkpoints
from engine.guards import NumericalError
from engine.steps import StepSampler
from sft_train import train_sft
from train_data import prepare_data
from train_llm import train

STAGES: dict = {
    "pretrain": (train, lambda folder, _, **changes: pretrain_config(folder, **changes)),
    "sft": (train_sft, sft_config),
    "dpo": (train_dpo, dpo_config),
}


def step_names(run_folder) -> list[str]:
    return [path.name for path in list_checkpoints(Path(run_folder))]


@pytest.mark.slow
def test_killed_runs_and_runs_on_a_full_disk_end_bit_equal_to_undisturbed_ones(tmp_path):
    script = ROOT / "benchmarks" / "fault_injection.py"
    command = [sys.executable, str(script), "--kills", "3", "--seed", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    for stage in STAGES:
        kills = [int(row[3]) for row in rows if row[:2] == [stage, "kill"]]
        assert sum(kills) == 3
        full = {row[2] for row in rows if row[:2] == [stage, "disk full"]}
        assert {"data preparation", "checkpoint", "final save"} <= full
    assert all(row[3] == row[6] for row in rows), "as many bit-equal as faults"


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_run_with_a_damaged_newest_checkpoint_ends_bit_equal(tmp_path, capsys, damage):
    config = pretrain_config(tmp_path, dropout=0.1, num_epochs=1)
    straight = train(wandb_config=config, run_name="straight")
    with crash_after(11):
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


def test_a_checkpoint_before_a_damaged_one_is_kept_though_older(tmp_path):
    config = pretrain_config(tmp_path, keep_checkpoints=1, eval_every=0)
    run_folder = tmp_path / "checkpoints" / "pretrain" / "run"
    with crash_after(9):
        train(wandb_config=config | {"save_every": 8}, run_name="run")
    (run_folder / "step_00000008" / "state.json").write_text("")
    with crash_after(5):
        train(wandb_config=config, run_name="run")
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


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_whose_last_save_fails_has_its_curves_and_the_same_command_finishes_it(
    tmp_path, base_model, stage
):
    function, make_config = STAGES[stage]
    config = make_config(tmp_path, base_model, max_steps=2)
    run_folder = tmp_path / "checkpoints" / stage / "run"

    def block_the_final_folder(optimizer):
        (run_folder / "final.tmp").touch()  # a file where the folder would be made

    with after_step(2, block_the_final_folder), pytest.raises(FileExistsError):
        function(wandb_config=config, run_name="run")
    assert (run_folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (run_folder / "final").exists()
    with no_training():
        final = function(wandb_config=config, run_name="run")
    assert final == str(run_folder / "final")
    assert (run_folder / "final" / "model.safetensors").exists()
    assert not list(run_folder.glob("*.tmp"))


@pytest.mark.parametrize("trains_tokenizer", [True, False])
def test_two_runs_that_prepare_the_same_data_do_it_once(
    tmp_path, tokenizer_folder, capsys, trains_tokenizer
):
    path, cache, rows = pretrain_config(tmp_path)["dataset"], tmp_path / "cache", []

    def prepare():
        name = None if trains_tokenizer else tokenizer_folder
        rows.append(prepare_data(name, path, 32, 300, cache_dir=str(cache))[0]["train"])

    runs = [threading.Thread(target=prepare) for _ in range(2)]
    cache.mkdir()
    with FileLock(cache / ".lock"):  # so that both come before either has written anything
        for run in runs:
            run.start()
        time.sleep(0.3)
        assert all(run.is_alive() for run in runs)
        assert list(cache.iterdir()) == [cache / ".lock"]
    for run in runs:
        run.join()
    printed = capsys.readouterr().out
    assert printed.count("Training a 300-token tokenizer") == trains_tokenizer
    assert printed.count("Tokenizing") == 1
    assert rows[0].to_list() == rows[1].to_list()


def ruin_gradient(step: int, value: float):
    """Make one number of a step's gradients inf or NaN, before the update."""

    def ruin(gradient):
        gradient = gradient.clone()
        gradient[0, 0] = value
        return gradient

    return before_forward(step, lambda backbone: backbone.embed_tokens.weight.register_hook(ruin))


def ruin_weights(step: int, value: float):
    """Make a matrix inf or NaN, after a step's update."""
    return after_step(
        step,
        lambda optimizer: torch.nn.init.constant_(optimizer.param_groups[0]["params"][0], value),
    )


def stopped(tmp_path, stage: str, base_model: str, **changes) -> tuple[str, list[str]]:
    """(the error, the checkpoints left) of a run that stops for its numbers."""
    function, make_config = STAGES[stage]
    with pytest.raises(NumericalError) as caught:
        function(wandb_config=make_config(tmp_path, base_model, **changes), run_name="run")
    return str(caught.value), step_names(tmp_path / "checkpoints" / stage / "run")


SMALL = {"batch_size": 2, "num_epochs": 3, "gradient_accumulation_steps": 1}


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_not_finite_at_a_save_stop_the_run_before_it(tmp_path, base_model, stage, value):
    with ruin_gradient(8, value):
        message, checkpoints = stopped(tmp_path, stage, base_model, **SMALL)
    assert f"Stopped at step 8: the gradient norm of step 8 is {value}" in message
    assert "the last good checkpoint is" in message
    assert checkpoints == ["step_00000004"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_step_that_ruined_a_run_is_named_with_its_rows_though_not_logged(
    tmp_path, base_model, stage, capsys
):
    with ruin_gradient(6, float("inf")):
        message, checkpoints = stopped(tmp_path, stage, base_model, log_every=5, **SMALL)
    assert "Stopped at step 8: the gradient norm of step 6 is inf" in message
    [count] = re.findall(r"Data .*?([\d,]+) training \+", capsys.readouterr().out)
    sampler = StepSampler(int(count.replace(",", "")), SMALL | {"seed": 42, "max_steps": 0})
    rows = ", ".join(map(str, sampler.step_rows(6)))
    assert f"Training rows of step 6: {rows}." in message
    assert re.search(r"the last good checkpoint is \S+step_00000004\)", message)
    assert checkpoints == ["step_00000004"]


def test_a_loss_not_finite_names_its_rows(tmp_path, base_model):
    with ruin_weights(6, float("nan")):
        message, _ = stopped(tmp_path, "pretrain", base_model)
    assert re.search(r"step 7: the loss is nan .* Training rows of step 7: \d+, \d+", message)


@pytest.mark.parametrize("eval_every", [0, 4])
def test_weights_not_finite_are_never_saved(tmp_path, base_model, eval_every):
    with ruin_weights(8, float("nan")):
        message, checkpoints = stopped(tmp_path, "pretrain", base_model, eval_every=eval_every)
    found = "the loss is nan" if eval_every else "its weights are not finite"  # validation's loss
    assert re.search(f"step 8: {found} .*step_00000004", message)
    assert checkpoints == ["step_00000004"]
