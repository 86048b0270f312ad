"""What becomes of each record: left out, trained on, or held out. The hashes of all decide."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

LEAVE_OUT, TRAIN, VALIDATION = 0, 1, 2
# For each validation token that is asked for, this many bytes of text are held out. A token of
# Chinese text has more: rows are taken from what is held out until there are enough tokens.
BYTES_PER_TOKEN = 3
REHASH = np.uint64(0x9E3779B97F4A7C15)  # a product with this odd number is a hash of a hash


@dataclass
class Index:
    """What the first pass found of the usable records, in their order."""

    identities: np.ndarray  # uint64 (records,): equal for duplicates
    questions: np.ndarray  # uint64 (records,): hashes that decide the split
    sizes: np.ndarray  # uint32 (records,): UTF-8 bytes of text
    datasets: np.ndarray  # uint16 (records,)
    per_portion: list[int]  # usable records of each portion
    portion_bytes: list[int]
    counts: Counter  # what was read, and what was dropped for which reason
    aside: Path  # the folder with the items of each portion

    def __post_init__(self):
        self.is_first = np.zeros(len(self.identities), dtype=bool)
        self.is_first[np.unique(self.identities, return_index=True)[1]] = True
        if duplicates := int((~self.is_first).sum()):
            self.counts["dropped: duplicate"] += duplicates


def question_hash(text: str) -> int:
    """Decides the split of a document or a question, and depends on the text alone."""
    return xxhash.xxh3_64_intdigest(text.encode(), seed=1)


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
