"""One cache of packed rows for the three stages, and how records are split for validation."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import xxhash
from datasets import Dataset, DatasetDict, DatasetInfo
from transformers import PreTrainedTokenizerBase

from engine.disk import atomic_folder, cache_lock, settings_hash
from tokenizer import token_byte_lengths

SPLITS = ("train", "validation")


def split_share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone. Below validation_ratio it is held out.

    The split of a document or a question never changes, whatever is added to the data.
    """
    return xxhash.xxh3_64_intdigest(text.encode(), seed=1) / 2**64


class SplitByShare:
    """Decides the split of each text by its share, and remembers the range of the shares."""

    def __init__(self, threshold: float):
        self.threshold, self.lowest, self.highest = threshold, 1.0, 0.0

    def __call__(self, text: str) -> str:
        share = split_share(text)
        self.lowest, self.highest = min(self.lowest, share), max(self.highest, share)
        return "validation" if share < self.threshold else "train"


def cached_splits(
    stage: str, path: str, settings: list, validation_ratio: float, cache_dir: str, write: Callable
) -> tuple[DatasetDict, dict]:
    """(rows of both splits, statistics) of a stage's data.

    Args:
        path: the data, for what is printed.
        settings: all that the rows depend on. The name of the cache folder is a hash of it.
        write: called as write(folder, split) unless the rows are cached. It makes train.arrow,
            validation.arrow and statistics.json, and asks split(text) for the split of each
            document or question.
    """
    folder = Path(cache_dir) / f"{stage}-{settings_hash(*settings, validation_ratio)}"
    with cache_lock(Path(cache_dir)):
        if not (folder / "statistics.json").exists():
            print(f"Tokenizing {path} …", flush=True)
            with atomic_folder(folder) as temporary:
                write(temporary, split := SplitByShare(validation_ratio))
                if not split.lowest < validation_ratio <= split.highest:
                    # All are on one side, as happens when they are few. The text of the smallest
                    # share is held out; with one text, none is.
                    single = split.lowest >= split.highest
                    threshold = 0.0 if single else float(np.nextafter(split.lowest, 1))
                    write(temporary, SplitByShare(threshold))
    rows = DatasetDict({name: open_rows(folder / f"{name}.arrow") for name in SPLITS})
    return rows, json.loads((folder / "statistics.json").read_text())


def check_max_length(max_length: int):
    if max_length < 32:
        raise ValueError(f"max_length={max_length} must be at least 32 tokens.")


def check_splits(splits: DatasetDict, path: str):
    """Raises ValueError when there is nothing to train on or nothing to validate with."""
    if not all(len(rows) for rows in splits.values()):
        raise ValueError(
            f"{path}: every usable record asks the same question, so that training and validation "
            "cannot be kept apart. Add records with at least one other question."
        )


def open_rows(path: Path) -> Dataset:
    """Memory-map an Arrow file of rows. It remembers the name of its cache folder."""
    return Dataset.from_file(str(path), info=DatasetInfo(description=path.parent.name))


def data_fingerprint(rows: Dataset) -> str:
    """Equal for equal rows: the name of their cache folder, a hash of all that made them."""
    return rows.info.description


def column_values(rows: Dataset, batch_size: int = 1000) -> Iterator[dict[str, np.ndarray]]:
    """Every column of packed rows as one flat array, `batch_size` rows at a time."""
    for table in rows.with_format("arrow").iter(batch_size):
        columns = zip(table.column_names, table.columns, strict=True)
        yield {name: column.combine_chunks().flatten().to_numpy() for name, column in columns}


def target_bytes(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> int:
    """UTF-8 bytes of the targets of packed rows: the denominator of bits per byte."""
    lengths = token_byte_lengths(tokenizer)
    total = 0
    for values in column_values(rows):
        labels = values.get("labels", values["input_ids"])
        total += int(lengths[labels[(values["position_ids"] > 0) & (labels >= 0)]].sum())
    return total
