"""What a file is, told by its first bytes, and why it cannot be read, told by what is wrong."""

import codecs
import contextlib
import json
import re

HEAD = 1 << 20  # bytes from which a file's shape is told
LINES, ARRAY, VALUES, TEXT = "lines", "array", "values", "text"
CUT_SHORT = "it was cut short: fetch it again"
ARCHIVES = {
    b"\x1f\x8b": ".gz",
    b"BZh": ".bz2",
    b"\xfd7zXZ": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"PAR1": ".parquet",
}
JSON_LINES = (".ndjson", ".jsonlines", ".jl")
TABLES = {".csv": "", ".tsv": ", sep='\\t'"}


def shape_of(head: bytes, ending: str) -> str:
    """How the records stand in a file with this ending: what is in it counts, not its name.

    LINES: a record a line. ARRAY: one JSON array. VALUES: objects of several lines each, one or
    more. TEXT: paragraphs.
    """
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if len(head) == HEAD and b"\n" in start:
        start = start[: start.rfind(b"\n")]  # without the line that ends behind it
    lines = [line for line in start.split(b"\n") if line.strip()]
    values = [_value(line) for line in lines[:2]]
    if ending == ".txt":
        if values and all(isinstance(value, dict) for value in values):
            return LINES
        return ARRAY if re.match(rb'\[\s*\{\s*"', start) else TEXT
    if start[:1] == b"[":
        has_lists = ending == ".jsonl" and isinstance(values[0], list) and len(lines) > 1
        return LINES if has_lists else ARRAY
    return VALUES if lines and lines[0].strip() == b"{" else LINES


def _value(line: bytes):
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def foreign(head: bytes, ending: str) -> str:
    """What a file is if it is not what its ending says; empty where nothing speaks against it."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or _is_wide(head):
        return "UTF-16 text: convert it with `iconv -f UTF-16 -t UTF-8`"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer and not the data: run `git lfs pull`, or download the file itself"
    if ending != ".txt" and head.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        return "an HTML page and not the data: download the file itself (of the Hub its /resolve/)"
    for mark, kind in ARCHIVES.items():
        if ending != kind and head.startswith(mark) and b"\0" in head:
            return f"its content is {kind}: name it so"
    if head.startswith(b"PK\3\4"):
        return "a zip archive: unpack it"
    return ""


def _is_wide(head: bytes) -> bool:
    """Whether every second byte of the beginning is 0: UTF-16 without its mark."""
    start = head[:16]
    pairs = (start[::2], start[1::2])
    return len(start) == 16 and any(not any(a) and all(b) for a, b in (pairs, pairs[::-1]))


def conversion_of(name: str, ending: str) -> str:
    """How a file of another format becomes one that is read; empty where nothing is known."""
    if ending in JSON_LINES:
        return f" JSON lines are named .jsonl: rename it to {name[: -len(ending)]}.jsonl"
    if ending not in TABLES:
        return ""
    target = f"{name[: -len(ending)]}.jsonl"
    return (
        f' A table becomes records with: python -c "import pandas; pandas.read_csv({name!r}'
        f"{TABLES[ending]}, dtype=str).to_json({target!r}, orient='records', lines=True, "
        'force_ascii=False)"'
    )


def why_not_utf8(line: bytes, error: UnicodeDecodeError) -> str:
    """Why a line cannot be decoded. Only the last line of a file has no line end."""
    if error.reason == "unexpected end of data" and not line.endswith(b"\n"):
        return f"the file ends in the middle of a character; {CUT_SHORT}"
    if line[: error.start].isascii():  # behind letters of UTF-8 no other encoding begins
        with contextlib.suppress(UnicodeDecodeError):
            line.decode("gb18030")
            return "it reads as GB18030: convert it with `iconv -f GB18030 -t UTF-8`"
    return f"byte {error.start + 1} of the line is wrong"


def why_no_parquet(head: bytes, tail: bytes) -> str:
    """Why a file is no parquet; empty where nothing is known."""
    if head[:4] == b"PAR1" != tail:
        return f"it does not end as parquet ends; {CUT_SHORT}"
    return foreign(head, ".parquet")


def json_hint(error: json.JSONDecodeError, is_end: bool) -> str:
    """What probably happened to JSON that is broken; empty where nothing is known.

    is_end: the text ends where the file ends.
    """
    text = error.doc
    if "\0" in text:
        return ", there are zero bytes in it: the disk was full, or the machine lost its power"
    if is_end and (error.msg.startswith("Unterminated") or error.pos >= len(text.rstrip())):
        return f", the file ends in the middle of a record; {CUT_SHORT}"
    before = text[: error.pos].rpartition("\n")[2].strip()
    if error.msg == "Extra data" and before and text[error.pos :].lstrip()[:1] in ("{", "["):
        return ", a second record begins on the line: each needs a line of its own"
    if text[error.pos : error.pos + 1] == "'":
        return ", single quotes are Python's and not JSON's: write it with json.dumps"
    return ""
