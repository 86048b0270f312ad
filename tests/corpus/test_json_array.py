"""JSON arrays of any size: the same values as json.load, in little memory, errors at their line."""

import io
import json
import random
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus.json_array import PIECE, ArrayReader
from corpus.readers import iter_records

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


class Few(io.BytesIO):
    """A stream that gives at most `size` bytes at a time, so that every place is a border."""

    def __init__(self, data: bytes, size: int):
        super().__init__(data)
        self.at_most = size

    def read(self, size=-1):
        return super().read(self.at_most)


def elements(text: str, size: int) -> list:
    return list(ArrayReader(Few(text.encode(), size)).elements())


def put(folder: Path, data: bytes | str) -> Path:
    path = folder / "a.json"
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def complaint(path: Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the caller looks at the message
        list(iter_records(path))
    return str(caught.value).removeprefix(str(path))


def made_up(count: int, seed: int = 0) -> list[dict]:
    """Records of very different lengths, some longer than the reader's piece."""
    choose = random.Random(seed)
    records: list[dict] = []
    for number in range(count):
        text = choose.choice(["天地\n", 'a "quoted" \\ word ', "😀", "\x07", "{[,]}"])
        length = PIECE // 2 if number % 50 == 17 else choose.randrange(60)
        records.append({"text": text * length, "numbers": [number / 7, -number, 1e300], "n": None})
    return records


# --- the values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 2], ids=["one line", "pretty-printed"])
@pytest.mark.parametrize("ensure_ascii", [False, True], ids=["characters", "escapes"])
def test_records_equal_those_of_json_load_though_they_cross_what_is_read_at_a_time(
    tmp_path, indent, ensure_ascii
):
    records = made_up(120)
    path = put(tmp_path, json.dumps(records, indent=indent, ensure_ascii=ensure_ascii))
    assert path.stat().st_size > 5 * PIECE
    assert [record for _, record in iter_records(path)] == records
    assert [number for number, _ in iter_records(path)] == list(range(1, 121))


@given(st.lists(VALUES, max_size=4), st.integers(1, 9), st.sampled_from([None, 0, 3]))
def test_any_values_come_back_wherever_the_pieces_end(values, size, indent):
    for ensure_ascii in (False, True):
        text = json.dumps(values, indent=indent, ensure_ascii=ensure_ascii)
        assert elements(text, size) == values


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7])
def test_a_number_is_whole_wherever_the_pieces_end(size):
    text = "[1.25, -0.5e-3 ,12345678901234567890123456789,1E+2,0, -7e2,3.5,true,null, 6e-1]"
    assert elements(text, size) == json.loads(text)


@pytest.mark.parametrize("size", [1, 5, 100])
@pytest.mark.parametrize("text", ["[]", " [ \n ] ", "\ufeff[1]", "[[]]", "[ {} , [] ,\t''.. ]"])
def test_spaces_an_empty_array_and_a_byte_order_mark_are_as_json_has_them(size, text):
    text = text.replace("''..", '""')
    assert elements(text, size) == json.loads(text.removeprefix("\ufeff"))


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 1], ids=["one line", "pretty-printed"])
def test_memory_stays_far_below_the_size_of_the_file(tmp_path, indent):
    record = {"text": "some words of a text " * 500}
    path = put(tmp_path, json.dumps([record] * 2000, indent=indent))
    assert path.stat().st_size > 20_000_000
    with open(path, "rb") as stream:
        tracemalloc.start()
        try:
            count = sum(1 for _ in ArrayReader(stream).elements())
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert count == 2000
    assert peak < 8 * PIECE


# --- errors -------------------------------------------------------------------------------------


def pretty(count: int) -> list[str]:
    """The lines of an array of `count` records of three lines each, after `[`."""
    lines = []
    for number in range(count):
        lines += ["  {", f'    "text": "{"word " * 40}{number}"', "  },"]
    return lines


@pytest.mark.parametrize("record", [0, 9_000, 19_999])
def test_broken_json_is_named_by_its_line_deep_in_a_file(tmp_path, record):
    lines = ["[", *pretty(20_000), "  {}", "]"]
    line = 3 * record + 3  # of the text, counted from 1
    lines[line - 1] = '    "text" "no colon"'
    path = put(tmp_path, "\n".join(lines))
    assert path.stat().st_size > 4 * PIECE
    assert complaint(path) == (
        f":{line}: broken JSON at column 12: Expecting ':' delimiter "
        '(the line: \'    "text" "no colon"\').'
    )


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "problem", "position"),
    [
        ('[{"a": 1} {"b": 2}]', "Expecting ',' delimiter", 10),
        ("[1, ]", "Expecting value", 4),
        ("[1] [2]", "Extra data", 4),
        ("[1]]", "Extra data", 3),
        ('[1, "a', "Unterminated string starting at", 4),
        ("[1, 2", "Expecting ',' delimiter", 5),
        ("[1,", "Expecting value", 3),
        ("[1, 2.]", "Expecting ',' delimiter", 5),
        ("[1, -]", "Expecting value", 4),
        ("[tru]", "Expecting value", 1),
        ("[", "Expecting value", 1),
        ("7", "Expecting value", 0),
    ],
)
def test_an_error_has_the_words_and_the_place_of_json(size, text, problem, position):
    with pytest.raises(json.JSONDecodeError) as caught:
        elements(text, size)
    assert (caught.value.msg, caught.value.pos) == (problem, position)


@pytest.mark.parametrize("cut", [1, 2, 50, 200])
def test_a_file_that_is_cut_short_is_an_error_behind_its_whole_records(tmp_path, cut):
    whole = "\n".join(["[", *pretty(10_000)])
    found = []
    with pytest.raises(ValueError, match=r"a\.json:\d+: broken JSON at column"):
        found.extend(iter_records(put(tmp_path, whole[:-cut])))
    assert 9_998 <= len(found) <= 10_000


def test_text_behind_the_array_is_an_error_with_its_line(tmp_path):
    lines = ["[", *pretty(10_000), "  {}", "]", "", "[]"]
    message = complaint(put(tmp_path, "\n".join(lines)))
    assert message == f":{len(lines)}: broken JSON at column 1: Extra data (the line: '[]')."


@pytest.mark.parametrize("record", [3, 9_999])
def test_bytes_that_are_not_utf8_are_named_by_their_line(tmp_path, record):
    lines = [line.encode() for line in ["[", *pretty(10_000), "  {}", "]"]]
    lines[3 * record + 2] = '    "text": "中文网页"'.encode("gb18030")
    message = complaint(put(tmp_path, b"\n".join(lines)))
    assert message.startswith(f":{3 * record + 3}: not UTF-8; it reads as GB18030")
    lines[3 * record + 2] = b'    "text": "\xff"'
    message = complaint(put(tmp_path, b"\n".join(lines)))
    assert message == f":{3 * record + 3}: not UTF-8; byte 14 of the line is wrong."


def test_what_stands_before_bytes_that_are_not_utf8_comes_first(tmp_path):
    found = []
    path = put(tmp_path, b'[{"text": "a"},\n{"text": "b"},\n{"text": "\xff"}]')
    with pytest.raises(ValueError, match=r":3: not UTF-8; byte 11 of the line is wrong"):
        found.extend(iter_records(path))
    assert found == [(1, {"text": "a"}), (2, {"text": "b"})]
    message = complaint(
        put(tmp_path, b'[{"text": "a"},\n{"text" "b"},\n{"text": "c c c c c \xff"}]')
    )
    assert message.startswith(":2: broken JSON at column 9")


def test_a_file_that_ends_within_a_character_is_not_utf8(tmp_path):
    path = put(tmp_path, '[\n{"text": "天'.encode()[:-1])
    assert complaint(path).startswith(":2: not UTF-8; ")
