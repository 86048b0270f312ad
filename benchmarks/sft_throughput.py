"""Target tokens per second of the packed SFT loop, against padding and against TRL's SFTTrainer.

    python benchmarks/sft_throughput.py [--data conversations.jsonl] [--rounds 5]

Every variant trains one epoch on the same conversations, from the same model, with AdamW and the
same rows per micro-batch; only the time from the first step to the last counts.
"""

import argparse
import json
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

REAL = "../shared/data/real/sft_alpaca_zh_demo.jsonl"
EXAMPLES, BATCH_SIZE, MAX_LENGTH = 160, 8, 512
VARIANTS = ["ours, packed", "ours, padded", "TRL", "TRL, packing"]


def run_ours(folder: Path, data: Path, packed: bool) -> tuple[float, int]:
    """(seconds, target tokens) of one epoch of the loop's own steps."""
    import torch

    from corpus.chat_format import Renderer, flatten, truncate
    from corpus.packing import PackedCollator
    from corpus.records import to_messages
    from engine import optim
    from engine.steps import count_targets
    from kernels import IGNORE_INDEX
    from models import CustomLLM
    from sft_data import prepare_sft_data
    from sft_train import forward_backward
    from tokenizer import create_tokenizer

    tokenizer = create_tokenizer(model_path=str(folder))
    if packed:
        splits, collate = prepare_sft_data(
            tokenizer, str(data), MAX_LENGTH, None, cache_dir=str(folder / "cache")
        )
        rows = [row for split in splits.values() for row in split.with_format("numpy")]
    else:
        collate, rows = PackedCollator(MAX_LENGTH, tokenizer.pad_token_id), []
        messages = [to_messages(record) for record in read_jsonl(data, EXAMPLES)]
        for turns in Renderer(tokenizer).render(messages):
            truncate(turns, MAX_LENGTH)
            ids, mask = flatten(turns)
            labels = [i if m else IGNORE_INDEX for i, m in zip(ids, mask, strict=True)]
            rows.append({"input_ids": ids, "position_ids": range(len(ids)), "labels": labels})
    rt = our_runtime()
    model = CustomLLM.from_pretrained(folder, dtype=torch.float32)
    rt.place(model.train())
    config = {"optimizer": "adamw", "learning_rate": 1e-4, "weight_decay": 0.0}
    optimizers = optim.build(model, config)
    targets, started = 0, time.perf_counter()
    for start in range(0, len(rows), BATCH_SIZE):
        batch = collate(rows[start : start + BATCH_SIZE])
        count, _ = count_targets([batch], rt)
        forward_backward(model, rt.to_device(batch), count, rt)
        optim.step(model, optimizers, rt, 1.0)
        targets += count
    return time.perf_counter() - started, targets


def run_trl(folder: Path, data: Path, packing: bool) -> tuple[float, int]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from corpus.records import to_messages

    watch = Stopwatch()
    records = [{"messages": to_messages(record)} for record in read_jsonl(data, EXAMPLES)]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=SFTConfig(
            **trl_settings(folder, BATCH_SIZE),
            assistant_only_loss=True,
            max_length=MAX_LENGTH,
            packing=packing,
        ),
        train_dataset=Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[watch],
    )
    targets = sum(int((batch["labels"] != -100).sum()) for batch in trainer.get_train_dataloader())
    trainer.train()
    return watch.seconds, targets


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=REAL)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variant", choices=VARIANTS, help="one measurement, as JSON")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.variant:
        run = run_ours if arguments.variant.startswith("ours") else run_trl
        packed = arguments.variant.endswith(("packed", "packing"))
        seconds, targets = run(arguments.folder, Path(arguments.data), packed)
        print(json.dumps({"targets_per_second": targets / seconds, "targets": targets}))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "conversations.jsonl"
        source = real_or_bundled(arguments.data, "data/sft_sample.jsonl")
        records = read_jsonl(source, EXAMPLES)
        data.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
        save_model(folder, [record["response"] for record in records])
        results = run_rounds(__file__, folder, VARIANTS, arguments.rounds, data)
    print(f"{source.name}: {len(records)} conversations, max_length {MAX_LENGTH}")
    columns = {"targets_per_second": "target tokens/s", "targets": "targets seen"}
    print_table(results, columns, VARIANTS[0])


if __name__ == "__main__":
    main()
