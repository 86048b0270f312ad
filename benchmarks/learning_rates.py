"""Which learning rates are best, for runs of several lengths: validation loss at the end of each.

    python benchmarks/learning_rates.py --data '../shared/data/real/pt_*.xz' --folder /tmp/rates
    python benchmarks/learning_rates.py … --steps 600 --factors 0.5 1 2 --seeds 0 1
    python benchmarks/learning_rates.py … --steps 600 --factors 1 --set min_lr_ratio=0
    python benchmarks/learning_rates.py --stage sft --data chats.jsonl --set init_from=FOLDER …

A factor multiplies both learning rates that the stage's rule gives for so many steps
(`scale_learning_rate`): 1 is the rule. Each run is the stage's own script, as a process with one
thread: a small model on real text, whose held-out part the loss is of. Results are lines of
<folder>/results.jsonl, printed as a table at the end. What stands there already is not run again,
so that a sweep may be ended and go on.
"""

import argparse
import importlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from peers import ROOT

from engine.finished import SCRIPTS
from engine.settings import parse_value
from engine.tracker import read_metrics

MODEL = {"d_model": 256, "n_heads": 4, "n_layers": 3, "d_ff": 704, "vocab_size": 4096}  # 3.5 M
MODEL |= {"max_seq_len": 256, "batch_size": 4, "tokenizer_megabytes": 30}
TUNING = {"max_length": 512, "batch_size": 1}
RUN: dict = {"num_epochs": 1000, "validation_tokens": 65_536, "num_workers": 0, "resume": False}
RUN |= {"eval_every": 0, "sample_every": 0, "save_every": 0, "log_every": 50}
RUN |= {"mixed_precision": "bf16"}


def run_one(arguments, changes: dict) -> dict:
    """One run of the stage's script, in a process of its own."""
    folder, script = Path(arguments.folder), SCRIPTS[arguments.stage]
    defaults = importlib.import_module(Path(script).stem).DEFAULTS
    config = (MODEL if arguments.stage == "pretrain" else TUNING) | RUN
    config |= {"dataset": arguments.data, "output_dir": str(folder)} | changes
    for key in ("learning_rate", "muon_learning_rate"):
        config[key] = config.get(key, defaults[key]) * changes["factor"]
    del config["factor"]
    tokenizer = folder / "tokenizer"
    if tokenizer.exists() and arguments.stage == "pretrain":
        config["tokenizer_path"] = str(tokenizer)
    command = [sys.executable, script]
    command += [f"--{key}={value}" for key, value in config.items()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode < 0:
        raise SystemExit(f"Signal {-done.returncode} ended a run: it is not in the results.")
    last = done.stdout.splitlines()[-1] if done.stdout else ""
    if not last.startswith("Finished: "):  # a rate at which the loss is no number
        return {"loss": None, "why": (done.stderr or last)[-300:]}
    final = ROOT / last.removeprefix("Finished: ")
    if not tokenizer.exists():
        tokenizer.symlink_to(final)
    metrics = read_metrics(final.parent / "metrics.jsonl")
    return {
        "loss": next(m["val/loss"] for m in reversed(metrics) if "val/loss" in m),
        "learning_rate": max(m.get("train/learning_rate", 0) for m in metrics),
        "seconds": time.perf_counter() - began,
        "model": str(final),
    }


def sweep(arguments):
    """The runs that are asked for and not there yet."""
    results = Path(arguments.folder) / "results.jsonl"
    known = [json.loads(line) for line in results.open()] if results.exists() else []
    there = [result["changes"] for result in known]
    more = {key: parse_value(value) for key, value in (w.split("=") for w in arguments.set)}
    grid = itertools.product(arguments.steps, arguments.seeds, arguments.factors)
    asked = [{"max_steps": s, "seed": seed, "factor": f} | more for s, seed, f in grid]

    def work(changes: dict):
        result = {"changes": changes} | run_one(arguments, changes)
        with results.open("a") as out:
            out.write(json.dumps(result) + "\n")
        print(json.dumps(result), flush=True)

    todo = [changes for changes in asked if changes not in there]
    if todo and not known:  # the first one prepares the data
        work(todo.pop(0))
    with ThreadPoolExecutor(arguments.processes) as pool:
        list(pool.map(work, todo))
    print_table(results)


def print_table(results: Path):
    """Mean loss over the seeds, a line for each length and set of keys."""
    losses: dict[str, dict] = defaultdict(lambda: defaultdict(list))
    for result in map(json.loads, results.open()):
        changes = result["changes"]
        keys = {k: v for k, v in changes.items() if k not in ("seed", "factor")}
        losses[json.dumps(keys)][changes["factor"]].append(result["loss"])
    factors = sorted({factor for of_line in losses.values() for factor in of_line})
    print("| run | " + " | ".join(f"x{factor:g}" for factor in factors) + " |")
    for others, of_line in losses.items():
        cells = [describe_losses(of_line[factor]) for factor in factors]
        print(f"| {others} | " + " | ".join(cells) + " |")


def describe_losses(losses: list[float | None]) -> str:
    """Of the seeds that ran; '' where none did."""
    numbers = [loss for loss in losses if loss is not None]
    if len(numbers) < len(losses):
        return "diverged"
    return f"{mean(numbers):.4f} ({len(numbers)})" if numbers else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=SCRIPTS, default="pretrain")
    parser.add_argument("--data", required=True, help="the stage's key `dataset`")
    parser.add_argument("--folder", required=True, help="for runs and results")
    parser.add_argument("--steps", type=int, nargs="+", default=[150, 600, 2400])
    parser.add_argument("--factors", type=float, nargs="+", default=[0.25, 0.5, 1, 2, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other keys")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    Path(arguments.folder).mkdir(parents=True, exist_ok=True)
    sweep(arguments)


if __name__ == "__main__":
    main()
