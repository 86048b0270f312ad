"""Reading users' files. Every error names the file, the line and the fix."""

import bz2
import glob
import gzip
import importlib
import json
import lzma
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
FORMATS = (".jsonl", ".json", ".txt", ".parquet")
TEXT_BLOCK = 1_000_000  # characters; a longer .txt without blank lines is cut at a line end


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


def find_files(dataset: str) -> list[Path]:
    """The data files of a file name, a folder (with its subfolders) or a glob, sorted.

    Raises:
        ValueError: there is none, or one has a format that cannot be read.
    """
    path = Path(dataset).expanduser()
    if path.is_dir():
        found = [p for p in sorted(path.rglob("*")) if p.is_file() and format_of(p)]
    elif glob.has_magic(dataset) and not path.exists():
        found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
    else:
        found = [path]
    if not found:
        raise ValueError(f"{dataset}: no {', '.join(FORMATS)} file there (also .gz .bz2 .xz .zst).")
    for file in found:
        if not file.is_file():
            raise input_error(file, None, f"no such file (looked from {Path.cwd()}).")
        if not format_of(file):
            raise input_error(
                file, None, f"unknown format; known: {' '.join(FORMATS)}, compressed."
            )
        if file.stat().st_size == 0:
            raise input_error(file, None, "the file is empty.")
    return found


def iter_records(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, record) of one file: JSON values, parquet rows as dicts, paragraphs of text as str.

    Lines count from 1. In parquet a line is a row, in a .json array an element.

    Raises:
        ValueError: text is not UTF-8, or JSON is broken. Names the file and the line.
    """
    kind = format_of(path)
    if kind == ".parquet":
        yield from _iter_parquet(path)
    elif kind == ".txt":
        yield from _iter_paragraphs(path)
    elif kind == ".json":
        yield from _iter_json(path)
    else:
        for number, line in _iter_lines(path):
            if line.strip():
                yield number, _parse_json(path, number, line)


def _open(path: Path):
    if path.suffix != ".zst":
        openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
        return openers.get(path.suffix, open)(path, "rb")
    try:  # not zstandard: it reads a file that was cut short without an error
        name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
        return importlib.import_module(name).open(path)
    except ImportError as error:
        fix = "reading .zst needs `pip install backports.zstd`."
        raise input_error(path, None, fix) from error


def _iter_raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    with _open(path) as stream:
        try:
            for number, line in enumerate(stream, start=1):
                yield number, line
        except Exception as error:  # each archive module raises errors of its own
            if path.suffix not in COMPRESSIONS or getattr(error, "errno", None) is not None:
                raise  # the disk has an error, not the archive
            problem = f"the archive is broken or cut short ({error})."
            raise input_error(path, number + 1, problem) from error


def _iter_lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in _iter_raw_lines(path):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark: Windows editors add it
        yield number, _decode(path, number, line)


def _decode(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        try:
            line.decode("gb18030")
            guess = "it reads as GB18030: convert it with `iconv -f GB18030 -t UTF-8`"
        except UnicodeDecodeError:
            guess = f"byte {error.start + 1} of the line is wrong"
        raise input_error(path, number, f"not UTF-8; {guess}.") from error


def _parse_json(path: Path, number: int, text: str):
    text = text.rstrip()  # otherwise JSON that ends too early has its error on the next line
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = number + error.lineno - 1
        shown = text.split("\n")[error.lineno - 1][:60]
        raise input_error(
            path, line, f"broken JSON at column {error.colno}: {error.msg} (the line: {shown!r})."
        ) from error
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise input_error(path, number, f"JSON that cannot be read: {error}.") from error


def _iter_json(path: Path) -> Iterator[tuple[int, object]]:
    lines = list(_iter_lines(path))
    text = "".join(line for _, line in lines)
    first = text.lstrip()[:1]
    if first == "[":
        yield from enumerate(_parse_json(path, 1, text), start=1)
    elif first == "{":  # JSON lines in a file named .json
        for number, line in lines:
            if line.strip():
                yield number, _parse_json(path, number, line)
    else:
        raise input_error(path, 1, "a .json file must hold an array of objects or JSON lines.")


def _iter_paragraphs(path: Path) -> Iterator[tuple[int, str]]:
    start, block, size = 1, [], 0
    for number, line in _iter_lines(path):
        if line.strip() and size < TEXT_BLOCK:
            block.append(line)
            size += len(line)
            continue
        if block:
            yield start, "".join(block).rstrip("\r\n")
        start, block, size = (number, [line], len(line)) if line.strip() else (number + 1, [], 0)
    if block:
        yield start, "".join(block).rstrip("\r\n")


def _iter_parquet(path: Path) -> Iterator[tuple[int, object]]:
    source = path
    if path.suffix in COMPRESSIONS:
        source = pyarrow.BufferReader(b"".join(line for _, line in _iter_raw_lines(path)))
    try:
        file = pyarrow.parquet.ParquetFile(source)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        cause = " ".join(str(error).split())
        raise input_error(path, None, f"not a readable parquet file ({cause}).") from error


def read_text(path: Path) -> str:
    """A whole file as text. Errors as in iter_records."""
    return "".join(line for _, line in _iter_lines(path))
