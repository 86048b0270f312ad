import bz2
import contextlib
import gzip
import json
import lzma
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corpus.readers import TEXT_BLOCK, find_files, is_local, iter_records, read_text

ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
RECORDS = [{"text": "天地玄黄\n宇宙"}, {"text": 'He said "no".\u2028'}, {"text": None}]
JSON_LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
ARRAY = json.dumps(RECORDS, ensure_ascii=False, indent=2).encode()


NO_FILE = "no .jsonl, .json, .txt, .parquet, .arrow file there (also .gz .bz2 .xz .zst)."


def parquet_bytes(records=RECORDS) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(records), sink)
    return sink.getvalue().to_pybytes()


def put(folder: Path, name: str, data: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def read(path: Path) -> list:
    return [record for _, record in iter_records(path)]


def complaint(action, *arguments) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the caller looks at the message
        list(action(*arguments))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", JSON_LINES),
        ("a.json", ARRAY),
        ("b.json", JSON_LINES),
        ("a.parquet", parquet_bytes()),
    ],
)
def test_records_come_back_equal_from_every_format_and_compression(
    tmp_path, name, data, compression
):
    path = put(tmp_path, name + compression, COMPRESS[compression](data))
    assert find_files(str(path)) == [path]
    assert read(path) == RECORDS


@pytest.mark.parametrize("compression", COMPRESS)
def test_text_is_split_at_blank_lines_and_each_paragraph_knows_its_first_line(
    tmp_path, compression
):
    text = "\n\n一\n二\n \t\n三\r\n四\r\n\r\n\r\n五"
    path = put(tmp_path, "a.txt" + compression, COMPRESS[compression](text.encode()))
    assert list(iter_records(path)) == [(3, "一\n二"), (6, "三\r\n四"), (10, "五")]


def test_zst_is_read_whole_even_from_several_frames_and_a_cut_one_is_an_error(tmp_path):
    compress = pytest.importorskip(ZSTD).compress
    path = put(tmp_path, "a.jsonl.zst", compress(JSON_LINES) + compress(JSON_LINES))
    assert read(path) == RECORDS * 2
    put(tmp_path, "a.jsonl.zst", compress(JSON_LINES)[:-5])
    assert f"{path}:1: the archive is broken or cut short" in complaint(iter_records, path)


def test_zst_without_its_module_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, ZSTD, None)
    path = put(tmp_path, "a.jsonl.zst", b"anything")
    message = complaint(iter_records, path)
    assert message == f"{path}: reading .zst needs `pip install backports.zstd`."


@pytest.mark.parametrize(("name", "data"), [("a.jsonl", JSON_LINES), ("a.json", ARRAY)])
def test_a_byte_order_mark_is_removed_from_json(tmp_path, name, data):
    assert read(put(tmp_path, name, b"\xef\xbb\xbf" + data)) == RECORDS


def test_a_byte_order_mark_is_removed_from_text_but_only_at_the_start(tmp_path):
    mark = "\ufeff"
    assert read(put(tmp_path, "a.txt", f"{mark}一\n\n{mark}二")) == ["一", mark + "二"]


def test_blank_lines_between_json_lines_are_skipped_and_still_counted(tmp_path):
    path = put(tmp_path, "a.jsonl", '\n{"text": "a"}\n\n \n{"text": "b"}')
    assert list(iter_records(path)) == [(2, {"text": "a"}), (5, {"text": "b"})]


def test_a_line_of_100_000_characters_stays_one_paragraph(tmp_path):
    line = "长" * 100_000
    assert list(iter_records(put(tmp_path, "a.txt", f"{line}\n\nend"))) == [(1, line), (3, "end")]


def test_huge_text_without_blank_lines_is_cut_only_at_line_ends_and_nothing_is_lost(tmp_path):
    lines = [f"{number} " + "字" * (number * 37 % 2500) for number in range(1, 10_000)]
    found = list(iter_records(put(tmp_path, "a.txt", "\n".join(lines) + "\n")))
    assert len(found) > 10
    assert "\n".join(block for _, block in found).split("\n") == lines
    for start, block in found:
        assert block.split("\n", 1)[0] == lines[start - 1]
        assert len(block) < TEXT_BLOCK + 3000


def test_a_folder_is_searched_recursively_and_other_files_are_left_alone(tmp_path):
    for name in ("b.jsonl", "a/deep/c.txt.gz", "a/d.parquet", "README.md", "a/picture.png"):
        put(tmp_path, name, b"x")
    found = [path.relative_to(tmp_path).as_posix() for path in find_files(str(tmp_path))]
    assert found == ["a/d.parquet", "a/deep/c.txt.gz", "b.jsonl"]


def test_a_glob_finds_its_files_sorted(tmp_path):
    for name in ("2.jsonl", "1.jsonl", "sub/3.jsonl", "1.txt"):
        put(tmp_path, name, b"x")
    assert [p.name for p in find_files(f"{tmp_path}/*.jsonl")] == ["1.jsonl", "2.jsonl"]
    assert [p.name for p in find_files(f"{tmp_path}/**/*.jsonl")] == [
        "1.jsonl",
        "2.jsonl",
        "3.jsonl",
    ]


@pytest.mark.parametrize("name", ["数据[1].jsonl", "a*b.jsonl", "a b::c.jsonl"])
def test_a_file_whose_name_looks_like_a_pattern_is_read(tmp_path, name):
    path = put(tmp_path, name, JSON_LINES)
    assert find_files(str(path)) == [path]
    assert read(path) == RECORDS


def test_names_of_files_and_names_on_the_hub_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "owner/corpus/a.txt", b"x")
    for name in ("absent.jsonl", "x.parquet.gz", "data/*", "./data", "~/data", "owner/corpus"):
        assert is_local(name)
    assert not is_local("owner/dataset")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("absent.jsonl", "no such file (looked from "),
        ("empty.jsonl", "the file is empty."),
        ("a.docx", "unknown format; known: .jsonl .json .txt .parquet .arrow, compressed."),
        ("folder", NO_FILE),
        ("*.csv", NO_FILE),
    ],
)
def test_what_holds_no_data_is_named_with_the_reason(tmp_path, name, expected):
    put(tmp_path, "empty.jsonl", b"")
    put(tmp_path, "a.docx", b"x")
    put(tmp_path, "folder/notes.md", b"x")
    assert f"{tmp_path / name}: {expected}" in complaint(find_files, str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "text", "line", "shown"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b}\n{"text": "c"}\n', 3, '{"text": "b}'),
        ("a.jsonl", '{"text": "a"}\n{"text":\n{"text": "c"}\n', 2, '{"text":'),
        ("a.jsonl", "{'text': 'a'}\n", 1, "{'text': 'a'}"),
        ("b.json", '{"text": "a"}\n{"text" "b"}\n', 2, '{"text" "b"}'),
        ("a.json", '[\n  {"text": "\u2028a"},\n  {"text" "b"}\n]\n', 3, '  {"text" "b"}'),
        ("a.json", '[\n  {"text": "a"},\n', 2, '  {"text": "a"},'),
        ("a.json", "[", 1, "["),
    ],
)
def test_broken_json_is_named_by_file_and_line_and_shown(tmp_path, name, text, line, shown):
    path = put(tmp_path, name, text)
    message = complaint(iter_records, path)
    assert message.startswith(f"{path}:{line}: broken JSON at column ")
    assert message.endswith(f"(the line: {shown!r}).")


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 200_000], ids=["digits", "nesting"])
def test_json_beyond_the_limits_of_python_is_named_by_file_and_line(tmp_path, value):
    path = put(tmp_path, "a.jsonl", '{"text": "a"}\n' + value)
    assert complaint(iter_records, path).startswith(f"{path}:2: JSON that cannot be read: ")


def test_json_that_is_neither_array_nor_objects_says_what_is_expected(tmp_path):
    path = put(tmp_path, "a.json", '"text"')
    assert f"{path}:1: a .json file must hold an array of objects" in complaint(iter_records, path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_gb18030_is_recognized_and_the_conversion_advised(tmp_path, name):
    path = put(tmp_path, name, b"\n" + '{"text": "中文网页"}'.encode("gb18030"))
    assert complaint(iter_records, path) == (
        f"{path}:2: not UTF-8; it reads as GB18030: convert it with `iconv -f GB18030 -t UTF-8`."
    )


def test_other_bytes_that_are_no_text_are_named_by_line_and_place(tmp_path):
    path = put(tmp_path, "a.txt", b"good\n\nab\xff\xfe\n")
    assert complaint(iter_records, path) == f"{path}:3: not UTF-8; byte 3 of the line is wrong."


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("damage", ["cut short", "not an archive", "cut to half"])
def test_a_damaged_archive_is_named_with_the_line_it_ends_at(tmp_path, compression, damage):
    lines = [json.dumps({"text": os.urandom(30).hex()}) + "\n" for _ in range(3000)]
    data = COMPRESS[compression]("".join(lines).encode())
    data = {
        "cut short": data[:-9],
        "not an archive": b"text",
        "cut to half": data[: len(data) // 2],
    }
    path = put(tmp_path, "a.jsonl" + compression, data[damage])
    read_lines = []
    with pytest.raises(ValueError, match="the archive is broken or cut short") as caught:
        read_lines.extend(iter_records(path))
    assert str(caught.value).startswith(f"{path}:{len(read_lines) + 1}: ")
    assert len(read_lines) < len(lines) or damage == "cut short"


def test_a_disk_error_is_not_taken_for_a_broken_file(tmp_path, monkeypatch):
    path = put(tmp_path, "a.jsonl.gz", gzip.compress(JSON_LINES))

    def broken_disk():
        yield b"{}\n"
        raise OSError(5, "Input/output error")

    # No file of a test can break a disk: the libraries that read the file raise its error.
    monkeypatch.setattr(gzip, "open", lambda *_: contextlib.nullcontext(broken_disk()))
    with pytest.raises(OSError, match="Input/output error"):
        read(path)
    monkeypatch.setattr(pq, "ParquetFile", lambda _: list(broken_disk()))
    with pytest.raises(OSError, match="Input/output error"):
        read(put(tmp_path, "a.parquet", b"anything"))


@pytest.mark.parametrize("damage", ["no parquet", "cut", "pages", "footer"])
def test_broken_parquet_is_named(tmp_path, damage):
    whole = parquet_bytes([{"text": os.urandom(9).hex()} for _ in range(500)])
    broken = {
        "no parquet": b'{"text": "a"}',
        "cut": whole[: len(whole) // 2],
        "pages": whole[:4] + b"\xff" * 100 + whole[104:],
        "footer": whole[:-208] + b"\xff" * 200 + whole[-8:],
    }
    path = put(tmp_path, "a.parquet", broken[damage])
    assert f"{path}: not a readable parquet file" in complaint(iter_records, path)


def test_a_whole_text_is_read_without_its_mark_and_its_errors_are_named(tmp_path):
    assert read_text(put(tmp_path, "a.txt", "\ufeff一\n\n二")) == "一\n\n二"
    path = put(tmp_path, "b.txt", b"good\nab\xff\n")
    assert complaint(read_text, path) == f"{path}:2: not UTF-8; byte 3 of the line is wrong."
