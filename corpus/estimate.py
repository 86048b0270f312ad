"""What a corpus comes to, by its first megabyte: its tokens, and how fast they are prepared."""

import time
from collections import Counter
from dataclasses import dataclass, replace

from corpus.cache import dropped
from corpus.preparation import Corpus, Recipe, cut, usable_items
from corpus.readers import Portion

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Estimate:
    """tokens, rows: of the whole corpus. tokens_per_second: that a core prepares, measured here."""

    tokens: float
    rows: float
    tokens_per_second: float
    bytes_per_token: float  # of the rows, on the disk


def first_megabyte(corpus: Corpus) -> Portion:
    """The first records of a corpus. The position is how many bytes of the file they take."""
    task = next(corpus.tasks(), None)
    if task is None:
        files = ", ".join(str(file) for files, _ in corpus.datasets for file in files[:1])
        raise ValueError(f"{files}: there is no record.")
    portion = task.portion
    if portion.size <= MEGABYTE:
        return portion
    first = cut(portion, MEGABYTE)
    stored = portion.position * first.size // portion.size  # fewer bytes than text, if compressed
    return replace(first, position=stored)


def text_bytes(corpus: Corpus, portion: Portion, max_bytes: float | None = None) -> float:
    """The text of all of the corpus, if it is as the first megabyte is."""
    size = corpus.stored_bytes() / max(1, portion.position) * portion.size
    return min(size, len(corpus.datasets) * max_bytes) if max_bytes else size


def estimate(
    corpus: Corpus, portion: Portion, recipe: Recipe, max_bytes: float | None = None
) -> Estimate:
    """Prepare the first megabyte and project it on all of the corpus.

    max_bytes: of text that will be read of each dataset, while its files may be compressed.

    Raises:
        ValueError: the megabyte holds nothing usable, or something broken.
    """
    counts: Counter = Counter()
    started = time.perf_counter()
    items = list(usable_items(recipe.parse, portion, counts))
    encoded = recipe.encode(items, counts) if items else []
    examples = [example for example in encoded if example is not None]
    if not examples:
        left_out = dropped(counts)
        problem = f"its first megabyte has nothing to train on (dropped: {left_out})."
        raise ValueError(f"{portion.path}: {problem}")
    rows = recipe.pack(examples, counts)
    seconds = time.perf_counter() - started
    megabytes = text_bytes(corpus, portion, max_bytes) / portion.size
    return Estimate(
        counts["tokens"] * megabytes,
        rows.num_rows * megabytes,
        counts["tokens"] / seconds,
        rows.nbytes / counts["tokens"],
    )
