"""A pre-training corpus as a stream of documents, from files here or from the Hub."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import xxhash
from datasets import Dataset, load_dataset

from corpus.readers import find_files, input_error, is_local, iter_records
from engine.disk import content_hash

SAMPLE = "data/pretrain_sample.jsonl"


def iter_documents(dataset: str = SAMPLE, counts: Counter | None = None) -> Iterator[str]:
    """The usable documents of a corpus, each once. `counts` counts what is dropped, by reason.

    To find duplicates, memory grows by one 8-byte hash per document.
    """
    counts = Counter() if counts is None else counts
    seen = SeenHashes()
    for text in _iter_texts(dataset):
        counts["documents read"] += 1
        if not isinstance(text, str):
            counts["dropped: not text"] += 1
        elif not text.strip():
            counts["dropped: empty"] += 1
        elif not _is_unicode(text):
            counts["dropped: lone surrogates"] += 1
        elif not seen.add(xxhash.xxh3_64_intdigest(text.encode())):
            counts["dropped: duplicate"] += 1
        else:
            yield text


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


def _iter_texts(dataset: str) -> Iterator[object]:
    if not is_local(dataset):
        yield from (row["text"] for row in _load_from_hub(dataset))
        return
    for path in find_files(dataset):
        for line, record in iter_records(path):
            if isinstance(record, str):
                yield record
            elif isinstance(record, dict) and "text" in record:
                yield record["text"]
            else:
                found = (
                    f"has {', '.join(map(repr, record))}"
                    if isinstance(record, dict)
                    else "is no object"
                )
                raise input_error(path, line, f'expected {{"text": "…"}}; this record {found}.')


def _load_from_hub(name: str) -> Dataset:
    try:
        rows = load_dataset(name, split="train")
    except Exception as error:  # the Hub client raises a dozen kinds of errors
        cause = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(
            f"{name!r} is neither a file here nor a Hub dataset that can be reached "
            f"(set HF_ENDPOINT to use a mirror). Cause: {cause}"
        ) from error
    if "text" not in rows.column_names:
        raise ValueError(f"{name}: expected a 'text' column; found {rows.column_names}.")
    return rows


def corpus_hash(dataset: str) -> str:
    """Changes when the text changes: a hash of local files, or the fingerprint of Hub data."""
    return (
        content_hash(find_files(dataset))
        if is_local(dataset)
        else _load_from_hub(dataset)._fingerprint
    )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate from a JSON escape
        return False
    return True
