"""Multiple-choice questions in the layouts that are published, and what is said of them."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corpus.exam import Question, read_questions, subject_and_split
from corpus.exam_prompts import CEVAL, CMMLU, MMLU, wording_of

HEAD = "id,question,A,B,C,D,answer\n"
ROW = "{n},第{n}题？,甲,乙,丙,丁,{answer}\n"


def put(path: Path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def rows(answers: str) -> str:
    return HEAD + "".join(ROW.format(n=n, answer=a) for n, a in enumerate(answers))


def write_ceval(folder: Path, subjects=("law", "logic"), test_answers: str = "") -> str:
    """As C-Eval's archive: a folder for each split, and no answers in test."""
    for subject in subjects:
        head = "id,question,A,B,C,D,answer,explanation\n"
        put(folder / f"dev/{subject}_dev.csv", head + '0,例？,甲,乙,丙,丁,B,"1. 多行\n2. 解释"\n')
        put(folder / f"val/{subject}_val.csv", rows("ABC"))
        without = HEAD.replace(",answer", "") + "0,考？,甲,乙,丙,丁\n1,考二？,甲,乙,丙,丁\n"
        test = rows(test_answers) if test_answers else without
        put(folder / f"test/{subject}_test.csv", test)
        put(folder / f"__MACOSX/val/._{subject}_val.csv", "\0\0Mac")
        put(folder / f"val/._{subject}_val.csv", "\0\0Mac")
    put(folder / "README.md", "# C-Eval")
    return str(folder)


def counted(questions) -> dict:
    found: dict = {}
    for question in questions:
        key = (question.subject, question.split)
        found[key] = found.get(key, 0) + 1
    return found


def test_cevals_folders_give_val_to_score_and_dev_to_show_and_say_so_of_test(tmp_path, capsys):
    path = write_ceval(tmp_path / "ceval")
    questions = read_questions(path)
    assert counted(questions) == {
        (subject, split): n for subject in ("law", "logic") for split, n in (("dev", 1), ("val", 3))
    }
    printed = capsys.readouterr().out
    assert "4 of the 4 questions of test have no answer and are left out." in printed
    assert "val is scored, dev has the solved examples." in printed


def test_where_test_has_answers_it_is_scored_and_val_is_not(tmp_path, capsys):
    path = write_ceval(tmp_path, test_answers="DDDD")  # as in CMMLU
    assert counted(read_questions(path))["law", "test"] == 4
    assert not any(question.split == "val" for question in read_questions(path))
    assert "test is scored, dev has the solved examples." in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["{subject}/{split}-00000-of-00001.parquet", "{subject}/{split}/0000.parquet"]
)
def test_the_same_questions_as_parquet_of_a_folder_for_each_subject(tmp_path, name, capsys):
    record = {"id": 0, "question": "问？", "A": "甲", "B": "乙", "C": "丙", "D": "丁"}
    for subject in ("law", "logic"):
        for split, answer in (("dev", "A"), ("val", "C"), ("test", "")):
            path = tmp_path / name.format(subject=subject, split=split)
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist([record | {"answer": answer}] * 2), path)
    found = counted(read_questions(str(tmp_path)))
    assert found == {(s, split): 2 for s in ("law", "logic") for split in ("dev", "val")}
    assert "4 of the 4 questions of test have no answer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("val/college_physics_val.csv", ("college_physics", "val")),
        ("law/val-00000-of-00001.parquet", ("law", "val")),
        ("law/validation/0000.parquet", ("law", "val")),
        ("cmmlu/test/agronomy.csv", ("agronomy", "test")),
        ("physics_2023.csv", ("physics_2023", "")),
    ],
)
def test_subject_and_split_are_told_by_the_path(tmp_path, name, expected):
    assert subject_and_split(tmp_path / name, tmp_path) == expected


def test_mmlus_csv_without_a_line_of_names_loses_no_question(tmp_path):
    put(tmp_path / "test/law_test.csv", "What is 1?,a,b,c,d,B\n\nAnd 2?,a,b,c,d,D\n")
    questions = read_questions(str(tmp_path))
    assert [(q.text, q.answer) for q in questions] == [("What is 1?", 1), ("And 2?", 3)]
    assert questions[0].options == ["a", "b", "c", "d"]


def test_options_may_be_an_object_of_letters_or_arcs_texts(tmp_path):
    put(
        tmp_path / "q.jsonl",
        '{"question": "问", "options": {"B": "乙", "A": "甲"}, "answer": "B"}\n'
        '{"question": "问", "choices": {"text": ["甲", "乙"], "label": ["A", "B"]}, "answer": 0}\n',
    )
    questions = read_questions(str(tmp_path / "q.jsonl"))
    assert [(q.options, q.answer) for q in questions] == [(["甲", "乙"], 1), (["甲", "乙"], 0)]


def test_arcs_own_key_of_the_answer_is_known_by_its_labels(tmp_path):
    choices = {"text": ["甲", "乙"], "label": ["1", "2"]}
    put(tmp_path / "q.jsonl", json.dumps({"question": "问", "choices": choices, "answerKey": "2"}))
    assert [q.answer for q in read_questions(str(tmp_path / "q.jsonl"))] == [1]


def test_an_option_without_words_moves_no_answer_to_another(tmp_path):
    put(tmp_path / "q.csv", "question,A,B,C,D,E,answer\n问？,甲,乙,,丁,戊,D\n")
    listed = {"question": "问？", "options": ["甲", None, "丙"], "answer": 2.0}
    put(tmp_path / "q.jsonl", json.dumps(listed))
    [question] = read_questions(str(tmp_path / "q.csv"))
    assert (question.options, question.answer) == (["甲", "乙", "丁", "戊"], 2)
    [question] = read_questions(str(tmp_path / "q.jsonl"))
    assert (question.options, question.answer) == (["甲", "丙"], 1)


@pytest.mark.parametrize("answer", ["AB", "甲", "A,B", 7, True, 0.5])
def test_an_answer_that_names_no_option_is_an_error_of_its_line(tmp_path, answer):
    """Two letters, as of a question with several answers, are not the first of them."""
    record = {"question": "问？", "A": "甲", "B": "乙", "C": "丙", "answer": answer}
    put(tmp_path / "q.jsonl", json.dumps(record))
    with pytest.raises(ValueError, match=r"q\.jsonl:1: expected question, A, B, … \(or options\)"):
        read_questions(str(tmp_path / "q.jsonl"))


@pytest.mark.parametrize("missing", [None, "", " ", float("nan"), -1])
@pytest.mark.parametrize("key", ["answer", "question"])
def test_a_question_without_an_answer_or_words_is_counted_and_left_out(
    tmp_path, capsys, missing, key
):
    record = {"question": "问？", "A": "甲", "B": "乙", "answer": "B"}
    broken = record | {key: missing if key == "answer" or missing != -1 else None}
    put(tmp_path / "val/law_val.jsonl", f"{json.dumps(record)}\n{json.dumps(broken)}\n")
    assert len(read_questions(str(tmp_path))) == 1
    printed = capsys.readouterr().out
    assert "1 of the 2 questions of val have no answer and are left out." in printed


def test_without_a_single_answer_the_keys_that_are_there_are_named(tmp_path):
    put(tmp_path / "q.jsonl", '{"question": "问？", "A": "甲", "B": "乙", "gold": "B"}\n')
    with pytest.raises(ValueError, match=r"no questions; .* answer; found question, A, B, gold\."):
        read_questions(str(tmp_path / "q.jsonl"))


# --- the exams' own prompts ---------------------------------------------------------------------


def asked(subject: str, text: str = "光速？", split: str = "val") -> Question:
    return Question(subject, text, ["快", "慢"], 0, split)


def test_each_exam_is_asked_with_its_own_words():
    question = asked("college_physics")
    first = "以下是中国关于大学物理考试的单项选择题，请选出其中的正确答案。\n\n"
    assert CEVAL.opening(question) == first
    assert CEVAL.lettered(question, False) == "光速？\nA. 快\nB. 慢\n答案："
    assert CEVAL.lettered(question, True).endswith("\n答案：A\n\n")
    question = asked("agronomy")
    first = "以下是关于农学的单项选择题，请直接给出正确答案的选项。\n\n"
    assert CMMLU.opening(question) == first
    assert CMMLU.lettered(question, True) == "题目：光速？\nA. 快\nB. 慢\n答案是：A\n\n"
    assert CMMLU.worded(question, False) == "题目：光速？\n答案是："
    question = asked("abstract_algebra", "1?")
    first = (
        "The following are multiple choice questions (with answers) about  abstract algebra.\n\n"
    )
    assert MMLU.opening(question) == first
    assert MMLU.lettered(question, True) == "1?\nA. 快\nB. 慢\nAnswer: A\n\n"
    assert MMLU.lettered(question, False).endswith("\nAnswer:")


def test_no_opening_where_the_path_tells_no_split_or_no_subject():
    assert CEVAL.opening(asked("law", split="")) == ""
    assert CEVAL.opening(asked("val")) == ""


def test_an_exam_is_known_by_its_subjects_and_its_language():
    shared = ["high_school_biology", "sports_science"]  # all Chinese exams have them
    assert wording_of([*map(asked, shared), asked("law")]) is CEVAL
    assert wording_of([*map(asked, shared), asked("agronomy")]) is CMMLU
    assert wording_of([asked("my_own_exam")]) is CEVAL
    assert wording_of([asked("anatomy", "What is 1?"), asked("virology", "And 2?")]) is MMLU
