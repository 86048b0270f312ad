"""Multiple-choice questions: finding them in published layouts, and reading them.

C-Eval, CMMLU and MMLU publish a file for each subject and split, and the path alone says which:

    ceval/dev/law_dev.csv   ceval/val/law_val.csv      ceval/test/law_test.csv
    law/dev-00000-of-00001.parquet                     law/val-00000-of-00001.parquet
"""

import csv
import io
import re
import string
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from corpus.folders import is_no_data, say_once
from corpus.messages import is_missing
from corpus.readers import find_files, format_of, input_error, iter_records, read_text

LETTERS = [*string.ascii_uppercase]
# A split's names. Solved examples are taken from the first; the others are scored, the last one
# that has answers: C-Eval keeps those of its test split to itself.
SPLITS = {"dev": "dev", "val": "val", "valid": "val", "validation": "val", "test": "test"}
EXAMPLES, SCORED = "dev", ("test", "val")
SHARD = re.compile(r"[-_]\d+[-_]of[-_]\d+$")  # of train-00000-of-00001


@dataclass
class Question:
    subject: str
    text: str
    options: list[str]
    answer: int  # index into options
    split: str = ""  # dev, val or test, where the path says so


def read_questions(path: str) -> list[Question]:
    """The questions to score, and those of dev, which are shown solved before them.

    Files are CSV as C-Eval's and CMMLU's (question, A, B, C, D, answer) or records of the same
    keys. Records may also have `options` or `choices`, a list, and `answer` (ARC's `answerKey`) as
    a letter or an index. Subject and split are columns of these names, else told by the path. A
    question without words or without an answer is left out. What is left out is printed.

    Raises:
        ValueError: naming file and line.
    """
    root = Path(path).expanduser()
    questions: list[Question] = []
    read: Counter = Counter()
    unanswered: Counter = Counter()
    keys: list[str] = []
    for file in [root] if root.suffix == ".csv" else _question_files(root):
        subject, split = subject_and_split(file, root)
        for line, record in _iter_csv(file) if file.suffix == ".csv" else iter_records(file):
            read[split] += 1
            lowered = _lowered(record, file, line)
            if _can_be_scored(lowered):
                questions.append(_parse_question(lowered, subject, split, file, line))
            else:
                unanswered[split] += 1
                keys = keys or [*record]
    for split, count in unanswered.items():
        of = f" of {split}" if split else ""
        print(
            f"{path}: {count:,} of the {read[split]:,} questions{of} have no answer and are left "
            "out.",
            flush=True,
        )
    if not questions:
        found = f"; found {', '.join(keys)}" if keys else ""
        raise ValueError(
            f"{path}: no questions; expected rows of question, A, B, … and answer{found}."
        )
    return _one_split(questions, path)


def _one_split(questions: list[Question], path: str) -> list[Question]:
    """Of several splits the last one, with the examples of dev. Questions of no split stay."""
    splits = {question.split for question in questions}
    scored = next((split for split in SCORED if split in splits), None)
    if scored and len(splits - {""}) > 1:
        others = f", {EXAMPLES} has the solved examples" if EXAMPLES in splits else ""
        print(f"{path}: {scored} is scored{others}.", flush=True)
    elsewhere = set(SCORED) - {scored}
    return [question for question in questions if question.split not in elsewhere]


def subject_and_split(file: Path, root: Path) -> tuple[str, str]:
    """What a path says: ("law", "val") of val/law_val.csv and of law/val-00000-of-00001.parquet.

    Only names below `root` count. The subject is the innermost name that is no split.
    """
    parts = file.relative_to(root).parts if root.is_dir() else (file.name,)
    subject, split = "", ""
    for part in reversed([*parts[:-1], parts[-1].split(".")[0]]):
        name = SHARD.sub("", part)
        found = re.fullmatch(rf"(?:(.+)[-_])?({'|'.join(SPLITS)})", name, re.IGNORECASE)
        if found:
            split = split or SPLITS[found[2].lower()]
            name = found[1] or ""
        subject = subject or ("" if name.isdigit() else name)
    return subject or root.resolve().stem, split


def _question_files(root: Path) -> list[Path]:
    found = sorted(root.rglob("*.csv")) if root.is_dir() else []
    found = [file for file in found if not is_no_data(file.relative_to(root))]
    if not found:
        return find_files(str(root), every_split=True)
    every = [p for p in root.rglob("*") if format_of(p) and not is_no_data(p.relative_to(root))]
    if others := set(every) - set(found):
        say_once(f"{root}: only the CSV files are read, {len(others):,} others are left out.")
    return found


def _iter_csv(path: Path) -> Iterator[tuple[int, dict]]:
    """(line, record). MMLU's files have no line of names: question, options, letter."""
    names: list[str] = []
    for line, values in _rows_of(path):
        if not names:
            names = [value.strip() for value in values]
            has_names = "question" in [name.lower() for name in names]
            if has_names or len(values) < 4 or values[-1].strip() not in LETTERS:
                continue
            names = ["question", *LETTERS[: len(values) - 2], "answer"]
        if values:
            yield line, dict(zip(names, values, strict=False))


def _rows_of(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, values). A quotation mark that never closes would take all that follows."""
    lines = list(io.StringIO(read_text(path), newline=None))  # None: also the line ends of a Mac
    reader, first, following = csv.reader(lines), 1, 1
    try:
        for values in reader:
            first, following = following, reader.line_num + 1
            yield reader.line_num, values
    except csv.Error as error:  # it took more than a field may have
        raise input_error(path, following, f'broken CSV ({error}); a " is not closed.') from error
    try:
        list(csv.reader(lines[first - 1 :], strict=True))
    except csv.Error as error:
        if "end of data" in str(error):
            raise input_error(path, first, 'broken CSV; a " is not closed.') from error


def _is_empty(value) -> bool:
    return is_missing(value) or (isinstance(value, str) and not value.strip())


def _lowered(record, path: Path, line: int) -> dict:
    """With keys in small letters. Raises ValueError for what is no object."""
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise input_error(path, line, f"a question must be an object, found {kind}.")
    return {str(key).lower(): value for key, value in record.items()}


def _answer_of(record: dict):
    return record.get("answer", record.get("answerkey"))


def _can_be_scored(record: dict) -> bool:
    answer, text = _answer_of(record), record.get("question", "none")
    return not _is_empty(answer) and answer != -1 and not _is_empty(text)


def _parse_question(record: dict, subject: str, split: str, path: Path, line: int) -> Question:
    letters, options = _options_of(record)
    answer = _place_of(_answer_of(record), letters)
    there = [number for number, option in enumerate(options) if not _is_empty(option)]
    is_whole = answer in there and 2 <= len(there) <= len(LETTERS)
    if "question" not in record or not is_whole:
        problem = f"expected question, A, B, … (or options) and answer; found {record}"
        raise input_error(path, line, problem[:300] + ".")
    name = str(record.get("subject") or subject)
    split = SPLITS.get(str(record.get("split")).lower(), split)
    texts = [str(options[number]) for number in there]
    return Question(name, str(record["question"]), texts, there.index(answer), split)


def _place_of(answer, letters: list[str]) -> int:
    """Which option an answer names, by its letter or its index; -1: none."""
    if isinstance(answer, str):
        letter = answer.strip().upper()
        return letters.index(letter) if letter in letters else -1
    is_index = isinstance(answer, int | float) and not isinstance(answer, bool)
    return int(answer) if is_index and answer == int(answer) else -1


def _options_of(record: dict) -> tuple[list[str], list]:
    """(letters, options). Options may be missing."""
    options = record.get("options", record.get("choices"))
    if isinstance(options, dict):  # ARC's {"text": […], "label": […]}, or {"A": …, "B": …}
        if "text" in options:
            return list(map(str, options.get("label", LETTERS))), list(options["text"])
        letters = sorted(options)
        return letters, [options[letter] for letter in letters]
    if options is None:
        names = [letter.lower() for letter in LETTERS]
        options = [record[name] for name in takewhile(record.__contains__, names)]
    return LETTERS, options if isinstance(options, list) else []
