"""A run is known by the bytes of what it was started with, wherever they lie now."""

import shutil
from pathlib import Path

import pytest
from tiny import assert_same_run, crash_after, no_training, pretrain_config, sft_config, write_jsonl

from engine.runs import RunError
from sft_train import train_sft
from train_llm import train

SFT = {"num_epochs": 1, "save_every": 2}


@pytest.mark.slow
def test_a_moved_folder_resumes_with_the_start_that_moved_along(tmp_path, base_model, capsys):
    one, two, whole = (tmp_path / name for name in ("one", "two", "whole"))
    for folder in (one, whole):
        shutil.copytree(Path(base_model).parent, folder / "checkpoints/pretrain/base")
    start = {"init_from": None, "dataset": sft_config(tmp_path, "")["dataset"]}
    expected = train_sft(wandb_config=sft_config(whole, "", **SFT) | start)
    with crash_after(3):
        train_sft(wandb_config=sft_config(one, "", **SFT) | start, run_name="talk")
    one.rename(two)
    config = sft_config(two, "", **SFT) | start
    final = train_sft(wandb_config=config, run_name="talk")
    assert "Resuming" in capsys.readouterr().out
    assert_same_run(final, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["named", None])
def test_the_same_data_elsewhere_resume_the_run_with_or_without_its_name(tmp_path, capsys, name):
    config = pretrain_config(tmp_path)
    with crash_after(6):
        train(wandb_config=config, run_name=name)
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(config["dataset"], tmp_path / "elsewhere/other.jsonl")
    final = train(wandb_config=config | {"dataset": str(moved)}, run_name=name)
    assert "Resuming" in capsys.readouterr().out
    assert len(list((tmp_path / "checkpoints/pretrain").iterdir())) == 1
    assert Path(final).exists()


@pytest.mark.slow
def test_other_bytes_are_another_run_and_an_unfinished_one_is_spoken_of(tmp_path, capsys):
    config = pretrain_config(tmp_path, max_steps=8)
    with crash_after(6):
        train(wandb_config=config, run_name="first")
    with crash_after(1):
        train(wandb_config=config | {"learning_rate": 1e-5})
    printed = capsys.readouterr().out
    first = tmp_path / "checkpoints/pretrain/first"
    assert f"Unfinished and not taken: {first} (the same bytes; learning_rate: " in printed
    assert "To take it: " in printed and " --run_name first --learning_rate " in printed
    write_jsonl(Path(config["dataset"]), [{"text": f"别的{n}"} for n in range(60)])
    with no_training(), pytest.raises(RunError, match=r"corpus\.jsonl' with other bytes"):
        train(wandb_config=config, run_name="first")
    with crash_after(1):
        train(wandb_config=config)
    assert "Resuming" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_stopped_before_its_first_checkpoint_may_have_its_data_mended(tmp_path):
    config = pretrain_config(tmp_path, num_epochs=1)
    path = Path(config["dataset"])
    good = path.read_text(encoding="utf-8")
    path.write_text(good + "{broken\n", encoding="utf-8")
    with pytest.raises(ValueError, match="broken JSON"):
        train(wandb_config=config, run_name="run")
    path.write_text(good, encoding="utf-8")
    assert Path(train(wandb_config=config, run_name="run")).exists()
