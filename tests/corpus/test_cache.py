"""The cache of the three stages: how texts are split, what is written once, what is refused."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict

from corpus.cache import (
    SPLITS,
    cached_splits,
    check_splits,
    data_fingerprint,
    open_rows,
    split_share,
    target_bytes,
)
from corpus.packing import PackedCollator
from dpo_data import prepare_dpo_data
from kernels import IGNORE_INDEX
from sft_data import prepare_sft_data
from tokenizer import encode_plain, token_byte_lengths

PAD = 7
TEXTS = [f"text {number}" for number in range(2000)]


def writer_of(texts: list[str]):
    """What a stage gives to cached_splits: each text is one row."""

    def write(folder: Path, split):
        chosen: dict[str, list[str]] = {name: [] for name in SPLITS}
        for text in texts:
            chosen[split(text)].append(text)
        for name, column in chosen.items():
            batch = pa.record_batch({"text": pa.array(column, pa.string())})
            with pa.ipc.new_stream(str(folder / f"{name}.arrow"), batch.schema) as stream:
                stream.write_batch(batch)
        (folder / "statistics.json").write_text(json.dumps({"texts": len(texts)}))

    return write


def split_texts(cache, texts: list[str], ratio: float) -> dict[str, list[str]]:
    """The texts of each split, from a cache folder of their own."""
    rows, counts = cached_splits("sft", "a.jsonl", texts, ratio, str(cache), writer_of(texts))
    assert counts == {"texts": len(texts)}
    return {name: list(rows[name]["text"]) for name in SPLITS}


def test_shares_are_uniform_and_depend_on_the_text_alone():
    shares = [split_share(text) for text in TEXTS]
    assert shares == [split_share(text) for text in TEXTS]
    assert all(0 <= share < 1 for share in shares)
    assert sum(share < 0.25 for share in shares) == pytest.approx(500, abs=100)


@pytest.mark.parametrize("ratio", [0.002, 0.25, 0.998])
def test_a_text_is_held_out_when_its_share_is_below_the_ratio_whatever_comes_with_it(
    tmp_path, ratio
):
    for texts in (TEXTS, TEXTS[::-1], TEXTS * 2):
        splits = split_texts(tmp_path, texts, ratio)
        assert splits["validation"] == [text for text in texts if split_share(text) < ratio]
        assert splits["train"] == [text for text in texts if split_share(text) >= ratio]


@pytest.mark.parametrize("ratio", [1e-9, 1 - 1e-9], ids=["all training", "all validation"])
@pytest.mark.parametrize("count", [2, 3, 40])
def test_when_all_fall_to_one_side_only_the_text_of_the_smallest_share_is_held_out(
    tmp_path, ratio, count
):
    texts = TEXTS[:count] * 2
    splits = split_texts(tmp_path, texts, ratio)
    smallest = min(texts, key=split_share)
    assert splits["validation"] == [smallest, smallest]
    assert splits["train"] == [text for text in texts if text != smallest]


@pytest.mark.parametrize("ratio", [1e-9, 0.5, 1 - 1e-9])
def test_of_one_text_nothing_is_held_out_and_the_split_is_refused(tmp_path, ratio):
    splits = split_texts(tmp_path, ["alone"] * 3, ratio)
    assert splits == {"train": ["alone"] * 3, "validation": []}
    rows = DatasetDict({name: Dataset.from_dict({"text": splits[name]}) for name in SPLITS})
    with pytest.raises(ValueError, match=r"a\.jsonl: every usable record asks the same question"):
        check_splits(rows, "a.jsonl")


def test_two_splits_with_rows_pass_the_check_and_none_of_both_may_be_empty():
    full, empty = Dataset.from_dict({"text": ["a"]}), Dataset.from_dict({"text": []})
    check_splits(DatasetDict(train=full, validation=full), "a.jsonl")
    for splits in (DatasetDict(train=empty, validation=full), DatasetDict(train=full, test=empty)):
        with pytest.raises(
            ValueError, match="Add records with at least one other question"
        ) as caught:
            check_splits(splits, "a.jsonl")
        assert "\n" not in str(caught.value)


def test_rows_are_written_once_and_anew_for_other_settings(tmp_path, capsys):
    def write_again(folder, split):
        pytest.fail("the rows were there")

    arguments = ("sft", "a.jsonl")
    rows, _ = cached_splits(*arguments, ["one"], 0.25, str(tmp_path), writer_of(TEXTS))
    again, counts = cached_splits(*arguments, ["one"], 0.25, str(tmp_path), write_again)
    assert counts == {"texts": len(TEXTS)}
    assert capsys.readouterr().out == "Tokenizing a.jsonl …\n"
    for name in SPLITS:
        assert list(rows[name]) == list(again[name])
        assert data_fingerprint(rows[name]) == data_fingerprint(again[name])
    for stage, settings, ratio in (
        ("dpo", ["one"], 0.25),
        ("sft", [1], 0.25),
        ("sft", ["one"], 0.3),
    ):
        other, _ = cached_splits(stage, "a", settings, ratio, str(tmp_path), writer_of(TEXTS))
        assert data_fingerprint(other["train"]) != data_fingerprint(rows["train"])


def test_a_writer_that_dies_leaves_no_half_cache_and_the_next_call_works(tmp_path):
    def die(folder, split):
        writer_of(TEXTS[:5])(folder, split)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_splits("sft", "a.jsonl", TEXTS, 0.25, str(tmp_path), die)
    assert os.listdir(tmp_path) == [".lock"]
    splits = split_texts(tmp_path, TEXTS, 0.25)
    assert sorted(splits["train"] + splits["validation"]) == sorted(TEXTS)


def test_target_bytes_count_exactly_the_tokens_that_the_collator_makes_targets(tokenizer):
    ids = encode_plain(tokenizer, ["天地 玄黄 quick, 宇宙😀"])[0]
    positions = [*range(5), *range(len(ids) - 5)]
    chosen = [token if place % 3 else IGNORE_INDEX for place, token in enumerate(ids)]
    lengths = token_byte_lengths(tokenizer)
    for labels in ({}, {"labels": [chosen]}):
        rows = Dataset.from_dict({"input_ids": [ids], "position_ids": [positions], **labels})
        targets = PackedCollator(len(ids), PAD)([rows[0]])["labels"]
        expected = lengths[targets[targets >= 0].numpy()].sum()
        assert target_bytes(rows, tokenizer) == expected


def test_the_fingerprint_of_rows_names_their_cache_folder_even_of_a_part_of_them(tmp_path):
    folder = tmp_path / "pretrain-0123"
    Dataset.from_dict({"input_ids": [[1], [2]]}).save_to_disk(folder)
    rows = open_rows(next(folder.glob("*.arrow")))
    assert data_fingerprint(rows) == "pretrain-0123"
    assert data_fingerprint(rows.select([1])) == "pretrain-0123"


@pytest.mark.parametrize("prepare", [prepare_sft_data, prepare_dpo_data])
def test_rows_too_short_for_a_conversation_are_refused_before_anything_is_read(
    tmp_path, tokenizer, prepare
):
    with pytest.raises(ValueError, match="max_length=31 must be at least 32 tokens"):
        prepare(tokenizer, "absent.jsonl", 31, cache_dir=str(tmp_path))
    assert os.listdir(tmp_path) == []
