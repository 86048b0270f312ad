"""Which learning rates are best, for runs of several lengths: validation loss at the end of each.

    python benchmarks/learning_rates.py --data ../shared/data/real --folder /tmp/rates
    python benchmarks/learning_rates.py … --steps 600 --adamw 2e-3 4e-3 --muon 1 10 --seeds 0 1
    python benchmarks/learning_rates.py … --set min_lr_ratio=0

Each run is train_llm.py's own, as a process with one thread: a small model on real corpora, whose
held-out documents the loss is of. Results are lines of <folder>/results.jsonl. What stands there
already is not run again, so that a sweep may be ended and go on.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from peers import ROOT

from engine.settings import parse_value
from engine.tracker import read_metrics

MODEL = {"d_model": 192, "n_heads": 4, "n_layers": 6, "d_ff": 512, "vocab_size": 4096}  # 3.4 M
RUN: dict = {"max_seq_len": 256, "batch_size": 4, "num_epochs": 100, "validation_tokens": 65_536}
RUN |= {"eval_every": 0, "sample_every": 0, "save_every": 0, "log_every": 50, "num_workers": 0}
RUN |= {"mixed_precision": "no", "resume": False, "tokenizer_megabytes": 30}
RUN |= {"scale_learning_rate": False}


def run_one(arguments, changes: dict) -> dict:
    """One run of train_llm.py, in a process of its own."""
    folder = Path(arguments.folder)
    tokenizer = folder / "tokenizer"
    config = MODEL | RUN | {"dataset": arguments.data, "output_dir": str(folder)} | changes
    if tokenizer.exists():
        config["tokenizer_path"] = str(tokenizer)
    command = [sys.executable, "train_llm.py"]
    command += [f"--{key}={value}" for key, value in config.items()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    last = done.stdout.splitlines()[-1] if done.stdout else ""
    if not last.startswith("Finished: "):  # a rate at which the loss is no number
        return {"loss": None, "why": (done.stderr or last)[-300:]}
    final = ROOT / last.removeprefix("Finished: ")
    if not tokenizer.exists():
        tokenizer.symlink_to(final)
    metrics = read_metrics(final.parent / "metrics.jsonl")
    return {"loss": next(m["val/loss"] for m in reversed(metrics) if "val/loss" in m)}


def sweep(arguments):
    """The runs that are asked for and not there yet."""
    results = Path(arguments.folder) / "results.jsonl"
    known = [json.loads(line) for line in results.open()] if results.exists() else []
    there = [result["changes"] for result in known]
    more = {key: parse_value(value) for key, value in (w.split("=") for w in arguments.set)}
    grid = itertools.product(arguments.steps, arguments.seeds, arguments.adamw, arguments.muon)
    todo = []
    for steps, seed, adamw, muon in grid:
        rates = {"learning_rate": adamw, "muon_learning_rate": adamw * muon}
        changes = {"max_steps": steps, "seed": seed} | rates | more
        if changes not in there:
            todo.append(changes)

    def work(changes: dict):
        result = {"changes": changes} | run_one(arguments, changes)
        with results.open("a") as out:
            out.write(json.dumps(result) + "\n")
        print(json.dumps(result), flush=True)

    with ThreadPoolExecutor(arguments.processes) as pool:
        list(pool.map(work, todo))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="the corpora")
    parser.add_argument("--folder", required=True, help="for runs and results")
    parser.add_argument("--steps", type=int, nargs="+", default=[150, 600, 2400])
    parser.add_argument("--adamw", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3])
    parser.add_argument("--muon", type=float, nargs="+", default=[1.0], help="times AdamW's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other keys")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    Path(arguments.folder).mkdir(parents=True, exist_ok=True)
    sweep(arguments)


if __name__ == "__main__":
    main()
