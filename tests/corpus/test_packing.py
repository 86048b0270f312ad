from collections import Counter
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corpus.packing import PackedCollator, best_fit, pack_segments, row_length, split_windows
from kernels import IGNORE_INDEX

PAD = 7


@st.composite
def lengths_and_capacity(draw, smallest: int = 1):
    capacity = draw(st.integers(smallest, 64))
    # The same few lengths again and again are the hard case: they leave the same gap everywhere.
    runs = draw(st.lists(st.tuples(st.integers(1, capacity), st.integers(1, 40)), max_size=4))
    return [length for length, count in runs for _ in range(count)], capacity


def consecutive(lengths) -> list[tuple[int, int]]:
    """Segments of these lengths, one behind the other."""
    return list(zip(accumulate(lengths, initial=0), lengths, strict=False))


def brute_force_spaces(lengths, capacity) -> list[int]:
    """The space that best-fit-decreasing leaves in each row."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in spaces if space >= length]
        if fitting:
            spaces.remove(min(fitting))
        spaces.append((min(fitting) if fitting else capacity) - length)
    return sorted(spaces)


def padding(rows, capacity) -> float:
    return 1 - sum(map(row_length, rows)) / (len(rows) * capacity)


def assert_lossless(rows, segments, capacity):
    places = sorted(segment for row in rows for segment in row)
    assert all(length > 0 for _, length in places)
    tokens = Counter(token for start, length in places for token in range(start, start + length))
    assert tokens == Counter(range(sum(length for _, length in segments)))
    assert all(0 < row_length(row) <= capacity for row in rows)


@given(lengths_and_capacity())
def test_best_fit_places_each_item_once_in_rows_as_full_as_a_brute_force_makes_them(case):
    lengths, capacity = case
    rows = best_fit(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    spaces = [capacity - sum(lengths[index] for index in row) for row in rows]
    assert sorted(spaces) == brute_force_spaces(lengths, capacity)
    assert min(spaces, default=0) >= 0


@given(length=st.integers(1, 5000), capacity=st.integers(3, 600))
def test_windows_cover_a_document_and_each_has_a_target_if_the_document_has(length, capacity):
    windows = split_windows(length, capacity)
    assert sum(windows) == length
    assert max(windows) <= capacity
    assert min(windows) > 1 or length == 1
    assert len(windows) == -(-length // capacity)


@given(lengths_and_capacity())
def test_packing_keeps_every_token_exactly_once_and_no_row_overflows(case):
    lengths, capacity = case
    segments = consecutive(lengths)
    rows, cuts = pack_segments(segments, capacity)
    assert_lossless(rows, segments, capacity)
    assert sum(map(len, rows)) == len(segments) + cuts
    assert len(rows) <= len(best_fit(lengths, capacity))


@given(lengths_and_capacity(smallest=8))
def test_a_cut_leaves_no_piece_without_a_target(case):
    segments = consecutive(case[0])
    rows, _ = pack_segments(segments, case[1])
    pieces = {segment for row in rows for segment in row if segment[1] == 1}
    assert pieces <= set(segments)


def test_three_tokens_are_not_parted_over_gaps_of_two():
    segments = consecutive([6] * 8 + [3])
    rows, _ = pack_segments(segments, capacity=8)
    assert_lossless(rows, segments, 8)
    assert all(length > 1 for row in rows for _, length in row)


@given(lengths_and_capacity())
def test_documents_are_cut_only_where_best_fit_alone_pads_too_much(case):
    lengths, capacity = case
    limit = 0.3
    whole = best_fit(lengths, capacity)
    _, cuts = pack_segments(consecutive(lengths), capacity, max_padding=limit)
    if lengths and 1 - sum(lengths) / (len(whole) * capacity) <= limit:
        assert cuts == 0


@pytest.mark.parametrize("capacity", [64, 256, 512])
def test_padding_stays_under_one_percent_though_no_two_documents_fit_together(capacity):
    segments = consecutive([int(0.6 * capacity)] * 600)
    assert padding([[segment] for segment in segments], capacity) > 0.39
    rows, cuts = pack_segments(segments, capacity)
    assert_lossless(rows, segments, capacity)
    assert len(rows) >= 300
    assert padding(rows, capacity) < 0.01
    assert 0 < cuts <= len(segments)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("capacity", [64, 512])
def test_padding_stays_under_one_percent_for_documents_of_mixed_lengths(capacity, seed):
    choose = np.random.default_rng(seed)
    lengths = choose.integers(choose.integers(1, capacity // 2), capacity + 1, 600).tolist()
    rows, _ = pack_segments(consecutive(lengths), capacity)
    assert_lossless(rows, consecutive(lengths), capacity)
    assert padding(rows, capacity) < 0.01


def test_nothing_is_cut_where_a_cut_would_save_no_row():
    _, cuts = pack_segments(consecutive([6, 6]), capacity=10)
    assert cuts == 0


def test_the_emptiest_row_is_the_one_whose_documents_are_cut():
    segments = consecutive([98] * 20 + [30])
    rows, cuts = pack_segments(segments, capacity=100)
    assert cuts > 0
    assert set(segments[:20]) <= {segment for row in rows for segment in row}


def test_nothing_to_pack_gives_no_rows():
    assert pack_segments([], 8) == ([], 0)


def test_a_batch_is_padded_and_only_tokens_behind_another_of_their_document_are_targets():
    rows = [
        {"input_ids": [10, 11, 12, 20, 21], "position_ids": [0, 1, 2, 0, 1]},
        {"input_ids": [30], "position_ids": [0]},
    ]
    batch = PackedCollator(6, PAD)(rows)
    none = IGNORE_INDEX
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[10, 11, 12, 20, 21, PAD], [30] + [PAD] * 5],
        "position_ids": [[0, 1, 2, 0, 1, 0], [0] * 6],
        "labels": [[none, 11, 12, none, 21, none], [none] * 6],
        "attention_mask": [[1, 1, 1, 1, 1, 0], [1] + [0] * 5],
        "cu_seq_lens_q": [0, 3, 5, 6, 7, 12],
    }
    assert batch.pop("cu_seq_lens_q").dtype == torch.int32
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_the_targets_that_a_stage_chose_are_kept_but_never_a_first_token():
    row = {
        "input_ids": [1, 2, 3, 4, 5],
        "position_ids": [0, 1, 2, 0, 1],
        "labels": [1, IGNORE_INDEX, 3, 4, IGNORE_INDEX],
    }
    labels = PackedCollator(6, PAD)([row])["labels"]
    assert labels.tolist() == [[IGNORE_INDEX, IGNORE_INDEX, 3] + [IGNORE_INDEX] * 3]


def test_a_batch_of_no_rows_is_one_row_of_padding():
    batch = PackedCollator(4, PAD)([])
    assert batch["input_ids"].tolist() == [[PAD] * 4]
    assert batch["labels"].tolist() == [[IGNORE_INDEX] * 4]
    assert batch["attention_mask"].sum() == batch["position_ids"].sum() == 0
    assert batch.pop("cu_seq_lens_q").tolist() == [0, 4]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_row_longer_than_the_model_takes_is_refused_and_not_cut():
    with pytest.raises(ValueError, match="broadcast"):
        PackedCollator(2, PAD)([{"input_ids": [1, 2, 3], "position_ids": [0, 1, 2]}])


def test_the_full_batch_that_a_memory_test_runs_is_as_large_as_any_can_be():
    collate = PackedCollator(4, PAD)
    full = {"input_ids": [1, 2, 3, 4], "position_ids": [0, 1, 2, 3]}
    largest = collate([full] * 3)
    batch = collate.full_batch(3)
    for name in ("input_ids", "position_ids", "labels", "attention_mask"):
        assert batch[name].shape == largest[name].shape
        assert batch[name].dtype == largest[name].dtype
    assert batch["attention_mask"].all()
    assert (batch["labels"] != IGNORE_INDEX).sum() >= (largest["labels"] != IGNORE_INDEX).sum()
