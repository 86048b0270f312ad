"""Supervised fine-tuning data: conversations -> packed rows in which only replies are targets.

python sft_data.py --inspect            the bundled sample, targets in colour
python sft_data.py --inspect my.json    your own file, folder or glob
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from corpus import cache
from corpus.chat_format import Renderer, flatten, iter_conversations, truncate
from corpus.packing import PackedCollator, best_fit
from corpus.readers import find_files
from corpus.records import to_messages
from engine.disk import content_hash
from engine.report import print_lines
from engine.runs import find_final
from kernels import IGNORE_INDEX
from tokenizer import create_tokenizer, tokenizer_identity

SAMPLE = "data/sft_sample.jsonl"
BATCH = 4096  # conversations rendered and packed at a time, which bounds the memory
CACHE_VERSION = 3  # raise it when the rows made from the same conversations change
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.uint32())),
        ("position_ids", pa.list_(pa.uint32())),
        ("labels", pa.list_(pa.int32())),
    ]
)


def prepare_sft_data(
    tokenizer: PreTrainedTokenizerBase,
    data_path: str | None = None,
    max_length: int = 512,
    split: str | None = "train",
    validation_ratio: float = 0.05,
    cache_dir: str = "checkpoints/cache",
) -> tuple[Dataset | DatasetDict, PackedCollator]:
    """Conversations -> packed rows of input_ids, position_ids, labels; and their collator.

    Args:
        data_path: file, folder or glob of the SFT records in corpus/records.py; None: the bundled
            sample.
        max_length: tokens of a row; conversations are packed into it whole.
        split: "train", "validation", or None for a DatasetDict of both.

    Returns:
        (dataset, data_collator). labels are -100 outside assistant replies and their end tokens.

    Raises:
        ValueError: bad data, or no example with a target; names the file, the line and the fix.
    """
    path = data_path or SAMPLE
    cache.check_max_length(max_length)
    file_hash = content_hash(find_files(path))
    settings = [file_hash, tokenizer_identity(tokenizer), max_length, CACHE_VERSION]
    write = partial(_write_rows, path, tokenizer, max_length)
    rows, counts = cache.cached_splits("sft", path, settings, validation_ratio, cache_dir, write)
    print(_describe(counts, rows, path), flush=True)
    collator = PackedCollator(max_length, tokenizer.pad_token_id)
    return (rows[split] if split else rows), collator


def _iter_examples(path: str, counts: Counter) -> Iterator[list[dict]]:
    """Messages of the usable conversations, which end with a reply. Drops are counted."""
    seen = set()
    for messages in iter_conversations(path, to_messages):
        counts["conversations read"] += 1
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()  # a question without its answer teaches nothing
        if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
            counts["dropped: no reply"] += 1
        elif (key := json.dumps(messages, sort_keys=True)) in seen:
            counts["dropped: duplicate"] += 1
        else:
            seen.add(key)
            yield messages


def _write_rows(path: str, tokenizer, max_length: int, folder: Path, split):
    """Write the files of cache.cached_splits. A conversation's question decides its split."""
    counts: Counter = Counter()
    renderer = Renderer(tokenizer)
    examples = _iter_examples(path, counts)
    with (
        pa.ipc.new_stream(str(folder / "train.arrow"), SCHEMA) as train,
        pa.ipc.new_stream(str(folder / "validation.arrow"), SCHEMA) as validation,
    ):
        writers = {"train": train, "validation": validation}
        while batch := list(islice(examples, BATCH)):
            encoded: dict[str, list] = {name: [] for name in writers}  # (ids, mask) of each
            for messages, turns in zip(batch, renderer.render(batch), strict=True):
                counts["replies cut"] += truncate(turns, max_length)
                ids, mask = flatten(turns)
                # If every character is several byte tokens, the headers alone may fill a row.
                if any(mask[1:]) and len(ids) <= max_length:
                    question = json.dumps(messages[:-1], sort_keys=True)
                    encoded[split(question)].append((ids, mask))
                    counts["conversations"] += 1
                else:
                    counts["dropped: no target"] += 1
            for name, writer in writers.items():
                writer.write_batch(_pack(encoded[name], max_length, counts))
    if not counts["conversations"]:
        raise ValueError(f"{path}: no example with a reply to learn from ({dict(counts)}).")
    (folder / "statistics.json").write_text(json.dumps(counts, ensure_ascii=False, indent=1))


def _pack(encoded: list[tuple], max_length: int, counts: Counter) -> pa.RecordBatch:
    """Pack whole conversations into rows by best-fit. Padding is not stored."""
    rows = best_fit([len(ids) for ids, _ in encoded], max_length)
    columns: dict[str, list[list[int]]] = {name: [] for name in SCHEMA.names}
    for row in rows:
        labels: list[int] = []
        input_ids: list[int] = []
        position_ids: list[int] = []
        for ids, mask in (encoded[index] for index in row):
            input_ids += ids
            position_ids += range(len(ids))
            labels += [i if target else IGNORE_INDEX for i, target in zip(ids, mask, strict=True)]
        for name, values in zip(columns, (input_ids, position_ids, labels), strict=True):
            columns[name].append(values)
        counts["tokens"] += len(input_ids)
        counts["targets"] += sum(label != IGNORE_INDEX for label in labels)
    counts["padding"] += len(rows) * max_length
    counts["padding"] -= sum(len(ids) for ids, _ in encoded)
    return pa.record_batch(columns, schema=SCHEMA)


def _describe(counts: dict, rows: DatasetDict, path: str) -> str:
    drops = [f"{n:,} {name[9:]}" for name, n in counts.items() if name.startswith("dropped")]
    places = counts["padding"] + counts["tokens"]
    return (
        f"Data {path}: {counts['conversations']:,} conversations "
        f"({', '.join(drops) or 'none'} dropped, {counts['replies cut']:,} replies cut), "
        f"{counts['tokens']:,} tokens, {counts['targets']:,} of them targets; "
        f"{len(rows['train']):,} training + {len(rows['validation']):,} validation rows, "
        f"{counts['padding'] / places:.2%} padding"
    )


def inspect(rows: Dataset, tokenizer, count: int, colour: bool) -> Iterator[str]:
    """Decoded rows, one conversation after the other, targets in green or in [ ]."""
    before, after = ("\033[32m", "\033[0m") if colour else ("[", "]")
    for row in islice(rows, count):
        targets = sum(label != IGNORE_INDEX for label in row["labels"])
        yield f"--- a row of {len(row['input_ids'])} tokens, {targets} of them targets"
        text, was_target = "", False
        run: list[int] = []
        tokens = zip(row["input_ids"], row["labels"], row["position_ids"], strict=True)
        for token, label, position in [*tokens, (None, IGNORE_INDEX, 0)]:
            is_target = label != IGNORE_INDEX
            if run and (is_target != was_target or position == 0):
                decoded = tokenizer.decode(run)
                text += f"{before}{decoded}{after}" if was_target else decoded
                run = []
                if position == 0:
                    yield text
                    text = ""
            run.append(token)
            was_target = is_target


def main():
    parser = argparse.ArgumentParser(description="Prepare and look at fine-tuning data.")
    parser.add_argument("--inspect", nargs="?", const=SAMPLE, default=SAMPLE, metavar="FILE")
    parser.add_argument("--tokenizer", help="folder; default: the newest pre-trained model's")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=2, help="how many rows to print")
    arguments = parser.parse_args()
    try:
        folder = arguments.tokenizer or find_final("checkpoints", "pretrain", "--tokenizer")
        tokenizer = create_tokenizer(model_path=str(folder))
        rows, _ = prepare_sft_data(tokenizer, arguments.inspect, arguments.max_length)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print_lines(inspect(rows, tokenizer, arguments.rows, colour=sys.stdout.isatty()))


if __name__ == "__main__":
    main()
