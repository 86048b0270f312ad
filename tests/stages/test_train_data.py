"""Text to packed rows: no token is lost, no document changes its split, and a second call reads."""

import json
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from corpus.cache import data_fingerprint, target_bytes
from corpus.choice import question_hash
from corpus.documents import iter_documents
from corpus.packing import split_windows
from tokenizer import END_OF_TEXT, IM_END, SPECIAL_TOKENS, encode_plain
from train_data import inspect, prepare_data, unigram_loss

LENGTH = 32  # tokens in a row
# Seven digits, each a token, and the end of text: four of them fill a row and none is cut.
EVEN = [f"{number:07d}" for number in range(200)]
MAKES_TOKENIZER, MAKES_ROWS = "Training a ", "Tokenizing "  # what is printed where a cache is not


def write_records(folder: Path, records) -> str:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def write_texts(folder: Path, texts) -> str:
    return write_records(folder, [{"text": text} for text in texts])


@pytest.fixture
def prepare(tmp_path, tokenizer_folder):
    """prepare_data with a ready tokenizer, short rows and a cache of this test's own."""

    def run(dataset: str, **settings):
        defaults = {"tokenizer_path": tokenizer_folder, "max_seq_len": LENGTH}
        defaults["cache_dir"] = tmp_path / "cache"
        return prepare_data(dataset=dataset, **defaults | settings)

    return run


def pieces(rows: Dataset) -> list[list[int]]:
    """The runs of tokens between the places where position_ids restart."""
    found = []
    for row in rows:
        starts = np.flatnonzero(np.equal(row["position_ids"], 0))
        runs = [run.tolist() for run in np.split(row["input_ids"], starts[1:])]
        assert row["position_ids"] == [place for run in runs for place in range(len(run))]
        found += runs
    return found


def texts_of(rows: Dataset, tokenizer) -> set[str]:
    """Of documents that were not cut: each ends with the end of text."""
    documents = pieces(rows)
    assert all(document[-1] == tokenizer.eos_token_id for document in documents)
    return {tokenizer.decode(document[:-1]) for document in documents}


def all_texts(splits: DatasetDict, tokenizer) -> set[str]:
    return texts_of(splits["train"], tokenizer) | texts_of(splits["validation"], tokenizer)


def token_counts(splits: DatasetDict) -> Counter:
    return Counter(token for rows in splits.values() for row in rows for token in row["input_ids"])


def expected_counts(texts, tokenizer) -> Counter:
    ids = encode_plain(tokenizer, list(texts))
    return Counter(token for document in ids for token in [*document, tokenizer.eos_token_id])


def test_every_document_comes_back_whole_with_its_end_in_one_of_two_splits(tmp_path, prepare):
    splits, tokenizer = prepare(write_texts(tmp_path, EVEN), validation_ratio=0.2)
    assert isinstance(splits, DatasetDict)
    assert set(splits) == {"train", "validation"}
    assert token_counts(splits) == expected_counts(EVEN, tokenizer)
    train, held_out = (texts_of(splits[name], tokenizer) for name in ("train", "validation"))
    assert train | held_out == set(EVEN)
    assert not train & held_out
    assert 20 <= len(held_out) <= 60


def test_a_tokenizer_is_trained_on_the_corpus_where_none_is_given(tmp_path, prepare):
    texts = [f"乾坤{number}乾坤" for number in range(100)]
    dataset = write_texts(tmp_path, texts)
    splits, tokenizer = prepare(dataset, tokenizer_path=None, vocab_size=270)
    assert len(tokenizer) == 270
    assert len(encode_plain(tokenizer, ["乾坤"])[0]) == 1
    assert token_counts(splits) == expected_counts(texts, tokenizer)


@pytest.mark.parametrize(("documents", "expected"), [(99, "4,096"), (800, "6,400")])
def test_a_short_text_gets_a_smaller_vocabulary(tmp_path, prepare, capsys, documents, expected):
    texts = [f"{number} {'字' * 2000}" for number in range(documents)]  # 6 kB each
    options = {"tokenizer_path": None, "vocab_size": "auto", "tokenizer_megabytes": 0.1}
    prepare(write_texts(tmp_path, texts), **options)
    assert f"Training a {expected}-token tokenizer" in capsys.readouterr().out


def test_no_token_is_lost_or_invented_whatever_the_lengths(tmp_path, prepare):
    texts = [f"{number} " + "字a" * (number * 37 % 61) for number in range(150)]
    splits, tokenizer = prepare(write_texts(tmp_path, texts))
    assert token_counts(splits) == expected_counts(texts, tokenizer)
    for rows in splits.values():
        assert max(len(row["input_ids"]) for row in rows) <= LENGTH
        pieces(rows)


def test_a_long_document_is_split_into_consecutive_windows(tmp_path, prepare):
    novel = "".join(f"{number:05d}" for number in range(100))
    splits, tokenizer = prepare(write_texts(tmp_path, [novel]))
    (ids,) = encode_plain(tokenizer, [novel])
    document = " ".join(map(str, [*ids, tokenizer.eos_token_id]))
    windows = pieces(splits["train"]) + pieces(splits["validation"])
    windows.sort(key=lambda window: document.index(" ".join(map(str, window))))
    assert " ".join(str(token) for window in windows for token in window) == document
    assert list(map(len, windows)) == split_windows(501, LENGTH)
    assert len(splits["validation"]) == 1


def test_what_is_dropped_is_counted_and_printed(tmp_path, prepare, capsys):
    unusable = ["", " \n", None, 7, "\ud800", EVEN[0], EVEN[1], EVEN[1]]
    splits, tokenizer = prepare(write_texts(tmp_path, EVEN + unusable))
    assert all_texts(splits, tokenizer) == set(EVEN)
    output = capsys.readouterr().out
    assert "200 documents" in output
    for count in ("2 empty", "2 not text", "1 lone surrogates", "3 duplicate"):
        assert count in output
    assert "1,600 tokens, 0.88 characters/token" in output


def test_the_split_of_a_document_stays_when_documents_are_added_or_reordered(tmp_path, prepare):
    few, tokenizer = prepare(write_texts(tmp_path, EVEN[:120]), validation_ratio=0.2)
    more, _ = prepare(write_texts(tmp_path, EVEN[::-1]), validation_ratio=0.2)
    for name, other in (("train", "validation"), ("validation", "train")):
        before = texts_of(few[name], tokenizer)
        assert before
        assert before <= texts_of(more[name], tokenizer)
        assert not before & texts_of(more[other], tokenizer)


def test_a_second_call_reads_the_cache_and_neither_trains_nor_tokenizes(tmp_path, prepare, capsys):
    dataset = write_texts(tmp_path, EVEN)
    first, _ = prepare(dataset, tokenizer_path=None, vocab_size=260)
    assert MAKES_TOKENIZER in (printed := capsys.readouterr().out) and MAKES_ROWS in printed
    renamed = str(Path(dataset).rename(tmp_path / "renamed.jsonl"))
    second, _ = prepare(renamed, tokenizer_path=None, vocab_size=260)
    assert MAKES_TOKENIZER not in (printed := capsys.readouterr().out) and MAKES_ROWS not in printed
    for name in first:
        assert first[name].to_dict() == second[name].to_dict()
        assert data_fingerprint(first[name]) == data_fingerprint(second[name])


def test_a_changed_byte_is_noticed_though_size_and_date_are_the_same(tmp_path, prepare):
    dataset = write_texts(tmp_path, EVEN)
    first, _ = prepare(dataset)
    date = os.stat(dataset).st_mtime_ns
    write_texts(tmp_path, [*EVEN[:-1], "9999999"])
    os.utime(dataset, ns=(date, date))
    second, tokenizer = prepare(dataset)
    assert "9999999" in all_texts(second, tokenizer)
    assert data_fingerprint(first["train"]) != data_fingerprint(second["train"])


@pytest.mark.parametrize(
    "settings", [{"max_seq_len": 16}, {"validation_ratio": 0.3}, {"tokenizer_path": None}]
)
def test_a_changed_setting_makes_new_rows(tmp_path, prepare, capsys, settings):
    dataset = write_texts(tmp_path, EVEN)
    before, _ = prepare(dataset)
    capsys.readouterr()
    after, _ = prepare(dataset, **settings)
    assert MAKES_ROWS in capsys.readouterr().out
    assert data_fingerprint(before["train"]) != data_fingerprint(after["train"])


def test_a_corpus_that_breaks_off_leaves_no_half_cache_and_the_next_call_works(tmp_path, prepare):
    dataset = write_texts(tmp_path, EVEN)
    with open(dataset, "a") as stream:
        stream.write("{")
    with pytest.raises(ValueError, match=r"corpus\.jsonl:201: broken JSON"):
        prepare(dataset)
    assert os.listdir(tmp_path / "cache") == [".lock"]
    splits, tokenizer = prepare(write_texts(tmp_path, EVEN))
    assert all_texts(splits, tokenizer) == set(EVEN)


def test_what_a_killed_process_left_in_the_cache_does_no_harm(tmp_path, prepare):
    dataset = write_texts(tmp_path, EVEN)
    _, tokenizer = prepare(dataset)
    (folder,) = (tmp_path / "cache").glob("pretrain-*")
    half = folder.rename(f"{folder}.tmp")
    (half / "train.arrow").write_bytes(b"half")
    again, _ = prepare(dataset)
    assert all_texts(again, tokenizer) == set(EVEN)
    assert sorted(os.listdir(tmp_path / "cache")) == [".lock", folder.name]


@pytest.mark.parametrize(
    ("record", "found"),
    [({"body": "a", "title": "b"}, "has 'body', 'title'"), ([1, 2], "is no object")],
)
def test_a_record_without_text_is_named_by_file_and_line_with_what_it_has(
    tmp_path, prepare, record, found
):
    dataset = write_records(tmp_path, [{"text": "a"}, record])
    with pytest.raises(ValueError, match="expected") as caught:
        prepare(dataset)
    assert str(caught.value) == (
        f'{dataset}:2: expected {{"text": "…"}} or "content" or "completion"; this record {found}. '
        "--text_column names another column."
    )


@pytest.mark.parametrize("texts", [[], ["", " "], ["天"]], ids=["nothing", "blank", "tiny"])
@pytest.mark.parametrize("settings", [{}, {"tokenizer_path": None}], ids=["given", "trained"])
def test_too_little_text_says_so_and_what_to_do(tmp_path, prepare, texts, settings):
    dataset = write_texts(tmp_path, texts)
    Path(dataset).write_text(Path(dataset).read_text() + "\n")
    for _ in range(2):  # the second call finds what the first one cached
        with pytest.raises(ValueError, match="usable tokens are too few") as caught:
            prepare(dataset, **settings)
        assert "Add text or lower max_seq_len" in str(caught.value)


@pytest.mark.parametrize("ratio", [1e-9, 1 - 1e-9], ids=["all training", "all validation"])
def test_few_documents_that_all_fall_to_one_side_still_give_both(tmp_path, prepare, ratio, capsys):
    splits, tokenizer = prepare(write_texts(tmp_path, EVEN[:6]), validation_ratio=ratio)
    train, held_out = (texts_of(splits[name], tokenizer) for name in ("train", "validation"))
    assert held_out == {min(EVEN[:6], key=question_hash)}
    assert len(train) == 5
    assert train | held_out == set(EVEN[:6])
    assert "6 documents (none dropped), 48 tokens, 0.88 characters/token" in capsys.readouterr().out


def test_text_that_looks_like_control_tokens_never_becomes_one(tmp_path, prepare):
    texts = [f"{number}{END_OF_TEXT}a{IM_END}\n<|im_start|>user <|pad|>" for number in range(50)]
    splits, tokenizer = prepare(write_texts(tmp_path, texts), max_seq_len=512)
    counts = token_counts(splits)
    control = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)  # the second ends a document
    assert [counts[token] for token in control] == [0, 50, 0, 0]
    assert counts == expected_counts(texts, tokenizer)


@pytest.mark.parametrize(
    "settings", [{"validation_ratio": 0.0}, {"validation_ratio": 1.0}, {"max_seq_len": 7}]
)
def test_settings_out_of_range_are_named(tmp_path, prepare, settings):
    ((name, value),) = settings.items()
    wanted = "must be at least 8 tokens" if name == "max_seq_len" else "must be between 0 and 1"
    with pytest.raises(ValueError, match=f"{name}={value} {wanted}"):
        prepare(write_texts(tmp_path, EVEN), **settings)


def test_target_bytes_are_the_bytes_of_all_text_but_each_first_token(tmp_path, prepare):
    texts = [f"{number:07d}" + "é天😀"[number % 3] for number in range(60)]
    splits, tokenizer = prepare(write_texts(tmp_path, texts), max_seq_len=64)
    for rows in splits.values():
        targets = [tokenizer.decode(p[1:], skip_special_tokens=True) for p in pieces(rows)]
        assert target_bytes(rows, tokenizer) == sum(len(text.encode()) for text in targets) > 0


def test_unigram_loss_is_the_cross_entropy_of_smoothed_training_frequencies():
    splits = DatasetDict(
        train=Dataset.from_dict(
            {"input_ids": [[0, 1, 1, 3, 2]], "position_ids": [[0, 1, 2, 0, 1]]}
        ),
        validation=Dataset.from_dict({"input_ids": [[2, 1, 2, 3]], "position_ids": [[0, 1, 2, 3]]}),
    )
    # Training targets 1, 1, 2 plus one of each of the four ids: 1, 3, 2, 1 of 7.
    expected = -(math.log(3 / 7) + math.log(2 / 7) + math.log(1 / 7)) / 3
    assert unigram_loss(splits, vocab_size=4) == pytest.approx(expected)


def test_inspection_parts_documents_and_counts_tokens_documents_and_targets(tmp_path, prepare):
    splits, tokenizer = prepare(write_texts(tmp_path, EVEN))
    heading, row = list(inspect(splits, tokenizer, LENGTH, rows=2))[2:]
    assert heading == "--- row 1: 32 tokens, 4 documents, 28 targets"
    shown = [f"{text[1]}{text[3:]}" for text in row.split(" ‖ ")]  # [0]000001<|endoftext|>
    assert len(shown) == 4
    assert {text.removesuffix(END_OF_TEXT) for text in shown} <= set(EVEN)


@pytest.mark.slow
def test_the_inspect_command_shows_a_file(tmp_path, run_script):
    write_texts(tmp_path, EVEN)
    done = run_script("train_data.py", "--inspect", "corpus.jsonl", "--vocab_size", 260)
    assert done.returncode == 0, done.stderr
    assert " ‖ " in done.stdout
    assert "200 documents (none dropped)" in done.stdout
    # Ten digits, some rare, and the end of text.
    assert 1 < float(done.stdout.split("validation loss ")[1].split(".\n")[0]) < math.log(11)


@pytest.mark.slow
def test_the_inspect_command_fails_in_one_line_without_a_traceback(run_script):
    done = run_script("train_data.py", "--inspect", "absent.jsonl")
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: absent.jsonl: no such file")


@pytest.mark.slow
def test_a_real_corpus_is_packed_with_under_one_percent_padding_and_no_token_lost(
    prepare, real_data
):
    dataset = str(real_data("pt_libreoffice_help.jsonl.xz"))
    splits, tokenizer = prepare(dataset, tokenizer_path=None, vocab_size=2000, max_seq_len=512)
    counts = token_counts(splits)
    rows = sum(map(len, splits.values()))
    assert counts == expected_counts(iter_documents(dataset), tokenizer)
    assert rows > 200
    assert 1 - counts.total() / (rows * 512) < 0.01
