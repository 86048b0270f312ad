"""A pre-training corpus as a stream of documents."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import xxhash

from corpus.readers import Dropped, FormatError, input_error, iter_records
from corpus.sources import find_data

SAMPLE = "data/pretrain_sample.jsonl"
TEXT_COLUMNS = ("text", "content", "completion")  # the first that a record has is its text


def document_of(record, text_column: str | None = None) -> str:
    """The text of a record: a paragraph of a text file, or a column of an object.

    Raises:
        Dropped: there is no text that could be trained on.
        FormatError: the record has no such column.
    """
    if isinstance(record, str):
        text: object = record
    else:
        names = (text_column,) if text_column else TEXT_COLUMNS
        column = next((name for name in names if name in record), None) if _is_object(record) else None
        if column is None:
            raise FormatError(_describe_missing(record, names))
        text = record[column]
    if not isinstance(text, str):
        raise Dropped("not text")
    if not text.strip():
        raise Dropped("empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # from a JSON escape
        raise Dropped("lone surrogates") from error
    return text


def _is_object(record) -> bool:
    return isinstance(record, dict)


def _describe_missing(record, names: tuple[str, ...]) -> str:
    has = f"has {', '.join(map(repr, record))}" if _is_object(record) else "is no object"
    others = "".join(f' or "{name}"' for name in names[1:])
    return (
        f'expected {{"{names[0]}": "…"}}{others}; this record {has}. '
        "--text_column names another column"
    )


def iter_documents(dataset: str = SAMPLE, counts: Counter | None = None) -> Iterator[str]:
    """The usable documents of a corpus, each once. `counts` counts what is dropped, by reason.

    To find duplicates, memory grows by one 8-byte hash per document.
    """
    counts = Counter() if counts is None else counts
    seen = SeenHashes()
    for path in find_data(dataset):
        for line, record in iter_records(path):
            counts["read"] += 1
            try:
                text = document_of(record)
            except Dropped as reason:
                counts[f"dropped: {reason}"] += 1
            except FormatError as error:
                raise input_error(path, line, f"{error}.") from error
            else:
                if seen.add(xxhash.xxh3_64_intdigest(text.encode())):
                    yield text
                else:
                    counts["dropped: duplicate"] += 1


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
