"""Multiple-choice questions: finding them in published layouts, reading them, wording a prompt.

C-Eval, CMMLU and MMLU publish a file for each subject and split, and the path alone says which:

    ceval/dev/law_dev.csv   ceval/val/law_val.csv      ceval/test/law_test.csv
    law/dev-00000-of-00001.parquet                     law/val-00000-of-00001.parquet
"""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from corpus.ceval import SUBJECTS
from corpus.folders import is_no_data, say_once
from corpus.readers import find_files, format_of, input_error, iter_records, read_text

LETTERS = "ABCDEFGH"
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
    keys. Records may also have `options` or `choices`, a list, and `answer` as a letter or an
    index. Subject and split are columns of these names, else told by the path. What is left out is
    printed.

    Raises:
        ValueError: naming file and line.
    """
    root = Path(path).expanduser()
    questions: list[Question] = []
    unanswered: dict[str, int] = {}
    for file in [root] if root.suffix == ".csv" else _question_files(root):
        subject, split = subject_and_split(file, root)
        records = list(_iter_csv(file) if file.suffix == ".csv" else iter_records(file))
        if split and not any(_has_answer(record) for _, record in records):
            unanswered[split] = unanswered.get(split, 0) + len(records)
            continue
        questions += [_parse_question(r, subject, split, file, line) for line, r in records]
    for split, count in unanswered.items():
        print(f"{path}: {split} has no answers: its {count:,} questions are left out.", flush=True)
    if not questions:
        raise ValueError(f"{path}: no questions; expected rows of question, A, B, … and answer.")
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
    reader = csv.reader(io.StringIO(read_text(path)))
    names: list[str] = []
    for values in reader:
        if not names:
            names = [value.strip().lower() for value in values]
            if "question" in names or len(values) < 4 or values[-1].strip() not in [*LETTERS]:
                continue
            names = ["question", *LETTERS.lower()[: len(values) - 2], "answer"]
        if values:
            yield reader.line_num, dict(zip(names, values, strict=False))


def _has_answer(record) -> bool:
    if not isinstance(record, dict):
        return True  # it is broken, which is said with its line
    answers = [value for key, value in record.items() if str(key).lower() == "answer"]
    return any(answer not in (None, "", -1) for answer in answers)


def _parse_question(record, subject: str, split: str, path: Path, line: int) -> Question:
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise input_error(path, line, f"a question must be an object, found {kind}.")
    record = {str(key).lower(): value for key, value in record.items()}
    options = _options_of(record)
    answer = record.get("answer")
    if isinstance(answer, str) and answer.strip().upper() in LETTERS:
        answer = LETTERS.index(answer.strip().upper()) if answer.strip() else None
    valid = isinstance(answer, int) and 0 <= answer < len(options)
    if "question" not in record or len(options) < 2 or not valid:
        problem = f"expected question, A, B, … (or options) and answer; found {record}"
        raise input_error(path, line, problem[:300] + ".")
    name = str(record.get("subject") or subject)
    split = SPLITS.get(str(record.get("split")).lower(), split)
    return Question(name, str(record["question"]), list(map(str, options)), answer, split)


def _options_of(record: dict) -> list:
    options = record.get("options", record.get("choices"))
    if isinstance(options, dict):  # ARC's {"text": […], "label": […]}, or {"A": …, "B": …}
        options = options.get("text") or [options[key] for key in sorted(options)]
    if options is None:
        letters = [letter for letter in LETTERS.lower() if record.get(letter) not in (None, "")]
        options = [record[letter] for letter in letters]
    return options if isinstance(options, list) else []


def opening(question: Question) -> str:
    """The first line of C-Eval's own prompt, for questions whose path tells subject and split."""
    if not question.split or question.subject in SPLITS:
        return ""
    subject = SUBJECTS.get(question.subject, question.subject)
    return f"以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n"


def render_question(question: Question, with_answer: bool) -> str:
    """A question and its options by letter, as C-Eval's own prompt has them."""
    lines = [question.text]
    lines += [f"{letter}. {text}" for letter, text in zip(LETTERS, question.options, strict=False)]
    lines.append("答案：" + (LETTERS[question.answer] + "\n\n" if with_answer else ""))
    return "\n".join(lines)


def render_words(question: Question, with_answer: bool) -> str:
    """A question without its options: the answer is the words of one."""
    answer = question.options[question.answer] + "\n\n" if with_answer else ""
    return f"{question.text}\n答案：{answer}"
