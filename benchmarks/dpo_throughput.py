"""Pairs per second and peak memory of the DPO loop, against TRL's DPOTrainer.

    python benchmarks/dpo_throughput.py [--data preferences.jsonl] [--rounds 5]

Every variant trains one epoch on the same pairs, from the same model as policy and reference, with
AdamW and the same pairs per batch. The time of computing reference log-probabilities before
training counts where a variant does that. Peak memory is the process's resident set.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from peers import (
    Stopwatch,
    our_runtime,
    print_table,
    read_jsonl,
    real_or_bundled,
    run_rounds,
    save_model,
    trl_settings,
)

REAL = "../shared/data/real/dpo_zh_demo.jsonl"
PAIRS, BATCH_SIZE, MAX_LENGTH = 96, 8, 512
VARIANTS = ["ours", "TRL", "TRL, precomputed"]


def run_ours(folder: Path, data: Path) -> tuple[float, int]:
    """(seconds, pairs) of the reference's pass and one epoch of the loop's own steps."""
    import torch

    from dpo_data import prepare_dpo_data
    from dpo_train import DEFAULTS, forward_backward
    from engine import optim
    from engine.preference import AnswerScorer, reference_logps
    from models import CustomLLM
    from tokenizer import create_tokenizer

    tokenizer = create_tokenizer(model_path=str(folder))
    splits, collate = prepare_dpo_data(
        tokenizer, str(data), MAX_LENGTH, None, cache_dir=str(folder / "cache")
    )
    rt = our_runtime()
    model = CustomLLM.from_pretrained(folder, dtype=torch.float32)
    rt.place(model)
    scorer = AnswerScorer(model)
    config = DEFAULTS | {"optimizer": "adamw", "learning_rate": 1e-6, "weight_decay": 0.0}
    optimizers = optim.build(model, config)
    started, count = time.perf_counter(), 0
    for rows in splits.values():
        reference = reference_logps(scorer.eval(), rows, collate, rt)
        rows = rows.add_column("reference_logps", list(reference)).with_format("numpy")
        scorer.train()
        for start in range(0, len(rows), BATCH_SIZE):
            members = range(start, min(start + BATCH_SIZE, len(rows)))
            batch = rt.to_device(collate([rows[i] for i in members]))
            forward_backward(scorer, batch, len(members), rt, config)
            optim.step(model, optimizers, rt, 1.0)
            count += len(members)
    return time.perf_counter() - started, count


def run_trl(folder: Path, data: Path, precompute: bool) -> tuple[float, int]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    watch = Stopwatch()
    records = [
        {
            "prompt": [{"role": "user", "content": record["instruction"]}],
            "chosen": [{"role": "assistant", "content": record["chosen"]}],
            "rejected": [{"role": "assistant", "content": record["rejected"]}],
        }
        for record in read_jsonl(data, PAIRS)
    ]
    started = time.perf_counter()
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=DPOConfig(
            **trl_settings(folder, BATCH_SIZE) | {"learning_rate": 1e-6},
            max_length=MAX_LENGTH,
            precompute_ref_log_probs=precompute,
        ),
        train_dataset=Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[watch],
    )
    before = time.perf_counter()
    trainer.get_train_dataloader()  # where TRL computes the reference, if not when it is made
    before = time.perf_counter() - (started if precompute else before)
    trainer.train()
    return watch.seconds + (before if precompute else 0.0), len(records)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=REAL)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variant", choices=VARIANTS, help="one measurement, as JSON")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.variant:
        if arguments.variant == "ours":
            seconds, pairs = run_ours(arguments.folder, Path(arguments.data))
        else:
            precompute = arguments.variant.endswith("precomputed")
            seconds, pairs = run_trl(arguments.folder, Path(arguments.data), precompute)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"pairs_per_second": pairs / seconds, "peak_gib": peak}))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "preferences.jsonl"
        source = real_or_bundled(arguments.data, "data/dpo_sample.jsonl")
        records = read_jsonl(source, PAIRS)
        data.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
        save_model(folder, [record["chosen"] + record["rejected"] for record in records])
        results = run_rounds(__file__, folder, VARIANTS, arguments.rounds, data)
    print(f"{source.name}: {len(records)} pairs, max_length {MAX_LENGTH}")
    columns = {"pairs_per_second": "pairs/s", "peak_gib": "peak GiB"}
    print_table(results, columns, VARIANTS[0])


if __name__ == "__main__":
    main()
