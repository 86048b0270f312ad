"""Two processes train as one: the same losses and weights, also when one run changes hands."""

import gc
import json
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from ranks import FUNCTIONS
from scripts import printed, start
from tiny import EXACT, crash_after, dpo_config, pretrain_config, sft_config, weights

import train_llm
from engine.tracker import read_metrics

# A launch of two processes, and runs of all stages.
pytestmark = pytest.mark.slow

NAMES = {*EXACT, "train/aux_loss", "train/max_expert_load"}


def step_of_8(config: dict, ranks: int) -> dict:
    """A step has eight rows, on however many ranks."""
    return config | {"gradient_accumulation_steps": 8 // config["batch_size"] // ranks}


def run_alone(stage: str, run_name: str, config: dict) -> Path:
    train = getattr(__import__(stage), FUNCTIONS[stage])
    return Path(train(run_name=run_name, wandb_config=step_of_8(config, ranks=1))).parent


def run_on_two_ranks(jobs: list, folder: Path) -> str:
    """What the ranks print. They are told of each other as torchrun tells them."""
    command = [sys.executable, str(ROOT / "tests/ranks.py"), json.dumps(jobs)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [start(command, folder, RANK=rank, LOCAL_RANK=rank, **shared) for rank in "01"]
    try:
        codes = [rank.wait(600) for rank in ranks]  # those that wait for each other never end
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0], printed(folder)[-9000:]
    return printed(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base_model) -> dict[tuple, tuple[Path, Path]]:
    """Folders of every kind of run, (alone, on two ranks); the ranks' all in one launch.

    "handed on": begun alone, cut off, and ended by two ranks.
    """
    folder = tmp_path_factory.mktemp("ranks")
    samples, twos = {"sample_every": 4}, {"batch_size": 2}  # twos: two micro-batches on each rank
    autos = {"sample_every": "auto", "save_every": "auto"}  # the first rank's clock decides
    jobs = {
        "dense": ("train_llm", pretrain_config(folder, **samples, **twos)),
        "muon": ("train_llm", pretrain_config(folder, **twos, optimizer="muon")),
        # Its balance depends on the micro-batches. Of fours also an epoch's last step has the same.
        "moe": ("train_llm", pretrain_config(folder, use_moe=True, moe_d_ff=32, **autos)),
        "sft": ("sft_train", sft_config(folder, base_model, **samples, **twos)),
        "dpo": ("dpo_train", dpo_config(folder, base_model, **samples, **twos)),
        "handed on": ("train_llm", pretrain_config(folder, **twos, optimizer="muon", save_every=3)),
    }
    alone = {name: run_alone(stage, name, config) for name, (stage, config) in jobs.items()}
    runs, words = {}, []
    for mode in ("replicas", "shards"):
        output = {"output_dir": str(folder / mode)}
        for name, (stage, config) in jobs.items():
            runs[name, mode] = alone[name], folder / mode / alone[name].parent.name / name
            words.append([stage, name, step_of_8(config, ranks=2) | output, mode == "shards"])
        handed_on = step_of_8(jobs["handed on"][1], ranks=1) | output
        cut_off(handed_on, runs["handed on", mode][1], steps=5)
    told = run_on_two_ranks(words, folder)
    assert told.count("Finished: ") == len(words)  # rank 0 alone speaks
    # Samples fail at rank 1 alone, by tests/ranks.py. It says so, and the ranks stay together.
    assert told.count("rank 1: WARNING: samples: OutOfMemoryError: of one ") == len(words)
    assert told.count("at step 3.") == 2
    return runs


def cut_off(config: dict, folder: Path, steps: int):
    with crash_after(steps):
        train_llm.train(run_name=folder.name, wandb_config=config)
    gc.collect()  # the crash's traceback, and with it the run: its lock is free, as after a death


@pytest.mark.parametrize("mode", ["replicas", "shards"])
@pytest.mark.parametrize("name", ["dense", "muon", "moe", "sft", "dpo", "handed on"])
def test_two_ranks_train_as_one_process_does(runs, name, mode):
    alone, together = runs[name, mode]
    expected, found = (read_metrics(folder / "metrics.jsonl") for folder in (alone, together))
    assert [m["step"] for m in found] == [m["step"] for m in expected]
    for one, two in zip(expected, found, strict=True):
        for key in NAMES & one.keys():
            # Newton-Schulz makes more of a gradient's rounding, and of the next gradient's norm.
            is_muons_norm = key == "train/grad_norm" and name in ("muon", "handed on")
            allowed = 5e-5 if is_muons_norm else 1e-5
            assert two[key] == pytest.approx(one[key], abs=allowed, rel=allowed), (key, one["step"])
    final = weights(together / "final")
    for key, tensor in weights(alone / "final").items():
        torch.testing.assert_close(final[key], tensor, atol=2e-4, rtol=0)


def test_a_sharded_run_is_ended_by_one_process(runs, tmp_path, capsys):
    alone, sharded = runs["muon", "shards"]
    taken = tmp_path / "checkpoints" / "pretrain" / "taken"
    shutil.copytree(sharded, taken)
    shutil.rmtree(taken / "final")
    shutil.rmtree(max(taken.glob("step_*")))  # what the end saved
    config = json.loads((taken / "run.json").read_text(encoding="utf-8"))
    config = step_of_8(config, ranks=1)
    del config["num_processes"], config["contents"]
    config["output_dir"] = str(tmp_path / "checkpoints")
    train_llm.train(run_name="taken", wandb_config=config)
    assert "at step 16." in capsys.readouterr().out
    final = weights(taken / "final")
    for key, tensor in weights(alone / "final").items():
        torch.testing.assert_close(final[key], tensor, atol=2e-4, rtol=0)
