"""Reading users' files. Every error names the file, the line and the fix."""

import bz2
import codecs
import contextlib
import glob
import gzip
import importlib
import json
import lzma
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow

from corpus.diagnosis import (
    ARRAY,
    HEAD,
    LINES,
    TEXT,
    conversion_of,
    foreign,
    json_hint,
    shape_of,
    why_no_parquet,
    why_not_utf8,
)
from corpus.folders import choose_files
from corpus.json_array import ArrayReader
from corpus.tables import open_arrow, open_parquet, rows_of

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
FORMATS = (".jsonl", ".json", ".txt", ".parquet", ".arrow")
TABLES = {".parquet": ("parquet", open_parquet), ".arrow": ("Arrow", open_arrow)}
PORTION = 4_000_000  # bytes of records that are read, handed to a process and handled at a time
TEXT_BLOCK = 1_000_000  # characters; a longer .txt without blank lines is cut at a line end


class FormatError(ValueError):
    """A record is not what a stage needs. The message has no file and line yet."""


class Dropped(Exception):
    """A record that is of no use, which is counted. The message says why in a word or two."""


def input_error(path, line: int | None, problem: str) -> ValueError:
    """The error of an input file, always in one form: where, what, and how to mend it."""
    return ValueError(f"{path}:{line}: {problem}" if line else f"{path}: {problem}")


def format_of(path: Path) -> str:
    """'.jsonl' for a.jsonl and for a.jsonl.xz; '' for an unknown format."""
    suffixes = path.suffixes[-2:]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else ""


def is_local(dataset: str) -> bool:
    """Whether a name means local files, and not a dataset on the Hub."""
    has_ending = format_of(Path(dataset)) != "" or dataset.startswith((".", "/", "~"))
    return has_ending or glob.has_magic(dataset) or Path(dataset).exists()


def find_files(dataset: str, every_split: bool = False) -> list[Path]:
    """The data files of a file name, a folder (with its subfolders) or a glob, sorted.

    Args:
        every_split: of a folder with a train split, the others too.

    Raises:
        ValueError: there is none, or one has a format that cannot be read.
    """
    path = Path(dataset).expanduser()
    there: list[Path] = []
    if path.is_dir():
        there = [p for p in path.rglob("*") if p.is_file()]
        known = [p for p in there if format_of(p)]
        full = [p for p in known if p.stat().st_size > 0]
        found = choose_files(path, full, every_split, set(there) - set(full))
        found = found or sorted(set(known) - set(full))[:1]
    elif glob.has_magic(dataset) and not path.exists():
        matched = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
        found = choose_files(path.parent, matched, every_split=True) or sorted(matched)
    else:
        found = [path]
    if not found:
        problem = f"no {', '.join(FORMATS)} file there (also .gz .bz2 .xz .zst)."
        tables = [conversion_of(p.name, p.suffix) for p in sorted(there)]
        raise ValueError(f"{dataset}: {problem}" + next(filter(None, tables), ""))
    for file in found:
        if not file.is_file():
            raise input_error(file, None, f"no such file (looked from {Path.cwd()}).")
        if not format_of(file):
            problem = f"unknown format; known: {' '.join(FORMATS)}, compressed."
            raise input_error(file, None, problem + conversion_of(file.name, file.suffix))
        if file.stat().st_size == 0:
            raise input_error(file, None, "the file is empty.")
    return found


@dataclass(frozen=True)
class Portion:
    """Consecutive records of one file, as they were read. The process that needs them parses them.

    What a portion holds depends on the file alone, so that results do not depend on who does what.
    """

    path: Path
    line: int  # of the first record
    content: list  # lines as bytes, record batches, or (line, record)
    size: int  # bytes of the content
    position: int  # bytes of the file, as it is stored, up to the end of this portion

    def records(self) -> Iterator[tuple[int, Any]]:
        """(line, record) of each record. Errors as in iter_records."""
        for number, item in enumerate(self.content, self.line):
            if isinstance(item, tuple):
                yield item
                continue
            text = decode(self.path, number, item).removeprefix("\ufeff")  # of a file put behind
            if text and not text.isspace():
                yield number, _parse_json(self.path, number, text)


class TablePortion(Portion):
    """Rows of a table."""

    def records(self) -> Iterator[tuple[int, Any]]:
        line = self.line
        for batch in self.content:
            try:
                rows = rows_of(batch)
            except (ValueError, OverflowError) as error:  # no UTF-8; a date beyond Python's
                problem = f"a value in the {len(batch)} rows from here on cannot be read ({error})."
                raise input_error(self.path, line, problem) from error
            yield from enumerate(rows, line)
            line += len(batch)


def iter_records(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, record) of one file: JSON values, rows of tables as dicts, paragraphs of text as str.

    Lines count from 1. In a table a line is a row, in a .json array an element.

    Raises:
        ValueError: text is not UTF-8, or JSON is broken. Names the file and the line.
    """
    for portion in iter_portions(path):
        yield from portion.records()


def iter_portions(path: Path) -> Iterator[Portion]:
    """The records of one file in portions of PORTION bytes. Errors as in iter_records."""
    ending = format_of(path)
    with open(path, "rb") as stored:
        if ending in TABLES:
            yield from _iter_table(path, stored, *TABLES[ending])
            return
        shape = _shape(path, stored, ending)
        if shape == TEXT:
            yield from _group(path, _iter_paragraphs(path, stored), stored.tell)
        elif shape == LINES:
            yield from _group(path, _iter_raw_lines(path, stored), stored.tell)
        else:
            yield from _group(path, _iter_values(path, stored, shape), stored.tell)


def _shape(path: Path, stored: BinaryIO, ending: str) -> str:
    """How the records stand in the file, which is at its beginning again."""
    try:
        with _decompressed(path, stored) as stream:
            head = stream.read(HEAD)
    except Exception:  # of a broken archive: whoever reads the lines names the one at which it ends
        return TEXT if ending == ".txt" else LINES
    finally:
        stored.seek(0)
    if problem := foreign(head, ending):
        raise input_error(path, None, f"{problem}.")
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if ending == ".json" and start not in (b"[", b"{"):
        raise input_error(path, 1, "a .json file must hold an array of objects or JSON lines.")
    return shape_of(head, ending)


def _group(
    path: Path, items: Iterator, position: Callable[[], int], kind=Portion
) -> Iterator[Portion]:
    """Blocks of (line, bytes), (line, record) or (line, batch). What was read precedes an error."""
    content: list = []
    first = size = 0
    try:
        for line, item in items:
            first = first if content else line
            is_record = not isinstance(item, bytes | pyarrow.RecordBatch)
            content.append((line, item) if is_record else item)
            size += size_of(item)
            if size >= PORTION:
                yield kind(path, first, content, size, position())
                content, size = [], 0
    except ValueError:
        if content:
            yield kind(path, first, content, size, position())
        raise
    if content:
        yield kind(path, first, content, size, position())


def size_of(item) -> int:
    """Bytes of what is read; of a parsed value about as many as its text has."""
    if isinstance(item, bytes):
        return len(item)
    if isinstance(item, pyarrow.RecordBatch):
        return item.nbytes
    text = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)
    return len(text.encode(errors="surrogatepass"))


def _decompressed(path: Path, stored: BinaryIO):
    if path.suffix != ".zst":
        openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
        return openers.get(path.suffix, contextlib.nullcontext)(stored)
    try:  # not zstandard: it reads a file that was cut short without an error
        name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
        return importlib.import_module(name).open(stored)
    except ImportError as error:
        fix = "reading .zst needs `pip install backports.zstd`."
        raise input_error(path, None, fix) from error


@contextlib.contextmanager
def _open(path: Path, stored: BinaryIO, line: Callable[[], int | None]) -> Iterator[Any]:
    """The decompressed bytes. An archive's error becomes an input error at the line of line()."""
    with _decompressed(path, stored) as stream:
        try:
            yield stream
        except ValueError:
            raise  # an input error already
        except Exception as error:  # each archive module raises errors of its own
            if path.suffix not in COMPRESSIONS or getattr(error, "errno", None) is not None:
                raise  # the disk has an error, not the archive
            problem = f"the archive is broken or cut short ({error})."
            raise input_error(path, line(), problem) from error


def _iter_raw_lines(path: Path, stored: BinaryIO) -> Iterator[tuple[int, bytes]]:
    number = 0
    with _open(path, stored, lambda: number + 1) as stream:
        for number, line in enumerate(stream, start=1):
            # Windows editors put a byte order mark before the first line.
            yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def decode(path: Path, number: int, line: bytes) -> str:
    """A line's text. An error names its file and line."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise input_error(path, number, f"not UTF-8; {why_not_utf8(line, error)}.") from error


def _parse_json(path: Path, number: int, text: str):
    is_end = not text.endswith("\n")
    text = text.rstrip()  # otherwise JSON that ends too early has its error on the next line
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _json_error(path, number, error, is_end) from error


def _json_error(
    path: Path, number: int, error: Exception, is_end: bool, before: int = 0
) -> ValueError:
    """The input error for JSON whose first line has this number.

    is_end: the text ends where the file ends. before: characters of the first line before it.
    """
    if not isinstance(error, json.JSONDecodeError):  # a number or a nesting beyond Python's limits
        return input_error(path, number, f"JSON that cannot be read: {error}.")
    start = 0 if error.colno <= 60 else error.colno - 40  # of what is shown of a long line
    shown = error.doc.split("\n")[error.lineno - 1][start : start + 60]
    column = error.colno + (before if error.lineno == 1 else 0)
    hint = json_hint(error, is_end)
    problem = f"broken JSON at column {column:,}: {error.msg}{hint} (the line: {shown!r})."
    return input_error(path, number + error.lineno - 1, problem)


def _iter_values(path: Path, stored: BinaryIO, shape: str) -> Iterator[tuple[int, Any]]:
    """The elements of an array, or values that follow each other and have several lines."""
    with _open(path, stored, lambda: None) as stream:
        reader = ArrayReader(stream)
        try:
            yield from enumerate(reader.elements() if shape == ARRAY else reader.values(), start=1)
        except UnicodeDecodeError as error:
            before = error.object[: error.start]
            line, end, _ = error.object[before.rfind(b"\n") + 1 :].partition(b"\n")
            decode(path, reader.line + reader.text.count("\n"), line + end)
        except (ValueError, RecursionError) as error:
            raise _json_error(path, reader.line, error, reader.ended, reader.before) from error


def _iter_paragraphs(path: Path, stored: BinaryIO) -> Iterator[tuple[int, str]]:
    start, lines, size = 1, [], 0
    for number, raw_line in _iter_raw_lines(path, stored):
        line = decode(path, number, raw_line)
        if line.strip() and size < TEXT_BLOCK:
            lines.append(line)
            size += len(line)
            continue
        if lines:
            yield start, "".join(lines).rstrip("\r\n")
        start, lines, size = (number, [line], len(line)) if line.strip() else (number + 1, [], 0)
    if lines:
        yield start, "".join(lines).rstrip("\r\n")


def _iter_table(path: Path, stored: BinaryIO, name: str, open_table) -> Iterator[Portion]:
    source: Any = path
    if path.suffix in COMPRESSIONS:
        source = pyarrow.BufferReader(b"".join(line for _, line in _iter_raw_lines(path, stored)))
    try:
        batches, position = open_table(source, path.stat().st_size, PORTION // 4)
        yield from _group(path, batches, position, TablePortion)
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        cause = " ".join(str(error).split())
        if name == "parquet" and path.suffix not in COMPRESSIONS:
            cause = why_no_parquet(*_ends(stored)) or cause
        raise input_error(path, None, f"not a readable {name} file ({cause}).") from error


def _ends(stored: BinaryIO) -> tuple[bytes, bytes]:
    """The beginning and the last bytes of a file."""
    stored.seek(0)
    head = stored.read(HEAD)
    stored.seek(max(0, stored.seek(0, 2) - 4))
    return head, stored.read()


def read_text(path: Path) -> str:
    """A whole file as text. Errors as in iter_records."""
    with open(path, "rb") as stored:
        return "".join(decode(path, *line) for line in _iter_raw_lines(path, stored))
