import random
from collections import Counter

import pytest
from tiny import write_jsonl

from corpus.documents import SeenHashes, document_of, iter_documents
from corpus.readers import Dropped, FormatError
from train_data import prepare_data


@pytest.mark.parametrize("limit", [1, 7, 1000])
def test_a_hash_is_new_once_wherever_it_is_kept(limit):
    choose, seen, expected = random.Random(0), SeenHashes(limit), set()
    for _ in range(3000):
        digest = choose.randrange(2**64 - 500, 2**64)  # where floats would already be equal
        assert seen.add(digest) == (digest not in expected)
        expected.add(digest)
    assert len(seen.sorted) + len(seen.newest) == len(expected)


def test_every_document_comes_once_and_in_order(tmp_path):
    texts = ["天地", "玄黄", "天地", " ", "宇宙", "玄黄"]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    counts = Counter()
    assert list(iter_documents(path, counts=counts)) == ["天地", "玄黄", "宇宙"]
    assert counts == {"read": 6, "dropped: duplicate": 2, "dropped: empty": 1}


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"text": "a"}, "a"),
        ({"content": "a"}, "a"),
        ({"completion": "a"}, "a"),
        ({"completion": "c", "content": "b", "text": "a"}, "a"),
        ({"completion": "c", "title": "d", "content": "b"}, "b"),
        ("a paragraph", "a paragraph"),
    ],
)
def test_the_text_of_a_record_is_its_text_or_content_or_completion_in_this_order(record, text):
    assert document_of(record) == text


def test_a_column_that_is_named_is_the_only_one_that_counts():
    record = {"text": "a", "content": "b", "body": "c"}
    assert document_of(record, "body") == "c"
    assert document_of(record, "content") == "b"
    assert document_of("a paragraph", "body") == "a paragraph"
    message = (
        """expected {"body": "…"}; this record has 'text'. --text_column names another column"""
    )
    with pytest.raises(FormatError) as caught:
        document_of({"text": "a"}, "body")
    assert str(caught.value) == message
    message = 'expected {"text": "…"} or "content" or "completion"; this record is no object. '
    with pytest.raises(FormatError, match=message):
        document_of(["a"])


@pytest.mark.parametrize(("asked", "name"), [("prompt", "completion"), ("input", "content")])
def test_half_of_a_conversation_is_no_document_unless_it_is_asked_for(asked, name):
    record = {asked: "问", name: "答"}
    message = (
        rf'"{asked}" and "{name}" are a conversation, for sft_train\.py\. --text_column {name} '
    )
    with pytest.raises(FormatError, match=message):
        document_of(record)
    assert document_of(record, name) == "答"
    assert document_of(record | {"text": "文"}) == "文"
    assert document_of({asked: None, name: "文"}) == "文"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "not text"),
        (3, "not text"),
        (["a"], "not text"),
        ("", "empty"),
        (" \n\t\u3000", "empty"),
        ("a\ud800b", "lone surrogates"),
    ],
)
def test_text_that_is_of_no_use_is_dropped_for_a_reason_even_where_another_column_has_some(
    text, reason
):
    with pytest.raises(Dropped) as caught:
        document_of({"text": text, "content": "b"})
    assert str(caught.value) == reason


@pytest.mark.parametrize("column", [None, "content", "body"])
def test_a_column_of_the_corpus_is_trained_on(tmp_path, tokenizer_folder, column):
    name = column or "completion"
    texts = [f"{number:07d}" for number in range(100)]
    records = [{"title": "标题", name: text, "url": "u"} for text in texts]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    options = {"text_column": column, "cache_dir": tmp_path / "cache", "num_proc": 1}
    splits, tokenizer = prepare_data(tokenizer_folder, path, 32, **options)
    shown = "".join(tokenizer.decode(row["input_ids"]) for rows in splits.values() for row in rows)
    assert sorted(shown.split(tokenizer.eos_token)) == ["", *texts]
    assert list(iter_documents(path, text_column=column)) == texts


def test_other_columns_are_not_mixed_up_with_the_cached_rows_of_one(tmp_path, tokenizer_folder):
    records = [{"text": f"{n:07d}", "body": f"{n + 500:07d}"} for n in range(100)]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    options = {"cache_dir": tmp_path / "cache", "num_proc": 1}
    shown = [
        prepare_data(tokenizer_folder, path, 32, text_column=column, **options)[0]["train"][:]
        for column in ("text", "body", None)
    ]
    assert shown[0] != shown[1]
    assert shown[0] == shown[2]
