"""What lies in a folder of data and is no data: a folder is read by what is in it."""

import functools
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePath

# Cards and notes that may end in .txt.
NOTES = {"readme", "license", "licence", "notice", "changelog", "citation", "requirements"}
# Each is one object about the data, as the library `datasets`, LLaMA-Factory or a Hub writes it.
DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
DESCRIPTIONS |= {"config.json", "configuration.json"}
SPLITS = {"train", "test", "validation", "valid", "val", "dev", "eval"}
SHOWN = 4  # names in a message


def is_no_data(path: PurePath) -> bool:
    """Whether a path inside a folder names a note, or something hidden.

    A Mac writes a `._name` beside each file of an archive, and `__MACOSX` around them.
    """
    if any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
        return True
    return path.name.split(".")[0].lower() in NOTES


def split_of(path: PurePath) -> str:
    """'train', 'test', … as a name of the path says, the innermost first; '' where none does."""
    for part in reversed(path.parts):
        for word in re.split(r"[-._ \d]+", part.lower()):
            if word in SPLITS:
                return word
    return ""


def choose_files(
    folder: Path, files: Iterable[Path], every_split: bool, unknown: Iterable[Path] = ()
) -> list[Path]:
    """The data among the files of a known format. What is left out is said once.

    unknown: files of other formats, and empty ones, which are named too.

    Where some files are of a train split, those of the others are left out, as on the Hub.
    """
    kept: list[Path] = []
    left_out = list(unknown)
    for file in sorted(files):
        path = file.relative_to(folder) if file.is_relative_to(folder) else PurePath(file.name)
        (left_out if is_no_data(path) or _is_description(file) else kept).append(file)
    others: list[Path] = []
    splits = {file: split_of(file.relative_to(folder)) for file in kept} if folder.is_dir() else {}
    if not every_split and "train" in splits.values():
        others = [file for file in kept if splits[file] not in ("", "train")]
        kept = [file for file in kept if file not in set(others)]
    if left_out and kept:
        names = _names(folder, sorted(left_out))
        say_once(f"{folder}: left out as no data, or of no known format: {names}.")
    if others:
        counts = Counter(splits[file] for file in others)
        say_once(
            f"{folder}: the split train is read; left out are {_counted(counts)}: "
            f"{_names(folder, others)}. To read one, name its files."
        )
    return kept


def _is_description(file: Path) -> bool:
    """Whether a file is about the data, or an Arrow file that a map() left beside them."""
    if file.name in DESCRIPTIONS:
        return _object_in(file) is not None  # records are an array, or several lines
    if file.suffix != ".arrow":
        return False
    state = _object_in(file.with_name("state.json"))
    if state is None or "_data_files" not in state:
        return file.name.startswith("cache-")
    # The folder may also hold what a map() of the same data left there.
    return file.name not in [entry["filename"] for entry in state["_data_files"]]


def _object_in(file: Path) -> dict | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _names(folder: Path, files: list[Path]) -> str:
    names = [str(f.relative_to(folder) if f.is_relative_to(folder) else f) for f in files]
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _counted(counts: Counter) -> str:
    return ", ".join(f"{count} of {split}" for split, count in counts.items())


@functools.cache
def say_once(text: str):
    """A process that looks into the same folder several times says it once."""
    print(text, flush=True)
