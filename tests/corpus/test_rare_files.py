"""Files that are rare, and that were once read wrongly or ended in an error of nowhere."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from recipes import write_records
from tiny import sentences

from corpus.cache import Data, Options
from corpus.documents import iter_documents
from corpus.estimate import estimate, first_megabyte
from corpus.exam import read_questions
from corpus.preparation import Corpus
from corpus.readers import iter_records
from corpus.records import to_messages
from corpus.transcripts import split_question, split_transcript
from sft_data import ConversationRecipe
from train_data import DocumentRecipe


def texts_of(path) -> list:
    return [record for _, record in iter_records(path)]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_half_an_emoji_drops_its_record_alone(tmp_path, name):
    records = [{"text": "好"}, {"text": "半 \ud83d"}, {"text": "天", "source": "\ud83d"}]
    lines = [json.dumps(record) for record in records]
    text = f"[{', '.join(lines)}]" if name == "a.json" else "\n".join(lines)
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert list(iter_documents(str(tmp_path / name))) == ["好", "天"]


def test_files_of_windows_behind_one_another_and_lines_of_wide_spaces(tmp_path):
    lines = ['\ufeff{"text": "一"}', '\ufeff{"text": "二"}', "\u3000", '{"text": "三"}']
    (tmp_path / "a.jsonl").write_text("\r\n".join(lines), encoding="utf-8")
    assert [number for number, _ in iter_records(tmp_path / "a.jsonl")] == [1, 2, 4]


def test_the_column_of_an_error_counts_from_the_beginning_of_a_long_line(tmp_path):
    sound = '{"text": "' + "好" * 1000 + '"}, '
    text = "[" + sound * 3000 + '{"text" "here"}]'
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    column = text.index('"here"') + 1
    with pytest.raises(ValueError, match=rf'a\.json:1: .* column {column:,}: .*"text\\?" \\?"here'):
        list(iter_records(tmp_path / "a.json"))


# --- tables -------------------------------------------------------------------------------------


def test_what_a_table_cannot_give_names_its_file_and_row(tmp_path):
    wrong = "好".encode("gbk")
    offsets = pa.array([0, 1, 3], pa.int32()).buffers()[1]
    column = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"a" + wrong))
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": column}), path)
    with pytest.raises(ValueError, match=r"a\.parquet:1: a value in the 2 rows .*can't decode"):
        list(iter_records(path))
    late = pa.array([2**62], pa.timestamp("ms"))
    pq.write_table(pa.table({"text": ["好"], "when": late}), path)
    with pytest.raises(ValueError, match=r"a\.parquet:1: a value in the 1 rows"):
        list(iter_records(path))


def test_the_calls_of_a_table_have_the_arguments_that_they_have_as_lines(tmp_path):
    def talk(name: str, **arguments) -> dict:
        call = {"function": {"name": name, "arguments": arguments}}
        messages = [
            {"role": "user", "content": "问"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
        return {"messages": messages}

    records = [talk("weather", city="北京"), talk("search", query="天", limit=[1, None])]
    found = [
        [to_messages(record) for record in texts_of(write_records(tmp_path / name, records))]
        for name in ("a.jsonl", "a.parquet")
    ]
    assert found[0] == found[1]
    assert "null" not in str(found[1][0])


# --- shares, limits, estimates ------------------------------------------------------------------


def test_a_dataset_all_of_which_another_has_is_named(tmp_path):
    records = [{"text": text} for text in sentences(9)]
    first = write_records(tmp_path / "a.jsonl", records)
    second = write_records(tmp_path / "b.jsonl", records[:3])
    data = Data({str(first): 0.5, str(second): 0.5}, Options(tmp_path / "cache"))
    found = r"b\.jsonl: it has nothing usable that the datasets before it do not have"
    with data, pytest.raises(ValueError, match=found):
        data.choice(DocumentRecipe(None))


def test_a_limit_counts_the_text_of_short_paragraphs(tmp_path, tokenizer):
    path = write_records(tmp_path / "a.txt", [f"{n:05}天地玄黄宇宙洪荒" for n in range(60_000)])
    recipe = DocumentRecipe(None, tokenizer, 32)
    corpus = Corpus([([path], None)])
    portion = first_megabyte(corpus)
    assert sum(len(text.encode()) for _, text in portion.records()) >= 1_000_000
    whole = next(corpus.tasks()).portion
    tokens = [estimate(corpus, one, recipe).tokens for one in (portion, whole)]
    assert tokens[0] == pytest.approx(tokens[1], rel=0.01)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.json", "[]", "there is no record"),
        ("a.jsonl", '{"instruction": "问", "output": ""}', "nothing to train on .dropped: 1 "),
    ],
)
def test_data_of_no_use_are_named_by_the_plan(tmp_path, tokenizer, name, text, problem):
    (tmp_path / name).write_text(text, encoding="utf-8")
    corpus = Corpus([([tmp_path / name], None)])
    with pytest.raises(ValueError, match=rf"{name}: .*{problem}"):
        estimate(corpus, first_megabyte(corpus), ConversationRecipe(tokenizer, 64, 0))


# --- transcripts, questions ---------------------------------------------------------------------


@pytest.mark.parametrize("space", ["", " ", "\u3000", "\xa0\n"])
def test_a_transcript_may_begin_with_any_space(space):
    assert split_transcript(f"{space}User: 问") == [{"role": "user", "content": "问"}]
    talk = f"{space}Human: 你好\n\nAssistant: 您好\n\nHuman: 再见\n\nAssistant:"
    assert [m["content"] for m in split_question(talk)] == ["你好", "您好", "再见"]


ROWS = "question,A,B,answer\n天？,地,玄,A\n"


def test_a_table_of_questions_has_the_line_ends_of_any_system(tmp_path):
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "q.csv").write_bytes(ROWS.replace("\n", end).encode())
        assert [q.answer for q in read_questions(str(tmp_path / "q.csv"))] == [0]


@pytest.mark.parametrize("following", [1, 30_000])
def test_a_quotation_mark_that_never_closes_swallows_nothing_in_silence(tmp_path, following):
    text = ROWS + '"地？,天,黄,B\n' + "玄？,天,黄,B\n" * following
    (tmp_path / "q.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r'q\.csv:3: broken CSV.* a " is not closed'):
        read_questions(str(tmp_path / "q.csv"))
