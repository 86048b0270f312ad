"""Pre-training data: read, check, split, tokenize, pack into rows, cache.

    python train_data.py --inspect            the bundled sample as the model will see it
    python train_data.py --inspect my.jsonl   your own file, folder, glob or Hub dataset

Rows are in memory-mapped Arrow files: a corpus larger than RAM is read in constant memory.
"""

import argparse
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from corpus import cache
from corpus.choice import choose_for_tokenizer
from corpus.documents import SAMPLE, document_of
from corpus.encoder import Encoder
from corpus.packing import (
    PackedCollator,
    list_rows,
    list_schema,
    pack_segments,
    row_length,
    row_types,
    split_windows,
)
from corpus.preparation import chosen_texts
from engine.command import as_command
from engine.disk import atomic_folder, settings_hash
from engine.llama_cpp import pre_name
from engine.progress import Progress
from tokenizer import create_tokenizer, tokenizer_identity, train_tokenizer

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # or data workers warn

CACHE_VERSION = 3  # raise it when the rows made from the same text change
# What vocab_size "auto" comes to, and from how many bytes of text on. EXPERIMENTS.md has the runs.
VOCAB_SIZE, SMALL_VOCAB_SIZE, LONG_TEXT = 6400, 4096, 3_000_000


def prepare_data(
    tokenizer_path: str | None = None,
    dataset: str | list | dict = SAMPLE,
    max_seq_len: int = 512,
    vocab_size: int | str = "auto",
    text_column: str | None = None,
    tokenizer_megabytes: float = 10,
    **options,
) -> tuple[DatasetDict, PreTrainedTokenizerBase]:
    """Text -> packed rows, and the tokenizer they were made with.

    Args:
        tokenizer_path: local folder or Hub name; None trains one of vocab_size on the corpus.
        vocab_size: a number of tokens, or "auto": fewer where the text is short.
        dataset: file, folder or glob of .jsonl .json .txt .parquet .arrow (also .gz .bz2 .xz .zst),
            or a name on the Hub or on ModelScope (corpus/sources.py); a list of them; or a dict of
            them with the share of each in the text.
        text_column: the column that holds the text; None: text, content or completion.
        tokenizer_megabytes: a tokenizer is trained on so much of the text, chosen by hash.
        options: of cache.Options, such as validation_tokens, num_proc and cache_dir.

    Returns:
        A DatasetDict with "train" and "validation", rows of input_ids and position_ids of up to
        max_seq_len tokens, and the tokenizer.

    Raises:
        ValueError: bad data or settings; names the file, the line and the fix.
    """
    if max_seq_len < 8:
        raise ValueError(f"max_seq_len={max_seq_len} must be at least 8 tokens.")
    with cache.Data(dataset, cache.Options(**options)) as data:
        recipe = DocumentRecipe(text_column)
        tokenizer = (
            create_tokenizer(model_path=tokenizer_path)
            if tokenizer_path
            else cached_tokenizer(data, recipe, vocab_size, tokenizer_megabytes)
        )
        make_recipe = partial(DocumentRecipe, text_column, tokenizer, max_seq_len, data.size)
        settings = [text_column, tokenizer_identity(tokenizer), max_seq_len, CACHE_VERSION]
        splits, counts = cache.cached_splits("pretrain", data, make_recipe, settings)
    splits = _both_splits(splits, data, max_seq_len, counts)
    print(describe(counts, splits, data.name), flush=True)
    if tokenizer_path:
        _say_if_not_exportable(tokenizer)
    return splits, tokenizer


def _say_if_not_exportable(tokenizer: PreTrainedTokenizerBase):
    """Before training, and not when the trained model is to be exported."""
    try:
        pre_name(tokenizer)
    except ValueError as problem:
        print(f"export_gguf.py will refuse this tokenizer. {problem}", flush=True)


def choose_vocab_size(asked: int | str, text_bytes: float = math.inf) -> int:
    """The number of tokens that a new tokenizer gets. In a short text most of many stay rare."""
    if asked != "auto":
        return int(asked)
    return VOCAB_SIZE if text_bytes >= LONG_TEXT else SMALL_VOCAB_SIZE


def cached_tokenizer(
    data: cache.Data, recipe: "DocumentRecipe", vocab_size: int | str, megabytes: float
):
    """A tokenizer that is trained on at most so many megabytes of the training text."""
    split = [data.options.validation_ratio, data.options.validation_tokens]
    name = settings_hash(
        data.settings, recipe.text_column, vocab_size, megabytes, split, CACHE_VERSION
    )
    folder = data.cache_dir / f"tokenizer-{name}"
    with data.lock:
        if not folder.exists():
            tokenizer = train_on_share(data, recipe, vocab_size, megabytes)
            with atomic_folder(folder) as temporary:
                tokenizer.save_pretrained(temporary)
    return create_tokenizer(model_path=str(folder))


def train_on_share(
    data: cache.Data, recipe: "DocumentRecipe", vocab_size: int | str, megabytes: float
) -> PreTrainedTokenizerBase:
    """Train a tokenizer on so many megabytes of the training text, chosen by hash."""
    index, choice = data.index(recipe), data.choice(recipe)
    chosen = choose_for_tokenizer(index, choice, megabytes)
    size, total = index.sizes[chosen > 0].sum(), index.sizes[index.is_first].sum()
    wanted = choose_vocab_size(vocab_size, total)
    print(f"Training a {wanted:,}-token tokenizer on {data.name} …", flush=True)
    print(f"It learns from {size / 1e6:,.1f} MB of {total / 1e6:,.1f} MB of text.", flush=True)
    with Progress("Training the tokenizer", float(size)) as progress:
        texts = chosen_texts(data.corpus, recipe, index, chosen, progress)
        return train_tokenizer(texts, wanted)


@dataclass
class DocumentRecipe:
    """Documents -> rows of max_seq_len tokens. preparation.Recipe says what each method does."""

    text_column: str | None
    tokenizer: PreTrainedTokenizerBase | None = None  # None: its text alone is wanted
    max_seq_len: int = 0
    size: int = 0  # bytes of text that there are

    def __post_init__(self):
        if self.tokenizer:
            self.encoder = Encoder(self.tokenizer, self.size)
            self.end = np.uint32(self.tokenizer.eos_token_id)
            self.schema = list_schema(row_types(len(self.tokenizer), self.max_seq_len))

    def parse(self, record) -> str:
        return document_of(record, self.text_column)

    def identity(self, text: str) -> str:
        return text

    def question(self, text: str) -> str:
        return text

    def encode(self, texts: list[str], counts: Counter) -> list[np.ndarray]:
        counts["documents"] += len(texts)
        counts["characters"] += sum(map(len, texts))
        return [np.append(ids, self.end) for ids in self.encoder(texts)]

    def length(self, document: np.ndarray) -> int:
        return len(document)

    def pack(self, documents: list[np.ndarray], counts: Counter) -> pa.RecordBatch:
        ids = np.concatenate([np.empty(0, dtype=np.uint32), *documents])
        segments, start = [], 0
        for document in documents:
            for length in split_windows(len(document), self.max_seq_len):
                segments.append((start, length))
                start += length
        rows, cuts = pack_segments(segments, self.max_seq_len)
        counts["tokens"] += len(ids)
        counts["padding"] += len(rows) * self.max_seq_len - len(ids)
        counts["documents cut to fill rows"] += cuts
        places = np.arange(self.max_seq_len, dtype=np.uint32)
        parts = [(ids[start : start + n], places[:n]) for row in rows for start, n in row]
        columns = [
            np.concatenate(column) for column in zip((ids[:0], places[:0]), *parts, strict=True)
        ]
        return list_rows([row_length(row) for row in rows], columns, self.schema)


def _both_splits(
    splits: DatasetDict, data: cache.Data, max_seq_len: int, counts: dict
) -> DatasetDict:
    """The splits. Of one document, such as a novel, the last twentieth of its rows is held out.

    Raises:
        ValueError: there are fewer than two rows.
    """
    if all(map(len, splits.values())):
        return splits
    rows = max(splits.values(), key=len)
    if len(rows) < 2:
        raise ValueError(
            f"{data.name}: {counts.get('tokens', 0)} usable tokens are too few for a training and "
            f"a validation row of {max_seq_len} ({counts}). Add text or lower max_seq_len."
        )
    most = data.options.validation_tokens // max_seq_len
    first = len(rows) - max(1, min(len(rows) // 20, most))
    return DatasetDict(
        train=rows.select(range(first)), validation=rows.select(range(first, len(rows)))
    )


def describe(counts: dict, splits: dict[str, Dataset], name: str) -> str:
    tokens = counts["tokens"]
    return (
        f"Data {name}: {counts['documents']:,} documents ({cache.dropped(counts)} dropped), "
        f"{tokens:,} tokens, {counts['characters'] / tokens:.2f} characters/token; "
        f"{len(splits['train']):,} training + {len(splits['validation']):,} validation rows, "
        f"{counts['padding'] / (counts['padding'] + tokens):.2%} padding, "
        f"{counts['documents cut to fill rows']:,} cuts to fill rows"
    )


def unigram_loss(splits: DatasetDict, vocab_size: int) -> float:
    """Validation loss, nats per target, of a model that knows only the token frequencies."""
    name = f"unigram_loss-{len(splits['train'])}"
    return cache.remember(splits["train"], name, partial(_unigram_loss, splits, vocab_size))


def _unigram_loss(splits: DatasetDict, vocab_size: int) -> float:

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


@as_command()
def main():
    parser = argparse.ArgumentParser(description="Prepare and look at pre-training data.")
    parser.add_argument("--inspect", nargs="?", const=SAMPLE, default=SAMPLE, metavar="DATASET")
    parser.add_argument("--tokenizer_path")
    parser.add_argument("--max_seq_len", type=int, default=128)
    parser.add_argument("--vocab_size", type=int, help='default: as train_llm.py\'s "auto"')
    parser.add_argument("--text_column", help="default: text, content or completion")
    parser.add_argument("--max_dataset_bytes", type=float, help="bytes to read of it")
    parser.add_argument("--rows", type=int, default=3, help="how many rows to print")
    arguments = parser.parse_args()
    try:
        splits, tokenizer = prepare_data(
            arguments.tokenizer_path,
            arguments.inspect,
            arguments.max_seq_len,
            "auto" if arguments.vocab_size is None else arguments.vocab_size,
            arguments.text_column,
            max_dataset_bytes=arguments.max_dataset_bytes,
        )
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    unigram = unigram_loss(splits, len(tokenizer))
    print(f"A model that knows only the token frequencies has validation loss {unigram:.3f}.")
    print("In a row: ‖ separates documents; the token in [ ] is no target, every other one is.")
    for line in inspect(splits, tokenizer, arguments.max_seq_len, arguments.rows):
        print(line)


if __name__ == "__main__":
    main()
