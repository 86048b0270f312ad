"""What a file is, whatever its name; and why it cannot be read, told by the cause."""

import gzip
import json
import re
import sys

import pytest
from test_readers import complaint, parquet_bytes, put, read

from corpus.diagnosis import HEAD
from corpus.documents import iter_documents
from corpus.readers import find_files, iter_records
from tokenizer import create_tokenizer

RECORDS = [{"text": f"天地玄黄，第{number}段。"} for number in range(4)]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
ARRAY = json.dumps(RECORDS, ensure_ascii=False)
PRETTY = "".join(json.dumps(record, ensure_ascii=False, indent=2) + "\n" for record in RECORDS)
SAME = {
    "lines in a .txt": ("a.txt", LINES),
    "lines with blank ones in a .txt": ("a.txt", LINES.replace("\n", "\n\n")),
    "an array in a .txt": ("a.txt", ARRAY),
    "an array in a .jsonl": ("a.jsonl", ARRAY),
    "an array of several lines in a .jsonl": ("a.jsonl", json.dumps(RECORDS, indent=1)),
    "objects of several lines in a .json": ("a.json", PRETTY),
    "objects of several lines in a .jsonl": ("a.jsonl", "\ufeff" + PRETTY),
}


@pytest.mark.parametrize(("name", "text"), SAME.values(), ids=SAME)
@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gz"])
def test_records_are_read_by_what_is_in_the_file(tmp_path, name, text, compress):
    name += ".gz" if compress is gzip.compress else ""
    assert read(put(tmp_path, name, compress(text.encode()))) == RECORDS


def test_one_object_of_several_lines_is_one_record(tmp_path):
    path = put(tmp_path, "a.json", json.dumps(RECORDS[0], indent=2))
    assert list(iter_records(path)) == [(1, RECORDS[0])]


def test_strings_a_line_are_documents_and_no_conversations(tmp_path):
    path = put(tmp_path, "a.jsonl", '"天地"\n"玄黄"\n')
    assert list(iter_documents(str(path))) == ["天地", "玄黄"]


def test_lists_a_line_stay_lists(tmp_path):
    assert read(put(tmp_path, "a.jsonl", "[1]\n[2]\n")) == [[1], [2]]


@pytest.mark.parametrize(
    "text",
    [
        "{\n天地",
        '{"a": 1} 是一个对象\n玄黄',
        '{"a": 1}\n\n别的不是。',
        "[注]天地",
        "[1]",
    ],
)
def test_text_that_only_looks_like_json_stays_text(tmp_path, text):
    assert read(put(tmp_path, "a.txt", text)) == text.split("\n\n")


def test_the_shape_is_told_though_a_line_is_longer_than_what_is_looked_at(tmp_path):
    long = json.dumps({"text": "长" * HEAD}, ensure_ascii=False)
    assert read(put(tmp_path, "a.txt", f"{LINES}{long}\n"))[-1] == json.loads(long)


CUT = "cut short: fetch it again"


@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_a_file_that_ends_inside_a_character_was_cut_short(tmp_path, name, end):
    whole = '[\n{"text": "天地玄黄"}]' if name == "a.json" else '{"text": "天地玄黄"}'
    cut = whole.encode()[: whole.encode().rindex("黄".encode()) + 2]
    message = complaint(iter_records, put(tmp_path, name, cut + end.encode()))
    assert "GB18030" not in message and "iconv" not in message
    assert ("the file ends in the middle of a character" in message) == (end == "")
    assert (CUT in message) == (end == "")


@pytest.mark.parametrize("text", [LINES[:-1], ARRAY, PRETTY[:-1]], ids=["lines", "array", "pretty"])
@pytest.mark.parametrize("missing", [1, 3, 9])
def test_a_file_that_ends_inside_a_record_was_cut_short(tmp_path, text, missing):
    path = put(tmp_path, "a.jsonl", text[:-missing])
    message = complaint(iter_records, path)
    assert f"the file ends in the middle of a record; it was {CUT}" in message
    assert re.match(rf"{re.escape(str(path))}:\d+: broken JSON at column ", message)


@pytest.mark.parametrize("missing", [1, 5, 900])
def test_parquet_that_was_cut_short_is_called_so(tmp_path, missing):
    whole = parquet_bytes([{"text": f"{number:040d}"} for number in range(500)])
    message = complaint(iter_records, put(tmp_path, "a.parquet", whole[:-missing]))
    assert "not a readable parquet file (it does not end as parquet ends; " in message
    assert CUT in message


def test_gb18030_in_the_middle_of_utf8_is_a_wrong_byte_and_not_another_encoding(tmp_path):
    line = '{"text": "天地'.encode() + "中文".encode("gb18030") + b'"}\n'
    message = complaint(iter_records, put(tmp_path, "a.jsonl", LINES.encode() + line))
    assert message.endswith(":5: not UTF-8; byte 17 of the line is wrong.")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n"
FOREIGN = {
    "utf-16": ("a.jsonl", LINES.encode("utf-16"), "UTF-16 text: convert it with `iconv -f UTF-16"),
    "utf-16, text": ("a.txt", "天地玄黄".encode("utf-16"), "UTF-16 text"),
    "utf-16 without mark": ("a.json", ARRAY.encode("utf-16-le"), "UTF-16 text"),
    "utf-16, other order": ("a.jsonl", LINES.encode("utf-16-be"), "UTF-16 text"),
    "pointer": ("a.jsonl", LFS, "a Git LFS pointer and not the data: run `git lfs pull`"),
    "pointer, text": ("a.txt", LFS, "a Git LFS pointer"),
    "pointer, parquet": ("a.parquet", LFS, "not a readable parquet file (a Git LFS pointer"),
    "page": ("a.json", b"\n<!DOCTYPE html><html>", "an HTML page and not the data"),
    "page, parquet": ("a.parquet", b"<html><head>", "an HTML page and not the data"),
    "gz": ("a.jsonl", gzip.compress(LINES.encode()), "its content is .gz: name it so"),
    "parquet": ("a.jsonl", parquet_bytes(), "its content is .parquet: name it so"),
    "zip": ("a.txt", b"PK\3\4\0\0", "a zip archive: unpack it"),
}


@pytest.mark.parametrize(("name", "data", "problem"), FOREIGN.values(), ids=FOREIGN)
def test_a_file_that_is_something_else_is_called_what_it_is(tmp_path, name, data, problem):
    path = put(tmp_path, name, data)
    message = complaint(iter_records, path)
    assert message.startswith(f"{path}: ")
    assert problem in message


HINTS = {
    "zero bytes": ('{"text": "a"}\n\0\0\0\n', "there are zero bytes in it: the disk was full"),
    "two records": ('{"text": "a"}{"text": "b"}\n', "a second record begins on the line"),
    "Python": ("{'text': 'a'}\n", "single quotes are Python's and not JSON's"),
}


@pytest.mark.parametrize(("text", "hint"), HINTS.values(), ids=HINTS)
def test_the_cause_of_broken_json_is_named_where_it_is_known(tmp_path, text, hint):
    assert hint in complaint(iter_records, put(tmp_path, "a.jsonl", text))


@pytest.mark.parametrize(("ending", "separator"), [(".csv", ""), (".tsv", r", sep='\t'")])
def test_a_table_is_refused_with_the_command_that_converts_it(tmp_path, ending, separator):
    path = put(tmp_path, f"a{ending}", "text\n天地\n")
    message = complaint(find_files, str(path))
    assert f"pandas.read_csv('a{ending}'{separator}, dtype=str).to_json('a.jsonl'" in message


@pytest.mark.parametrize("ending", [".ndjson", ".jsonlines", ".jl"])
def test_json_lines_of_another_name_are_refused_with_the_name_that_is_read(tmp_path, ending):
    message = complaint(find_files, str(put(tmp_path, f"a{ending}", LINES)))
    assert message.endswith("JSON lines are named .jsonl: rename it to a.jsonl")


def test_html_that_is_text_is_text(tmp_path):
    assert read(put(tmp_path, "a.txt", "<html>天地</html>")) == ["<html>天地</html>"]


def test_a_sentencepiece_folder_without_its_package_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [])  # nothing is installed there
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    message = r"its tokenizer\.model is SentencePiece's, .* `pip install sentencepiece protobuf`"
    with pytest.raises(ValueError, match=message):
        create_tokenizer(model_path=str(tmp_path))
