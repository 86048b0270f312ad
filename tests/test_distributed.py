"""Two processes train as one: the same losses and weights, also when one run changes hands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from ranks import FUNCTIONS
from tiny import EXACT, crash_after, dpo_config, pretrain_config, sft_config, weights

import checkpoint
import train_llm
from tracking import read_metrics

TOGETHER = {"batch_size": 4, "gradient_accumulation_steps": 1}  # on each of two ranks
ALONE = {"batch_size": 4, "gradient_accumulation_steps": 2}


def run_alone(stage: str, run_name: str, config: dict) -> Path:
    train = getattr(__import__(stage), FUNCTIONS[stage])
    return Path(train(run_name=run_name, wandb_config=config | ALONE)).parent


def run_on_two_ranks(jobs: list, folder: Path):
    words = ["-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "tests/ranks.py")]
    done = subprocess.run(
        [sys.executable, *words, json.dumps(jobs)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": "0"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base_model) -> dict[str, tuple[Path, Path]]:
    """Folders of every kind of run, (alone, on two ranks); the ranks' all in one launch."""
    folder = tmp_path_factory.mktemp("ranks")
    jobs = {
        "dense": ("train_llm", pretrain_config(folder)),
        "moe": ("train_llm", pretrain_config(folder, use_moe=True, moe_d_ff=32)),
        "sft": ("sft_train", sft_config(folder, base_model)),
        "dpo": ("dpo_train", dpo_config(folder, base_model)),
    }
    alone = {name: run_alone(stage, name, config) for name, (stage, config) in jobs.items()}
    together = {name: folder / "together" / path.parent.name for name, path in alone.items()}
    output = {"output_dir": str(folder / "together")}
    words = [[stage, name, config | TOGETHER | output] for name, (stage, config) in jobs.items()]

    # One more: begun alone, cut off, and ended by two.
    config = pretrain_config(folder) | {"output_dir": output["output_dir"]}
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, train_llm, 5)
        with pytest.raises(InterruptedError):
            train_llm.train(run_name="handed on", wandb_config=config | ALONE)
    checkpoint._LOCKS[folder / "together" / "pretrain" / "handed on"].release()  # as death would
    words.append(["train_llm", "handed on", config | TOGETHER])
    alone["handed on"], together["handed on"] = alone["dense"], folder / "together" / "pretrain"
    printed = run_on_two_ranks(words, folder)
    assert printed.count("Finished: ") == len(words)  # rank 0 alone speaks
    assert printed.count("at step 4.") == 1
    return {name: (alone[name], together[name] / name) for name in alone}


@pytest.mark.parametrize("name", ["dense", "moe", "sft", "dpo", "handed on"])
def test_two_ranks_train_as_one_process_does(runs, name):
    alone, together = runs[name]
    expected, found = (read_metrics(folder / "metrics.jsonl") for folder in (alone, together))
    assert [m["step"] for m in found] == [m["step"] for m in expected]
    for one, two in zip(expected, found, strict=True):
        for key in set(EXACT) & set(one):
            assert two[key] == pytest.approx(one[key], abs=1e-5, rel=1e-5), (key, one["step"])
    final = weights(together / "final")
    for key, tensor in weights(alone / "final").items():
        torch.testing.assert_close(final[key], tensor, atol=2e-4, rtol=0)
