"""The cache of the three stages: how texts are split, what is written once, what is refused."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from recipes import TextRecipe, write_records

from corpus import cache
from corpus.cache import (
    SPLITS,
    Data,
    Options,
    cached_splits,
    check_splits,
    data_fingerprint,
    open_rows,
    target_bytes,
)
from corpus.choice import question_hash
from corpus.packing import PackedCollator
from dpo_data import prepare_dpo_data
from kernels import IGNORE_INDEX
from sft_data import prepare_sft_data
from tokenizer import encode_plain, token_byte_lengths

PAD = 7
TEXTS = [f"text {number}" for number in range(2000)]


def data_of(folder: Path, texts: list[str], **options) -> Data:
    """The texts as a corpus whose cache is folder/cache."""
    path = write_records(folder / "a.jsonl", [{"text": text} for text in texts])
    return Data(str(path), Options(cache_dir=folder / "cache", **options))


def split_texts(folder: Path, texts: list[str], **options) -> dict[str, list[str]]:
    """The texts of each split."""
    with data_of(folder, texts, **options) as data:
        rows, counts = cached_splits("sft", data, TextRecipe, [])
    assert counts["read"] == len(texts)
    assert counts["texts"] == len(set(texts))
    return {name: list(rows[name]["text"]) for name in SPLITS}


def share(text: str) -> float:
    """Where the hash of a text's question stands between 0 and 1."""
    return question_hash(TextRecipe().question(text)) / 2**64


def folders(cache_dir: Path) -> list[str]:
    return sorted(path.name for path in cache_dir.iterdir() if path.is_dir())


# --- how texts are split ------------------------------------------------------------------------


def test_shares_are_uniform_and_depend_on_the_text_alone():
    shares = [share(text) for text in TEXTS]
    assert shares == [share(text) for text in TEXTS]
    assert all(0 <= share < 1 for share in shares)
    assert sum(share < 0.25 for share in shares) == pytest.approx(500, abs=100)


@pytest.mark.parametrize("ratio", [0.002, 0.25, 0.998])
def test_a_text_is_held_out_when_its_hash_is_below_the_ratio_whatever_comes_with_it(
    tmp_path, ratio
):
    for texts in (TEXTS, TEXTS[::-1], TEXTS * 2):
        once = list(dict.fromkeys(texts))
        splits = split_texts(tmp_path, texts, validation_ratio=ratio)
        assert splits["validation"] == [text for text in once if share(text) < ratio]
        assert splits["train"] == [text for text in once if share(text) >= ratio]


@pytest.mark.parametrize("ratio", [1e-9, 1 - 1e-9], ids=["all training", "all validation"])
@pytest.mark.parametrize("count", [2, 3, 40])
def test_when_all_fall_to_one_side_only_the_question_of_the_smallest_hash_is_held_out(
    tmp_path, ratio, count
):
    texts = [f"{text}?{answer}" for answer in "ab" for text in TEXTS[:count]]
    splits = split_texts(tmp_path, texts, validation_ratio=ratio)
    smallest = min(TEXTS[:count], key=share)
    assert splits["validation"] == [f"{smallest}?a", f"{smallest}?b"]
    assert splits["train"] == [text for text in texts if not text.startswith(f"{smallest}?")]


@pytest.mark.parametrize("ratio", [1e-9, 0.5, 1 - 1e-9])
def test_of_one_question_nothing_is_held_out_and_the_split_is_refused(tmp_path, ratio):
    texts = ["alone?a", "alone?b", "alone?c"]
    splits = split_texts(tmp_path, texts, validation_ratio=ratio)
    assert splits == {"train": texts, "validation": []}
    rows = DatasetDict({name: Dataset.from_dict({"text": splits[name]}) for name in SPLITS})
    with pytest.raises(ValueError, match=r"a\.jsonl: every usable record asks the same question"):
        check_splits(rows, "a.jsonl")


@pytest.mark.parametrize("tokens", [1, 50, 3000])
def test_rows_of_validation_have_at_most_the_tokens_that_are_asked_for(tmp_path, tokens):
    splits = split_texts(tmp_path, TEXTS, validation_ratio=0.5, validation_tokens=tokens)
    size = sum(map(len, splits["validation"]))
    assert tokens - 10 < size <= tokens or len(splits["validation"]) == 1
    held_out = sorted(TEXTS, key=share)[: len(splits["validation"])]
    assert sorted(splits["validation"]) == sorted(held_out)
    assert not set(splits["train"]) & set(splits["validation"])


def test_two_splits_with_rows_pass_the_check_and_none_of_both_may_be_empty():
    full, empty = Dataset.from_dict({"text": ["a"]}), Dataset.from_dict({"text": []})
    check_splits(DatasetDict(train=full, validation=full), "a.jsonl")
    for splits in (DatasetDict(train=empty, validation=full), DatasetDict(train=full, test=empty)):
        with pytest.raises(
            ValueError, match="Add records with at least one other question"
        ) as caught:
            check_splits(splits, "a.jsonl")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5, float("nan")])
def test_a_ratio_that_is_none_is_refused(ratio):
    with pytest.raises(ValueError, match=f"validation_ratio={ratio} must be between 0 and 1"):
        Options(validation_ratio=ratio)


# --- what is written once -----------------------------------------------------------------------


def test_rows_are_written_once_and_anew_for_other_settings(tmp_path, capsys):
    class Unread(TextRecipe):
        def parse(self, record):
            pytest.fail("the rows were there")

    data = data_of(tmp_path, TEXTS)
    rows, counts = cached_splits("sft", data, TextRecipe, ["one"])
    again, same = cached_splits("sft", data_of(tmp_path, TEXTS), Unread, ["one"])
    assert counts == same and counts["texts"] == len(TEXTS)
    assert capsys.readouterr().out == f"Tokenizing {tmp_path}/a.jsonl …\n"
    for name in SPLITS:
        assert list(rows[name]) == list(again[name])
        assert data_fingerprint(rows[name]) == data_fingerprint(again[name])
    seen = {data_fingerprint(rows["train"])}
    for stage, settings, options in (
        ("dpo", ["one"], {}),
        ("sft", [1], {}),
        ("sft", ["one"], {"validation_ratio": 0.3}),
        ("sft", ["one"], {"validation_tokens": 500}),
        ("sft", ["one"], {"max_dataset_bytes": 500}),
    ):
        other, _ = cached_splits(stage, data_of(tmp_path, TEXTS, **options), TextRecipe, settings)
        seen.add(data_fingerprint(other["train"]))
    path = str(tmp_path / "a.jsonl")
    for dataset in ({path: 1.0}, [path, path]):
        other, _ = cached_splits("sft", Data(dataset, data.options), TextRecipe, ["one"])
        seen.add(data_fingerprint(other["train"]))
    assert len(seen) == 8
    # What no row depends on does not make new ones.
    options = {"num_proc": 2, "verify_data": True}
    other, _ = cached_splits("sft", data_of(tmp_path, TEXTS, **options), Unread, ["one"])
    assert data_fingerprint(other["train"]) in seen


def test_a_recipe_that_dies_leaves_no_half_cache_and_the_next_call_works(tmp_path):
    class Dying(TextRecipe):
        def pack(self, texts, counts):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), data_of(tmp_path, TEXTS) as data:
        cached_splits("sft", data, Dying, [])
    assert folders(tmp_path / "cache") == []
    splits = split_texts(tmp_path, TEXTS)
    assert sorted(splits["train"] + splits["validation"]) == sorted(TEXTS)
    assert len(folders(tmp_path / "cache")) == 1


def test_the_first_pass_happens_once(tmp_path):
    data = data_of(tmp_path, TEXTS)
    index = data.index(TextRecipe())
    (tmp_path / "a.jsonl").unlink()
    assert data.index(TextRecipe()) is index
    assert len(data.choice(TextRecipe())) == len(TEXTS)


def test_a_number_that_follows_from_rows_is_computed_once_and_kept_beside_them(tmp_path):
    calls = []

    def compute() -> float:
        calls.append(1)
        return 0.1 + 0.2

    rows, _ = cached_splits("sft", data_of(tmp_path, TEXTS), TextRecipe, [])
    for _ in range(3):
        assert cache.remember(rows["train"], "loss", compute) == 0.1 + 0.2
    assert len(calls) == 1
    again, _ = cached_splits("sft", data_of(tmp_path, TEXTS), TextRecipe, [])
    assert cache.remember(again["train"], "loss", lambda: pytest.fail("it was known")) == 0.1 + 0.2
    assert cache.remember(again["train"], "other", lambda: 7.0) == 7.0
    # Rows that are no file are computed with each time.
    loose = Dataset.from_dict({"text": ["a"]})
    for _ in range(2):
        cache.remember(loose, "loss", compute)
    assert len(calls) == 3


def test_of_several_that_ask_for_a_number_at_once_one_computes_it(tmp_path):
    rows, _ = cached_splits("sft", data_of(tmp_path, TEXTS), TextRecipe, [])
    calls = []

    def compute() -> float:
        calls.append(1)
        time.sleep(0.3)  # the others come meanwhile
        return 0.5

    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(cache.remember, rows["train"], "loss", compute) for _ in range(4)]
    assert [future.result() for future in asked] == [0.5] * 4
    assert len(calls) == 1


def test_statistics_name_what_was_dropped(tmp_path):
    _, counts = cached_splits("sft", data_of(tmp_path, [*TEXTS, "", TEXTS[0]]), TextRecipe, [])
    assert cache.dropped(counts) == "1 empty, 1 duplicate"
    assert cache.dropped({"read": 3, "dropped: empty": 0}) == "none"
    (folder,) = (tmp_path / "cache").glob("sft-*")
    assert json.loads((folder / "statistics.json").read_text()) == counts


def test_the_options_of_a_stage_are_keys_of_its_configuration():
    config = {"validation_tokens": 5, "max_dataset_bytes": None, "num_proc": 2, "verify_data": True}
    options = Options(**cache.options_of(config | {"output_dir": "out", "seed": 1}))
    assert options == Options("out/cache", 0.05, 5, None, 2, True)


# --- rows ---------------------------------------------------------------------------------------


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
