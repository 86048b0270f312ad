"""Records -> rows of tokens on all cores, in two passes over the data.

The first pass reads and checks every record, keeps two hashes of it in memory, and lays what it
parsed aside on the disk. From the hashes follows what is a duplicate, what is held out, and what a
tokenizer is trained on. The second pass takes what was laid aside, encodes and packs it. Both work
portion by portion, and a portion depends on the files alone: the rows are the same to the byte with
any number of processes, and memory grows by 22 bytes a record, not by its text.
"""

import itertools
import marshal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import xxhash

from corpus.choice import TRAIN, VALIDATION, Index, question_hash
from corpus.processes import count_cores, map_in_order
from corpus.readers import (
    PORTION,
    Dropped,
    FormatError,
    Portion,
    input_error,
    iter_portions,
    size_of,
)
from engine.disk import explain_full_disk
from engine.progress import Progress

CHANGED = "the file was changed while it was read. Run the same command again."
KINDS = (np.uint64, np.uint64, np.uint32, np.uint16)  # of the columns of Index


@dataclass
class Parts:
    """What one record gives where it gives more, or less, than one item.

    items: the items of the record.
    counts: what of the record was not used or is worth a word, by reason.
    """

    items: list
    counts: dict[str, int]


class Recipe(Protocol):
    """How one stage makes rows of records. It is sent to every process."""

    schema: pa.Schema

    def parse(self, record) -> Any:
        """The item of a record, made of Python's plain types; or its Parts.

        Raises Dropped where it is of no use, FormatError where it is broken.
        """

    def identity(self, item) -> str:
        """A text that only duplicates share."""

    def question(self, item) -> str:
        """The text that decides the split."""

    def encode(self, items: list, counts: Counter) -> list:
        """The example of each item; None where it cannot be trained on."""

    def length(self, example) -> int:
        """Tokens of an example."""

    def pack(self, examples: list, counts: Counter) -> pa.RecordBatch:
        """Rows of examples."""


@dataclass(frozen=True)
class Task:
    """A portion of records, for a process to read."""

    number: int
    dataset: int
    position: int  # bytes of all files, as they are stored, up to the end of this portion
    portion: Portion


@dataclass(frozen=True)
class ChosenTask:
    """The items of a portion, as the first pass laid them aside, for a process to encode."""

    items: Path
    choice: np.ndarray  # uint8 (items,): LEAVE_OUT, TRAIN or VALIDATION
    size: int  # bytes of the portion


@dataclass
class Corpus:
    """The files of one or several datasets.

    datasets: files of each, and its share of the text; None: all of it.
    max_bytes: that are read of each dataset; None: all.
    num_proc: processes; None: one for each core.
    """

    datasets: list[tuple[list[Path], float | None]]
    max_bytes: int | None = None
    num_proc: int | None = None

    def __post_init__(self):
        self.stamps = {path: _stamp(path) for files, _ in self.datasets for path in files}

    def tasks(self) -> Iterator[Task]:
        """All that is read, in order. Raises ValueError for a file that has changed since."""
        before, numbers = 0, itertools.count()
        for dataset, (files, _) in enumerate(self.datasets):
            for portion in self._portions(files):
                self._check([portion.path])
                yield Task(next(numbers), dataset, before + portion.position, portion)
            self._check(files)
            before += sum(path.stat().st_size for path in files)

    def _check(self, files: list[Path]):
        for path in files:
            if _stamp(path) != self.stamps[path]:
                raise input_error(path, None, CHANGED)

    def _portions(self, files: list[Path]) -> Iterator[Portion]:
        """The portions of one dataset, which end where max_bytes are reached."""
        before = read = 0
        for path in files:
            for portion in iter_portions(path):
                portion = replace(portion, position=before + portion.position)
                if self.max_bytes and read + portion.size >= self.max_bytes:
                    yield cut(portion, self.max_bytes - read)
                    return
                yield portion
                read += portion.size
            before += path.stat().st_size

    def stored_bytes(self) -> int:
        """The size of the files, or of what is read of them."""
        sizes = [sum(path.stat().st_size for path in files) for files, _ in self.datasets]
        return sum(min(size, self.max_bytes or size) for size in sizes)

    def map(self, work, tasks: Iterator) -> Iterator[Any]:
        """work(task) of each task in order. A process pays from its second portion on."""
        worth = max(1, self.stored_bytes() // PORTION)
        return map_in_order(work, tasks, min(self.num_proc or count_cores(), worth))


def _stamp(path: Path) -> tuple[int, int]:
    return path.stat().st_size, path.stat().st_mtime_ns


def cut(portion: Portion, size: int) -> Portion:
    """The records of a portion up to the one with which `size` bytes are reached."""
    records = (item[1] if isinstance(item, tuple) else item for item in portion.content)
    sizes = np.cumsum([size_of(record) for record in records])
    count = int(np.searchsorted(sizes, size)) + 1
    return replace(portion, content=portion.content[:count], size=int(sizes[:count][-1]))


def read_index(corpus: Corpus, recipe: Recipe, aside: Path) -> Index:
    """The first pass. Raises ValueError for the first broken record, with its file and line.

    aside: an empty folder for the items; they take about as much of the disk as their text.
    """
    parts: list[list] = []
    counts: Counter = Counter()
    portion_bytes = []
    examine = partial(_examine, recipe, aside)
    with Progress("Reading", corpus.stored_bytes()) as progress:
        for *part, found, size, position in corpus.map(examine, corpus.tasks()):
            parts.append(part)
            counts.update(found)
            portion_bytes.append(size)
            progress.reach(position)
    empty = [np.empty(0, dtype=kind) for kind in KINDS]
    identities, questions, sizes, datasets = map(np.concatenate, zip(empty, *parts, strict=True))
    per_portion = [len(part[0]) for part in parts]
    return Index(identities, questions, sizes, datasets, per_portion, portion_bytes, counts, aside)


def _examine(recipe: Recipe, aside: Path, task: Task) -> tuple:
    """In a process: the columns of Index for one portion, what it drops, its size, its position."""
    identities, questions, sizes = [], [], []
    counts: Counter = Counter()
    items = list(usable_items(recipe.parse, task.portion, counts))
    for item in items:
        text = recipe.identity(item).encode()
        question = recipe.question(item)
        identities.append(xxhash.xxh3_64_intdigest(text))
        questions.append(question_hash(question))
        sizes.append(len(text))
    path = aside / f"{task.number}"
    with explain_full_disk(path), open(path, "wb") as out:
        marshal.dump(items, out)
    columns = (identities, questions, sizes, [task.dataset] * len(sizes))
    arrays = [np.array(column, dtype=kind) for column, kind in zip(columns, KINDS, strict=True)]
    return *arrays, counts, task.portion.size, task.position


def usable_items(parse: Callable, portion: Portion, counts: Counter) -> Iterator[Any]:
    """parse(record) of the records of a portion. What is dropped is counted."""
    for line, record in portion.records():
        counts["read"] += 1
        try:
            item = parse(record)
            if type(item) is not Parts:
                yield item
                continue
            counts.update(item.counts)
            yield from item.items
        except Dropped as reason:
            counts[f"dropped: {reason}"] += 1
        except FormatError as error:
            raise input_error(portion.path, line, f"{error}.") from error


# --- the second pass ------------------------------------------------------------------------------


def chosen_tasks(index: Index, choice: np.ndarray) -> Iterator[ChosenTask]:
    """The portions that hold chosen records, each with its part of the choice."""
    start = 0
    for number, records in enumerate(index.per_portion):
        part = choice[start : start + records]
        start += records
        if part.any():
            yield ChosenTask(index.aside / f"{number}", part, index.portion_bytes[number])


def chosen_items(task: ChosenTask) -> list[tuple[int, Any]]:
    """In a process: (choice, item) of the chosen records of a portion."""
    with open(task.items, "rb") as stored:
        items = marshal.load(stored)
    return [(int(c), i) for c, i in zip(task.choice, items, strict=True) if c]


def chosen_texts(
    corpus: Corpus, recipe: Recipe, index: Index, choice: np.ndarray, progress: Progress
) -> Iterator[str]:
    """The texts of the chosen records, for the training of a tokenizer."""
    tasks = chosen_tasks(index, choice)
    for texts in corpus.map(partial(_identities, recipe), tasks):
        for text in texts:
            yield text
            progress.add(len(text.encode()))


def _identities(recipe: Recipe, task: ChosenTask) -> list[str]:
    return [recipe.identity(item) for _, item in chosen_items(task)]


def write_rows(
    folder: Path, corpus: Corpus, recipe: Recipe, index: Index, choice: np.ndarray, tokens: int
) -> Counter:
    """The second pass: train.arrow and validation.arrow, of at most so many `tokens`."""
    counts, held_out = Counter(index.counts), []
    tasks = chosen_tasks(index, choice)
    with (
        Progress("Tokenizing", sum(index.portion_bytes)) as progress,
        pa.ipc.new_stream(str(folder / "train.arrow"), recipe.schema) as stream,
    ):
        for rows, examples, found, size in corpus.map(partial(_make_rows, recipe), tasks):
            stream.write_batch(rows)
            held_out += examples
            counts.update(found)
            progress.add(size)
    used = _up_to(held_out, recipe, tokens)
    counts["held out, not used"] += len(held_out) - len(used)
    rows = recipe.pack(used, counts)
    with pa.ipc.new_stream(str(folder / "validation.arrow"), recipe.schema) as stream:
        stream.write_batch(rows)
    return counts


def _make_rows(recipe: Recipe, task: ChosenTask) -> tuple:
    """In a process: training rows, (question's hash, example) of what is held out, counts, size."""
    counts: Counter = Counter()
    choices, items = zip(*chosen_items(task), strict=True)
    examples = recipe.encode(list(items), counts)
    chosen = [c for c in zip(choices, items, examples, strict=True) if c[2] is not None]
    training = [example for choice, _, example in chosen if choice == TRAIN]
    held_out = [
        (question_hash(recipe.question(item)), example)
        for choice, item, example in chosen
        if choice == VALIDATION
    ]
    return recipe.pack(training, counts), held_out, counts, task.size


def _up_to(held_out: list[tuple[int, Any]], recipe: Recipe, tokens: int) -> list:
    """The examples of the smallest hashes, at most `tokens` tokens but at least one, in order."""
    lengths = np.array([recipe.length(example) for _, example in held_out], dtype=np.int64)
    order = np.argsort(np.array([hash_ for hash_, _ in held_out], dtype=np.uint64), kind="stable")
    enough = max(1, int(np.searchsorted(np.cumsum(lengths[order]), tokens, side="right")))
    return [held_out[place][1] for place in sorted(order[:enough])]
