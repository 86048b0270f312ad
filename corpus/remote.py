"""Datasets on the network: their names, which of their files are data, and the parts of files."""

import fnmatch
import os
from collections.abc import Iterable
from glob import has_magic
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from corpus.folders import DESCRIPTIONS, is_no_data
from corpus.readers import FORMATS, format_of

BLOCK = 2**23  # bytes that are read at once
SHOWN = 10  # names that an error lists


class Request(NamedTuple):
    """A dataset's name, as it was written and in its parts. A part that is absent is ''."""

    dataset: str
    name: str  # owner/name
    path: str  # a file, a folder or a pattern
    configuration: str
    split: str

    @property
    def not_here(self) -> str:
        return f"{self.dataset}: no such file here (looked from {Path.cwd()})"


class RemoteFile(NamedTuple):
    path: str  # in the repository
    size: int  # bytes, as they are stored


def matches(path: str, pattern: str) -> bool:
    """Whether a pattern names a file or one of its folders. A * also stands for slashes."""
    names = [path, *map(str, PurePosixPath(path).parents)]
    patterns = {pattern, pattern.replace("**/", "")}  # **/ also stands for no folder at all
    return any(n == p or fnmatch.fnmatchcase(n, p) for n in names for p in patterns)


def fixed_folder(pattern: str) -> str:
    """The folder of a pattern up to its first wildcard: what must be listed."""
    parts = pattern.split("/")
    fixed = next((i for i, part in enumerate(parts) if has_magic(part)), len(parts) - 1)
    return "/".join(parts[:fixed])


def keep_data_files(request: Request, paths: Iterable[str]) -> list[str]:
    """The files that the readers know, sorted. A folder or a pattern has no files about the data.

    Raises:
        ValueError: there is none.
    """
    found = sorted(paths)
    known = [p for p in found if format_of(Path(p)) and (_is_data(p) or p == request.path)]
    if not known:
        there = f"there are {', '.join(islice(found, SHOWN))}" if found else "there is no data file"
        raise ValueError(
            f"{request.dataset}: no file of a known format; {there} "
            f"(known: {' '.join(FORMATS)}, also compressed)."
        )
    return known


def _is_data(path: str) -> bool:
    return not is_no_data(PurePosixPath(path)) and PurePosixPath(path).name not in DESCRIPTIONS


class ExplainedError(ValueError):
    """A dataset cannot be had from its host. The message says why and what to do."""


def first_line(error: BaseException) -> str:
    """The first line of what caused an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or repr(error)).splitlines()[0]


def cut_at_line_end(path: Path) -> bool:
    """Cut a file behind its last line end and put it on the disk. Whether something is left."""
    with open(path, "rb+") as stream:
        end = stream.seek(0, os.SEEK_END)
        while end > 0:
            start = stream.seek(max(0, end - BLOCK))
            place = stream.read(end - start).rfind(b"\n")
            end = start
            if place >= 0:
                end += place + 1
                break
        stream.truncate(end)
        os.fsync(stream.fileno())
    return end > 0
