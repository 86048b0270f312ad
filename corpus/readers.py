"""Reading users' files with errors to act on; writing folders that are whole or absent."""

import bz2
import contextlib
import errno
import glob
import gzip
import importlib
import json
import lzma
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet
import xxhash
from filelock import FileLock

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
FORMATS = (".jsonl", ".json", ".txt", ".parquet")
SCRIPTS = {"dpo": "dpo_train.py", "sft": "sft_train.py", "pretrain": "train_llm.py"}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TEXT_BLOCK = 1_000_000  # characters after which a .txt without blank lines is cut at a line end


def input_error(path, line: int | None, problem: str) -> ValueError:
    """The one form of every complaint about an input file: where, what, and how to mend it."""
    return ValueError(f"{path}:{line}: {problem}" if line else f"{path}: {problem}")


def format_of(path: Path) -> str:
    """'.jsonl' for both a.jsonl and a.jsonl.xz; '' for what is no known format."""
    suffixes = path.suffixes[-2:]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else ""


def is_local(dataset: str) -> bool:
    """Whether a name means files here and not a dataset on the Hub."""
    has_ending = format_of(Path(dataset)) != "" or dataset.startswith((".", "/", "~"))
    return has_ending or glob.has_magic(dataset) or Path(dataset).exists()


def find_files(dataset: str) -> list[Path]:
    """The data files behind a file name, a folder (searched recursively) or a glob, sorted.

    Raises:
        ValueError: none found, or one of a format that cannot be read.
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


def content_hash(files: list[Path]) -> str:
    """Hash of the files' bytes, whatever their names or dates; 128 bits as hexadecimal."""
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(f"{file.stat().st_size}:".encode())
        with open(file, "rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def settings_hash(*settings) -> str:
    """A short name for a combination of settings, for cache folders."""
    return xxhash.xxh3_64_hexdigest(json.dumps(settings, sort_keys=True, default=str).encode())


def split_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: below validation_ratio, it is held out.

    So the split of a document never changes, whatever is added to the data.
    """
    return xxhash.xxh3_64_intdigest(text.encode(), seed=1) / 2**64


def iter_records(path: Path) -> Iterator[tuple[int, object]]:
    """(line, record) of one file: JSON values, parquet rows as dicts, paragraphs of text as str.

    A line counts from 1; for parquet it is the row, for a .json array the element.

    Raises:
        ValueError: naming file and line, for text that is not UTF-8 and for broken JSON.
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
        openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
        return openers.get(path.suffix, open)(path, "rb")
    try:  # not zstandard: it takes a file that was cut short for a whole one
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
        except Exception as error:  # each archive module raises its own kinds
            if path.suffix not in COMPRESSIONS or getattr(error, "errno", None) is not None:
                raise  # a disk's error, not the archive's
            problem = f"the archive is broken or cut short ({error})."
            raise input_error(path, number + 1, problem) from error


def _iter_lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in _iter_raw_lines(path):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # the mark that Windows editors add
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
    text = text.rstrip()  # else JSON that stops too early would be wrong on the line after it
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
    elif first == "{":  # JSON lines under another name
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


def find_final(output_dir: str, stage: str, script: str, option: str = "init_from") -> Path:
    """The newest finished run of a stage.

    Raises:
        ValueError: there is none; names the command that makes one, and the option to do without.
    """
    finals = list(Path(output_dir, stage).glob("*/final"))
    if not finals:
        raise ValueError(
            f"No finished {stage} run under {output_dir}/{stage}: run `python {script}` first, or "
            f"set {option} to a model folder."
        )
    return max(finals, key=lambda folder: folder.stat().st_mtime)


def find_newest_final(output_dir: str, stage: str | None = None) -> Path:
    """The newest finished run of the furthest stage there is, or of the one named.

    Raises:
        ValueError: none is finished.
    """
    if stage:
        return find_final(output_dir, stage, SCRIPTS[stage], "--model")
    for name in SCRIPTS:
        with contextlib.suppress(ValueError):
            return find_final(output_dir, name, "")
    raise ValueError(
        f"No finished run under {output_dir}: run `python train_llm.py` first, or set --model to a "
        "model folder."
    )


def read_text(path: Path) -> str:
    """A whole file as text; errors as in iter_records."""
    return "".join(line for _, line in _iter_lines(path))


def print_lines(lines):
    """print, ending quietly when the reader (such as `head`) has seen enough."""
    try:
        for line in lines:
            print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains again at exit


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Write into the folder this yields; it becomes `target` only when all of it is on disk.

    Whatever happens before, a kill or a full disk, `target` stays absent and the next writer
    clears what was left.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with explain_full_disk(target):
            yield temporary
            for path in [p for p in temporary.rglob("*") if p.is_file()]:
                with open(path, "rb+") as stream:
                    os.fsync(stream.fileno())
            _sync_folder(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    os.replace(temporary, target)
    _sync_folder(target.parent)


def cache_lock(cache: Path) -> FileLock:
    """To be held while a folder of a cache is made: another run that wants it waits for it."""
    cache.mkdir(parents=True, exist_ok=True)
    return FileLock(cache / ".lock")


def write_whole(path: Path, text: str):
    """Write a file that, whatever happens, is as before or as wanted."""
    temporary = path.with_name(path.name + ".tmp")
    with explain_full_disk(path), open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


class DiskFullError(OSError):
    """Something could not be written; the message says what and what to do."""


@contextlib.contextmanager
def explain_full_disk(target: Path) -> Iterator[None]:
    """Make one clear error of what a full disk raises while `target` is written.

    torch, safetensors and tokenizers raise errors of their own that do not tell the cause; then
    the disk is asked.
    """
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        number = number if number in DISK_FULL else _full_disk_errno(target.parent)
        if number is None:
            raise
        raise DiskFullError(
            f"{target} could not be written: {os.strerror(number)} "
            f"({shutil.disk_usage(target.parent).free / 2**20:,.0f} MiB free there). Free some "
            "space and run the same command again: it goes on from what was saved before."
        ) from error


def _full_disk_errno(folder: Path) -> int | None:
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(bytes(2**20))
    except OSError as error:
        return error.errno if error.errno in DISK_FULL else None
    return None


def _sync_folder(folder: Path):
    if os.name == "posix":  # elsewhere a folder cannot be opened, nor needs to be
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
