"""Pre-training data: read, check, split, tokenize, pack into rows, cache.

    python train_data.py --inspect            the bundled sample as the model will see it
    python train_data.py --inspect my.jsonl   your own file, folder, glob or Hub dataset

Rows are in memory-mapped Arrow files: a corpus larger than RAM is read in constant memory.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from corpus import cache
from corpus.documents import SAMPLE, corpus_hash, iter_documents
from corpus.packing import PackedCollator, pack_segments, row_length, split_windows
from engine.disk import atomic_folder, cache_lock, settings_hash
from engine.report import print_lines
from tokenizer import create_tokenizer, encode_plain, tokenizer_identity, train_tokenizer

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # or data workers warn

SHARD_CHARACTERS = 4_000_000  # tokenized and packed at a time, which bounds the memory
CACHE_VERSION = 2  # raise it when the rows made from the same text change


def prepare_data(
    tokenizer_path: str | None = None,
    dataset: str = SAMPLE,
    max_seq_len: int = 512,
    vocab_size: int = 6400,
    validation_ratio: float = 0.05,
    cache_dir: str = "checkpoints/cache",
) -> tuple[DatasetDict, PreTrainedTokenizerBase]:
    """Text -> packed rows, and the tokenizer they were made with.

    Args:
        tokenizer_path: local folder or Hub name; None trains one of vocab_size on the corpus.
        dataset: file, folder or glob of .jsonl .json .txt .parquet (also .gz .bz2 .xz .zst), or a
            Hub dataset name.
        validation_ratio: share of documents held out. A document's hash decides: its split never
            changes, whatever is added.

    Returns:
        A DatasetDict with "train" and "validation", rows of input_ids and position_ids of up to
        max_seq_len tokens, and the tokenizer.

    Raises:
        ValueError: bad data or settings; names the file, the line and the fix.
    """
    if not 0 < validation_ratio < 1:
        raise ValueError(f"validation_ratio={validation_ratio} must be between 0 and 1.")
    if max_seq_len < 8:
        raise ValueError(f"max_seq_len={max_seq_len} must be at least 8 tokens.")
    text_hash = corpus_hash(dataset)
    tokenizer = load_or_train_tokenizer(
        tokenizer_path, dataset, text_hash, vocab_size, validation_ratio, Path(cache_dir)
    )
    settings = [text_hash, tokenizer_identity(tokenizer), max_seq_len, CACHE_VERSION]
    write = partial(_write_rows, dataset, tokenizer, max_seq_len)
    splits, counts = cache.cached_splits(
        "pretrain", dataset, settings, validation_ratio, cache_dir, write
    )
    splits = _both_splits(splits, dataset, max_seq_len, counts)
    print(describe(counts, splits, dataset), flush=True)
    return splits, tokenizer


def load_or_train_tokenizer(
    path, dataset: str, text_hash: str, vocab_size: int, validation_ratio: float, cache_dir: Path
):
    if path is not None:
        return create_tokenizer(model_path=path)
    name = settings_hash(text_hash, vocab_size, validation_ratio, CACHE_VERSION)
    folder = cache_dir / f"tokenizer-{name}"
    with cache_lock(cache_dir):
        if not folder.exists():
            print(f"Training a {vocab_size:,}-token tokenizer on {dataset} …", flush=True)
            documents = iter_documents(dataset)
            texts = (text for text in documents if cache.split_share(text) >= validation_ratio)
            tokenizer = train_tokenizer(texts, vocab_size)
            with atomic_folder(folder) as temporary:
                tokenizer.save_pretrained(temporary)
    return create_tokenizer(model_path=str(folder))


def _write_rows(dataset: str, tokenizer, max_seq_len: int, folder: Path, split):
    """Write the files of cache.cached_splits. A document's text decides its split."""
    counts: Counter = Counter()
    writers = {
        name: _RowWriter(folder / f"{name}.arrow", tokenizer, max_seq_len, counts)
        for name in cache.SPLITS
    }
    for text in iter_documents(dataset, counts):
        writers[split(text)].add(text)
    for writer in writers.values():
        writer.close()
    (folder / "statistics.json").write_text(json.dumps(counts, ensure_ascii=False, indent=1))


class _RowWriter:
    """Tokenizes documents shard by shard and appends packed rows to one Arrow file."""

    def __init__(self, path: Path, tokenizer, max_seq_len: int, counts: Counter):
        self.tokenizer, self.max_seq_len, self.counts = tokenizer, max_seq_len, counts
        self.id_dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
        fields = [("input_ids", self.id_dtype), ("position_ids", np.uint32)]
        self.schema = pa.schema([(name, pa.list_(pa.from_numpy_dtype(d))) for name, d in fields])
        self.stream = pa.OSFile(str(path), "wb")
        self.writer = pa.ipc.new_stream(self.stream, self.schema)
        self.texts: list[str] = []
        self.characters = self.rows = 0

    def add(self, text: str):
        self.texts.append(text)
        self.characters += len(text)
        if self.characters >= SHARD_CHARACTERS:
            self.flush()

    def flush(self):
        if not self.texts:
            return
        documents = encode_plain(self.tokenizer, self.texts)
        ids = np.concatenate([[*d, self.tokenizer.eos_token_id] for d in documents])
        segments, start = [], 0
        for document in documents:
            for length in split_windows(len(document) + 1, self.max_seq_len):
                segments.append((start, length))
                start += length
        rows, cuts = pack_segments(segments, self.max_seq_len)
        self._write(ids.astype(self.id_dtype), rows)
        self.counts.update(
            {
                "documents": len(self.texts),
                "characters": self.characters,
                "tokens": len(ids),
                "rows": len(rows),
                "padding": len(rows) * self.max_seq_len - len(ids),
                "documents cut to fill rows": cuts,
            }
        )
        self.rows += len(rows)
        self.texts, self.characters = [], 0

    def _write(self, ids: np.ndarray, rows):
        segments = [segment for row in rows for segment in row]
        input_ids = np.concatenate([ids[start : start + length] for start, length in segments])
        position_ids = np.concatenate(
            [np.arange(length, dtype=np.uint32) for _, length in segments]
        )
        ends = np.cumsum([0] + [row_length(row) for row in rows], dtype=np.int32)
        columns = [pa.ListArray.from_arrays(ends, values) for values in (input_ids, position_ids)]
        self.writer.write_batch(pa.record_batch(columns, schema=self.schema))

    def close(self):
        self.flush()
        self.writer.close()
        self.stream.close()


def _both_splits(splits: DatasetDict, dataset: str, max_seq_len: int, counts: dict) -> DatasetDict:
    """The splits. Of one document, such as a novel, the last twentieth of its rows is held out.

    Raises:
        ValueError: there are fewer than two rows.
    """
    if all(map(len, splits.values())):
        return splits
    rows = max(splits.values(), key=len)
    if len(rows) < 2:
        raise ValueError(
            f"{dataset}: {counts.get('tokens', 0)} usable tokens are too few for a training and a "
            f"validation row of {max_seq_len} ({counts}). Add text or lower max_seq_len."
        )
    first = len(rows) - max(1, len(rows) // 20)
    return DatasetDict(
        train=rows.select(range(first)), validation=rows.select(range(first, len(rows)))
    )


def describe(counts: dict, splits: dict[str, Dataset], dataset: str) -> str:
    tokens = counts["tokens"]
    dropped = ", ".join(
        f"{n:,} {name[9:]}" for name, n in counts.items() if name.startswith("dropped")
    )
    return (
        f"Data {dataset}: {counts['documents']:,} documents ({dropped or 'none'} dropped), "
        f"{tokens:,} tokens, {counts['characters'] / tokens:.2f} characters/token; "
        f"{len(splits['train']):,} training + {len(splits['validation']):,} validation rows, "
        f"{counts['padding'] / (counts['padding'] + tokens):.2%} padding, "
        f"{counts['documents cut to fill rows']:,} cuts to fill rows"
    )


def unigram_loss(splits: DatasetDict, vocab_size: int) -> float:
    """Validation loss, nats per target, of a model that knows only the token frequencies."""

    def target_counts(rows: Dataset) -> np.ndarray:
        counts = np.zeros(vocab_size, dtype=np.int64)
        for values in cache.column_values(rows):
            targets = values["input_ids"][values["position_ids"] > 0]
            counts += np.bincount(targets, minlength=vocab_size)
        return counts

    train = target_counts(splits["train"]) + 1  # add-one smoothing: no token is impossible
    held_out = target_counts(splits["validation"])
    return float(-(held_out * np.log(train / train.sum())).sum() / max(held_out.sum(), 1))


def inspect(splits: DatasetDict, tokenizer, max_seq_len: int, rows: int) -> Iterator[str]:
    """Decoded rows, with ‖ between documents and [ ] around tokens that are no target."""
    collate = PackedCollator(max_seq_len, tokenizer.pad_token_id)
    for index, row in enumerate(islice(splits["train"], rows)):
        batch = collate([row])
        targets = int((batch["labels"] >= 0).sum())
        documents = int((np.asarray(row["position_ids"]) == 0).sum())
        tokens = len(row["input_ids"])
        yield f"--- row {index}: {tokens} tokens, {documents} documents, {targets} targets"
        starts = np.flatnonzero(np.equal(row["position_ids"], 0))
        runs = np.split(row["input_ids"], starts[1:])
        yield " ‖ ".join(f"[{tokenizer.decode(r[:1])}]{tokenizer.decode(r[1:])}" for r in runs)


def main():
    parser = argparse.ArgumentParser(description="Prepare and look at pre-training data.")
    parser.add_argument("--inspect", nargs="?", const=SAMPLE, default=SAMPLE, metavar="DATASET")
    parser.add_argument("--tokenizer_path")
    parser.add_argument("--max_seq_len", type=int, default=256)
    parser.add_argument("--vocab_size", type=int, default=6400)
    parser.add_argument("--rows", type=int, default=3, help="how many rows to print")
    arguments = parser.parse_args()
    prepare = partial(prepare_data, arguments.tokenizer_path, arguments.inspect)
    try:
        splits, tokenizer = prepare(arguments.max_seq_len, arguments.vocab_size)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    unigram = unigram_loss(splits, len(tokenizer))
    print(f"A model that knows only the token frequencies has validation loss {unigram:.3f}.")
    print("In a row: ‖ separates documents; the token in [ ] is no target, every other one is.")
    print_lines(inspect(splits, tokenizer, arguments.max_seq_len, arguments.rows))


if __name__ == "__main__":
    main()
