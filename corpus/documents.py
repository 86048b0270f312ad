"""A pre-training corpus as a stream of documents."""

from collections import Counter
from collections.abc import Iterator
from functools import partial

import numpy as np
import xxhash

from corpus.preparation import Corpus, usable_items
from corpus.readers import Dropped, FormatError
from corpus.sources import find_data
from engine.progress import Progress

SAMPLE = "data/pretrain_sample.jsonl"
TEXT_COLUMNS = ("text", "content", "completion")  # the first that a record has is its text
QUESTIONS = {"content": "input", "completion": "prompt"}  # beside which they are answers


def document_of(record, text_column: str | None = None) -> str:
    """The text of a record: a paragraph of a text file, or a column of an object.

    Raises:
        Dropped: there is no text that could be trained on.
        FormatError: the record has no such column.
    """
    text = record if isinstance(record, str) else _column_of(record, text_column)
    if not isinstance(text, str):
        raise Dropped("not text")
    if not text.strip():
        raise Dropped("empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # from a JSON escape
        raise Dropped("lone surrogates") from error
    return text


def _column_of(record, text_column: str | None) -> object:
    names = (text_column,) if text_column else TEXT_COLUMNS
    if isinstance(record, dict):
        for name in names:
            if name in record:
                if not text_column:
                    _refuse_half_of_a_talk(record, name)
                return record[name]
    others = "".join(f' or "{name}"' for name in names[1:])
    has = f"has {', '.join(map(repr, record))}" if isinstance(record, dict) else "is no object"
    raise FormatError(
        f'expected {{"{names[0]}": "…"}}{others}; this record {has}. '
        "--text_column names another column"
    )


def iter_documents(
    dataset: str = SAMPLE,
    text_column: str | None = None,
    counts: Counter | None = None,
    what: str = "",
) -> Iterator[str]:
    """The usable documents of a corpus, each once and in order, by this process alone.

    To find duplicates, memory grows by one 8-byte hash per document.

    Args:
        counts: counts what is dropped, by reason.
        what: the name of a progress bar; without one nothing is shown.
    """
    counts = Counter() if counts is None else counts
    seen = SeenHashes()
    corpus = Corpus([(find_data(dataset), None)])
    parse = partial(document_of, text_column=text_column)
    with Progress(what, corpus.stored_bytes(), shown=bool(what)) as progress:
        for task in corpus.tasks():
            for text in usable_items(parse, task.portion, counts):
                if seen.add(xxhash.xxh3_64_intdigest(text.encode())):
                    yield text
                else:
                    counts["dropped: duplicate"] += 1
            progress.reach(task.position)


def _refuse_half_of_a_talk(record: dict, name: str):
    """An answer without its question is no document."""
    asked = QUESTIONS.get(name)
    if asked and record.get(asked):
        raise FormatError(
            f'"{asked}" and "{name}" are a conversation, for sft_train.py. '
            f"--text_column {name} takes that text alone"
        )


class SeenHashes:
    """A set of 64-bit hashes in 8 bytes each: a sorted array, and a Python set of the newest."""

    def __init__(self, newest: int = 2**16):
        self.limit = newest
        self.newest: set[int] = set()
        self.sorted = np.empty(0, np.uint64)

    def add(self, digest: int) -> bool:
        """Add a hash. Returns whether it is new."""
        place = np.searchsorted(self.sorted, np.uint64(digest))
        is_old = place < len(self.sorted) and self.sorted[place] == digest
        if is_old or digest in self.newest:
            return False
        self.newest.add(digest)
        # In proportion to the array, so that merging costs the same per document at any size.
        if len(self.newest) >= max(self.limit, len(self.sorted) // 8):
            newest = np.fromiter(self.newest, np.uint64, len(self.newest))
            self.sorted = np.union1d(self.sorted, newest)
            self.newest.clear()
        return True
