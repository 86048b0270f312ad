"""Many documents in one row: best-fit packing, and the collator of packed rows.

Documents in a row are told apart by position_ids that restart at 0 (Hugging Face's padding-free
convention): attention never crosses a document, and its first token is never a target.
"""

import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from kernels import IGNORE_INDEX

Segment = tuple[int, int]  # (start, length) of consecutive tokens


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the items of each row. Longest first, each goes into the fullest row that fits it.

    That row is found in O(1): bit s of `spaces` says that some row has s tokens left.
    Every length must be in 1..capacity.
    """
    rows: list[list[int]] = []
    rows_with_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[index])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = rows_with_space[space].pop()
            if not rows_with_space[space]:
                spaces &= ~(1 << space)
        else:
            row, space = len(rows), capacity
            rows.append([])
        rows[row].append(index)
        if space > length:
            rows_with_space[space - length].append(row)
            spaces |= 1 << (space - length)
    return rows


def split_windows(length: int, capacity: int) -> list[int]:
    """Lengths of the consecutive windows of a document. The last has at least two tokens."""
    windows = [capacity] * (length // capacity)
    rest = length % capacity
    if rest == 1 and windows and capacity > 2:
        windows[-1] -= 1
        rest += 1
    return windows + ([rest] if rest else [])


def pack_segments(
    segments: list[Segment], capacity: int, max_padding: float = 0.005
) -> tuple[list[list[Segment]], int]:
    """Rows of segments. Padding is at most `max_padding` of all places, where that is possible.

    Best-fit leaves large gaps when no two documents fit together, such as documents of 300 tokens
    in rows of 512. Then the documents of the emptiest rows are cut and fill the gaps of the other
    rows. A cut costs one target. Nothing is dropped.

    Returns (rows, number of cuts).
    """
    packed = best_fit([length for _, length in segments], capacity)
    rows = [[segments[index] for index in row] for row in packed]
    rows.sort(key=row_length)  # the emptiest first
    total = sum(map(row_length, rows))
    enough = math.ceil(total / (capacity * (1 - max_padding)))
    excess = max(0, len(rows) - enough)
    emptied, rows = rows[:excess], rows[excess:]
    gaps = [capacity - row_length(row) for row in rows]
    fragment = max(2, capacity // 128)  # a shorter piece is not cut off
    left_over: list[Segment] = []
    taker = cuts = 0
    for start, length in (segment for row in emptied for segment in row):
        while length and taker < len(rows):
            if gaps[taker] < min(fragment, length):
                taker += 1
                continue
            part = min(length, gaps[taker])
            if length - part == 1:  # leave no fragment without a target
                if part == 2:
                    break
                part -= 1
            rows[taker].append((start, part))
            gaps[taker] -= part
            start, length = start + part, length - part
            cuts += length > 0
        if length:
            left_over.append((start, length))
    for row in best_fit([length for _, length in left_over], capacity):
        rows.append([left_over[index] for index in row])
    return rows, cuts


def row_length(row: list[Segment]) -> int:
    return sum(length for _, length in row)


def row_types(vocab_size: int, max_length: int) -> dict[str, type]:
    """The smallest types of the columns that all packed rows have."""
    small, large = np.uint16, np.uint32
    ids = small if vocab_size <= 2**16 else large
    return {"input_ids": ids, "position_ids": small if max_length <= 2**16 else large}


def list_schema(types: dict[str, type]) -> pa.Schema:
    return pa.schema([(name, pa.list_(pa.from_numpy_dtype(kind))) for name, kind in types.items()])


def list_rows(lengths: list[int], columns: list[np.ndarray], schema: pa.Schema) -> pa.RecordBatch:
    """Rows of these lengths, cut from flat columns."""
    ends = np.cumsum([0, *lengths], dtype=np.int32)
    arrays = [
        pa.ListArray.from_arrays(ends, column.astype(field.type.value_type.to_pandas_dtype()))
        for column, field in zip(columns, schema, strict=True)
    ]
    return pa.record_batch(arrays, schema=schema)


class PackedCollator:
    """Rows of unequal length -> int64 tensors (batch, max_length), padded on the right.

    A row holds input_ids and position_ids, and labels if the stage chooses its targets. Without
    labels every token is a target except each document's first. The batch also has attention_mask,
    0 at padding, and cu_seq_lens_q, int32 (documents + 1,): where each document of the flattened
    rows starts (a row's padding counts as one), and the end. Found here, no GPU waits for it.
    A batch of no rows gives one row of padding: a rank's share of an epoch's last step.
    """

    def __init__(self, max_length: int, pad_token_id: int):
        self.row_length, self.pad_token_id = max_length, pad_token_id

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        shape = (max(len(rows), 1), self.row_length)
        batch: dict[str, np.ndarray] = {
            "input_ids": np.full(shape, self.pad_token_id, dtype=np.int64),
            "position_ids": np.zeros(shape, dtype=np.int64),
            "labels": np.full(shape, IGNORE_INDEX, dtype=np.int64),
            "attention_mask": np.zeros(shape, dtype=np.int64),
        }
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][index, :length] = row["input_ids"]
            batch["position_ids"][index, :length] = row["position_ids"]
            batch["labels"][index, :length] = row.get("labels", row["input_ids"])
            batch["attention_mask"][index, :length] = 1
        is_first = batch["position_ids"] == 0
        batch["labels"][is_first] = IGNORE_INDEX
        is_first[:, 1:] &= batch["attention_mask"][:, :-1] > 0  # only the first token of padding
        starts = np.append(np.flatnonzero(is_first), is_first.size)
        batch["cu_seq_lens_q"] = starts.astype(np.int32)
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def full_batch(self, batch_size: int) -> dict[str, torch.Tensor]:
        """The largest batch there can be: every row is a full document."""
        row = {"input_ids": np.ones(self.row_length), "position_ids": np.arange(self.row_length)}
        return self([row] * batch_size)
