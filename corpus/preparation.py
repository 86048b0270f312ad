"""Records -> rows of tokens on all cores, in two readings of the data.

The first reading checks every record and keeps two hashes of it. From the hashes follows what is a
duplicate, what is held out, and what a tokenizer is trained on. The second reading encodes and
packs. Both work block by block, and a block depends on the files alone: the rows are the same to
the byte, however many processes there are, and memory grows by 20 bytes a record, not by its text.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import xxhash

from corpus.processes import count_cores, map_in_order
from corpus.readers import BLOCK, Block, Dropped, FormatError, input_error, iter_blocks, size_of
from engine.progress import Progress

LEAVE_OUT, TRAIN, VALIDATION = 0, 1, 2  # what becomes of a record
# Held out are so many bytes of text for each of the validation tokens that are asked for. A token
# of Chinese text has more: rows are taken from what is held out until there are enough tokens.
BYTES_PER_TOKEN = 3
CHANGED = "the file was changed while it was read. Run the same command again."
KINDS = (np.uint64, np.uint64, np.uint32, np.uint16)  # of the columns of Index
REHASH = np.uint64(0x9E3779B97F4A7C15)  # a product with this odd number is a hash of a hash


class Recipe(Protocol):
    """How one stage makes rows of records. It is sent to every process."""

    schema: pa.Schema

    def parse(self, record) -> Any:
        """The item of a record. Raises Dropped where it is of no use, FormatError where broken."""

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
class Piece:
    """What a process gets to do: a block of records, and what is to become of each usable one."""

    dataset: int
    position: int  # bytes of all files, as they are stored, up to the end of this block
    block: Block
    choice: np.ndarray | None = None  # uint8 (usable records,): LEAVE_OUT, TRAIN or VALIDATION


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

    def pieces(self) -> Iterator[Piece]:
        """All that is read, in order. Raises ValueError for a file that has changed since."""
        before = 0
        for number, (files, _) in enumerate(self.datasets):
            for block in self._blocks(files):
                self._check([block.path])
                yield Piece(number, before + block.position, block)
            self._check(files)
            before += sum(path.stat().st_size for path in files)

    def _check(self, files: list[Path]):
        for path in files:
            if _stamp(path) != self.stamps[path]:
                raise input_error(path, None, CHANGED)

    def _blocks(self, files: list[Path]) -> Iterator[Block]:
        """The blocks of one dataset, which end where max_bytes are reached."""
        before = read = 0
        for path in files:
            for block in iter_blocks(path):
                block = replace(block, position=before + block.position)
                if self.max_bytes and read + block.size >= self.max_bytes:
                    yield _cut(block, self.max_bytes - read)
                    return
                yield block
                read += block.size
            before += path.stat().st_size

    def stored_bytes(self) -> int:
        """The size of the files, or of what is read of them."""
        sizes = [sum(path.stat().st_size for path in files) for files, _ in self.datasets]
        return sum(min(size, self.max_bytes or size) for size in sizes)

    def map(self, work, pieces: Iterator[Piece]) -> Iterator[Any]:
        """work(piece) of each piece in order. A process pays from its second block on."""
        worth = max(1, self.stored_bytes() // BLOCK)
        return map_in_order(work, pieces, min(self.num_proc or count_cores(), worth))


def _stamp(path: Path) -> tuple[int, int]:
    return path.stat().st_size, path.stat().st_mtime_ns


def _cut(block: Block, size: int) -> Block:
    """The records of a block up to the one with which `size` bytes are reached."""
    sizes = np.cumsum([size_of(item) for item in block.content])
    count = int(np.searchsorted(sizes, size)) + 1
    return replace(block, content=block.content[:count], size=int(sizes[:count][-1]))


@dataclass
class Index:
    """What the first reading found of the usable records, in their order."""

    identities: np.ndarray  # uint64 (records,): equal for duplicates
    questions: np.ndarray  # uint64 (records,): hashes that decide the split
    sizes: np.ndarray  # uint32 (records,): UTF-8 bytes of text
    datasets: np.ndarray  # uint16 (records,)
    per_block: list[int]  # usable records of each block
    block_bytes: int  # of all blocks
    counts: Counter  # what was read, and what was dropped for which reason

    def __post_init__(self):
        self.is_first = np.zeros(len(self.identities), dtype=bool)
        self.is_first[np.unique(self.identities, return_index=True)[1]] = True
        if duplicates := int((~self.is_first).sum()):
            self.counts["dropped: duplicate"] += duplicates


def read_index(corpus: Corpus, recipe: Recipe) -> Index:
    """The first reading. Raises ValueError for the first broken record, with its file and line."""
    parts: list[list] = []
    counts: Counter = Counter()
    block_bytes = 0
    with Progress("Reading", corpus.stored_bytes()) as progress:
        for *part, found, size, position in corpus.map(partial(_examine, recipe), corpus.pieces()):
            parts.append(part)
            counts.update(found)
            block_bytes += size
            progress.reach(position)
    empty = [np.empty(0, dtype=kind) for kind in KINDS]
    identities, questions, sizes, datasets = map(np.concatenate, zip(empty, *parts, strict=True))
    per_block = [len(part[0]) for part in parts]
    return Index(identities, questions, sizes, datasets, per_block, block_bytes, counts)


def _examine(recipe: Recipe, piece: Piece) -> tuple:
    """In a process: the columns of Index for one block, what it drops, its size, its position."""
    identities, questions, sizes = [], [], []
    counts: Counter = Counter()
    for item in usable_items(recipe.parse, piece.block, counts):
        text = recipe.identity(item).encode()
        question = recipe.question(item)
        identities.append(xxhash.xxh3_64_intdigest(text))
        questions.append(question_hash(question))
        sizes.append(len(text))
    columns = (identities, questions, sizes, [piece.dataset] * len(sizes))
    arrays = [np.array(column, dtype=kind) for column, kind in zip(columns, KINDS, strict=True)]
    return *arrays, counts, piece.block.size, piece.position


def question_hash(text: str) -> int:
    """Decides the split of a document or a question, and depends on the text alone."""
    return xxhash.xxh3_64_intdigest(text.encode(), seed=1)


def usable_items(parse: Callable, block: Block, counts: Counter) -> Iterator[Any]:
    """parse(record) of the records of a block. What is dropped is counted."""
    for line, record in block.records():
        counts["read"] += 1
        try:
            yield parse(record)
        except Dropped as reason:
            counts[f"dropped: {reason}"] += 1
        except FormatError as error:
            raise input_error(block.path, line, f"{error}.") from error


# --- what becomes of each record ------------------------------------------------------------------


def choose(index: Index, weights: list[float | None], ratio: float, tokens: int) -> np.ndarray:
    """uint8 (records,): LEAVE_OUT, TRAIN or VALIDATION.

    Args:
        weights: of each dataset; None: all of it is used.
        ratio: the largest share of the questions that is held out.
        tokens: about as many are held out at most.
    """
    used = index.is_first & mixture(index, weights)
    limit = validation_limit(index, used, ratio, tokens * BYTES_PER_TOKEN)
    choice = np.where(index.questions < limit, VALIDATION, TRAIN).astype(np.uint8)
    choice[~used] = LEAVE_OUT
    return choice


def validation_limit(index: Index, used: np.ndarray, ratio: float, num_bytes: int) -> int:
    """Questions with a smaller hash are held out.

    These are the smallest hashes, as many as make num_bytes, and at most `ratio` of all hashes. So
    the limit only falls when text is added: what was trained on is never held out later.
    Where that leaves one side of what is `used` empty, its question of the smallest hash is held
    out; with one question, none is.
    """
    hashes, sizes = index.questions[index.is_first], index.sizes[index.is_first]
    ours = index.questions[used]
    if not len(ours) or ours.min() == ours.max():
        return 0
    limit = min(int(ratio * 2**64), 2**64 - 1)
    low = hashes < np.uint64(limit)
    order = np.argsort(hashes[low], kind="stable")
    total = np.cumsum(sizes[low][order], dtype=np.uint64)
    beyond = hashes[low][order][total > num_bytes]
    limit = int(beyond[0]) if len(beyond) else limit
    return limit if ours.min() < limit <= ours.max() else int(ours.min()) + 1


def mixture(index: Index, weights: list[float | None]) -> np.ndarray:
    """bool (records,): what is used so that each dataset has its share of the text.

    The dataset that is the shortest for its share is used whole, the others in part.
    """
    used = np.ones(len(index.sizes), dtype=bool)
    if None in weights:
        return used
    kept = index.is_first
    sizes = np.bincount(index.datasets[kept], index.sizes[kept], minlength=len(weights))
    shares = np.array(weights, dtype=np.float64)
    shares = (sizes / shares).min() * shares / np.maximum(sizes, 1)  # of each dataset
    return rehash(index.identities) <= shares[index.datasets] * 2.0**64


def rehash(hashes: np.ndarray) -> np.ndarray:
    """Another hash of each, float64 (records,) in [0, 2**64)."""
    return (hashes * REHASH).astype(np.float64)


def choose_for_tokenizer(index: Index, choice: np.ndarray, megabytes: float) -> np.ndarray:
    """uint8 (records,): TRAIN for a share of the training text, chosen by hash."""
    training = np.flatnonzero(choice == TRAIN)
    order = training[np.argsort(rehash(index.questions[training]), kind="stable")]
    total = np.cumsum(index.sizes[order], dtype=np.uint64)
    chosen = np.zeros_like(choice)
    chosen[order[total <= max(megabytes * 1e6, total[:1].sum())]] = TRAIN
    return chosen


# --- the second reading ---------------------------------------------------------------------------


def chosen_pieces(corpus: Corpus, index: Index, choice: np.ndarray) -> Iterator[Piece]:
    """The pieces that hold chosen records, each with its part of the choice."""
    start = 0
    for piece, count in zip(corpus.pieces(), index.per_block, strict=True):
        part = choice[start : start + count]
        start += count
        if part.any():
            yield replace(piece, choice=part)


def chosen_items(recipe: Recipe, piece: Piece) -> list[tuple[int, Any]]:
    """In a process: (choice, item) of the chosen records of a piece."""
    assert piece.choice is not None
    items = list(usable_items(recipe.parse, piece.block, Counter()))
    if len(items) != len(piece.choice):
        raise input_error(piece.block.path, None, CHANGED)
    return [(int(c), i) for c, i in zip(piece.choice, items, strict=True) if c]


def chosen_texts(
    corpus: Corpus, recipe: Recipe, index: Index, choice: np.ndarray, progress: Progress
) -> Iterator[str]:
    """The texts of the chosen records, for the training of a tokenizer."""
    pieces = chosen_pieces(corpus, index, choice)
    for texts in corpus.map(partial(_identities, recipe), pieces):
        for text in texts:
            yield text
            progress.add(len(text.encode()))


def _identities(recipe: Recipe, piece: Piece) -> list[str]:
    return [recipe.identity(item) for _, item in chosen_items(recipe, piece)]


def write_rows(
    folder: Path, corpus: Corpus, recipe: Recipe, index: Index, choice: np.ndarray, tokens: int
) -> Counter:
    """The second reading: train.arrow and validation.arrow, of at most so many `tokens`."""
    counts, held_out = Counter(index.counts), []
    pieces = chosen_pieces(corpus, index, choice)
    with (
        Progress("Tokenizing", index.block_bytes) as progress,
        pa.ipc.new_stream(str(folder / "train.arrow"), recipe.schema) as stream,
    ):
        for rows, examples, found, size in corpus.map(partial(_make_rows, recipe), pieces):
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


def _make_rows(recipe: Recipe, piece: Piece) -> tuple:
    """In a process: training rows, (question's hash, example) of what is held out, counts, size."""
    counts: Counter = Counter()
    choices, items = zip(*chosen_items(recipe, piece), strict=True)
    examples = recipe.encode(list(items), counts)
    chosen = [c for c in zip(choices, items, examples, strict=True) if c[2] is not None]
    training = [example for choice, _, example in chosen if choice == TRAIN]
    held_out = [
        (question_hash(recipe.question(item)), example)
        for choice, item, example in chosen
        if choice == VALIDATION
    ]
    return recipe.pack(training, counts), held_out, counts, piece.block.size


def _up_to(held_out: list[tuple[int, Any]], recipe: Recipe, tokens: int) -> list:
    """The examples of the smallest hashes, at most `tokens` tokens but at least one, in order."""
    lengths = np.array([recipe.length(example) for _, example in held_out], dtype=np.int64)
    order = np.argsort(np.array([hash_ for hash_, _ in held_out], dtype=np.uint64), kind="stable")
    enough = max(1, int(np.searchsorted(np.cumsum(lengths[order]), tokens, side="right")))
    return [held_out[place][1] for place in sorted(order[:enough])]
